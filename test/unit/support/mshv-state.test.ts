/** The simulated /dev/mshv: what stands still while a partition is frozen, and what of a processor is kept as it was set. */
import fs from 'node:fs';
import { afterEach, describe, expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { BareVmm } from '../../support/mshv/bare-vmm.js';

const whole = fs.existsSync('/dev/kvm') ? describe : describe.skip;
const { HV_STATUS, MSHV_VP_STATE } = abi;
const { REFERENCE_TIME, TIME_FREEZE } = abi.HV_PARTITION_PROPERTY;
const PAGE = abi.MSHV_HV_PAGE_SIZE;
const EINVAL = 22;

let vmm: BareVmm;
let vps: number[] = [];
afterEach(() => {
  vmm.close(vps);
  vps = [];
});

function start(count: number): void {
  vmm = new BareVmm();
  vps = Array.from({ length: count }, (_, index) => vmm.createVp(index));
}

function property(code: number): bigint {
  vmm.clear();
  vmm.input.setUint32(abi.PARTITION_PROPERTY.code, code, true);
  const { GET_PARTITION_PROPERTY } = abi.HVCALL;
  expect(vmm.hypercall(vmm.partition, GET_PARTITION_PROPERTY, abi.GET_PARTITION_PROPERTY_SIZE, 8)).toBe(0);
  return vmm.output.getBigUint64(0, true);
}

function register(vp: number, name: number): bigint {
  vmm.clear();
  vmm.input.setUint32(abi.GET_VP_REGISTERS.vpIndex, vp, true);
  vmm.input.setUint32(abi.GET_VP_REGISTERS.names, name, true);
  const size = abi.GET_VP_REGISTERS.names + 4;
  expect(vmm.hypercall(vps[vp], abi.HVCALL.GET_VP_REGISTERS, size, abi.REGISTER_VALUE_SIZE, 1)).toBe(1 << 16);
  return vmm.output.getBigUint64(0, true);
}

function setRegister(vp: number, name: number, value: bigint): void {
  vmm.clear();
  const at = abi.SET_VP_REGISTERS.elements;
  vmm.input.setUint32(abi.SET_VP_REGISTERS.vpIndex, vp, true);
  vmm.input.setUint32(at + abi.REGISTER_ASSOC.name, name, true);
  vmm.input.setBigUint64(at + abi.REGISTER_ASSOC.value, value, true);
  const size = at + abi.REGISTER_ASSOC_SIZE;
  expect(vmm.hypercall(vps[vp], abi.HVCALL.SET_VP_REGISTERS, size, 0, 1)).toBe(1 << 16);
}

/** MSHV_GET_VP_STATE or MSHV_SET_VP_STATE. @returns the result, and the size as the driver has it */
function vpState(vp: number, request: number, type: number, buffer: { address: bigint; length: number }) {
  const argument = new DataView(new ArrayBuffer(abi.VP_STATE_SIZE));
  argument.setUint8(abi.VP_STATE.type, type);
  argument.setUint32(abi.VP_STATE.bufferSize, buffer.length, true);
  argument.setBigUint64(abi.VP_STATE.buffer, buffer.address, true);
  const result = vmm.kernel.ioctlBufferRaw(vps[vp], request, new Uint8Array(argument.buffer));
  return [result, argument.getUint32(abi.VP_STATE.bufferSize, true)];
}

whole('a frozen partition', () => {
  test('its reference time stands still, and can be set then alone', () => {
    start(1);
    expect(vmm.setProperty(REFERENCE_TIME, 5n)).toBe(HV_STATUS.INVALID_PARTITION_STATE);
    expect(vmm.setProperty(TIME_FREEZE, 1n)).toBe(0);
    const stood = property(REFERENCE_TIME);
    expect([property(REFERENCE_TIME), register(0, abi.HV_REGISTER.TIME_REF_COUNT)]).toEqual([stood, stood]);
    expect(vmm.setProperty(REFERENCE_TIME, 1_000_000_000n)).toBe(0);
    expect(property(REFERENCE_TIME)).toBe(1_000_000_000n);
    expect(vmm.setProperty(TIME_FREEZE, 0n)).toBe(0);
    const on = property(REFERENCE_TIME);
    expect(on).toBeGreaterThanOrEqual(1_000_000_000n);
    // A minute later at most.
    expect(on).toBeLessThan(1_600_000_000n);
  });

  test("its local APICs' timers stand still, and go on from there", () => {
    start(1);
    const page = vmm.kernel.map({ length: PAGE, shared: false });
    const apic = new DataView(page.view(0, PAGE));
    const { MSHV_GET_VP_STATE, MSHV_SET_VP_STATE } = abi;
    const at = abi.LAPIC_STATE;
    const count = () => {
      expect(vpState(0, MSHV_GET_VP_STATE, MSHV_VP_STATE.LAPIC, page.handle)).toEqual([0, PAGE]);
      return apic.getUint32(at.apic_counter_value, true);
    };
    expect(vmm.setProperty(TIME_FREEZE, 1n)).toBe(0);
    count();
    apic.setUint32(at.apic_spurious, 0x1ff, true);
    apic.setUint32(at.apic_lvt_timer, 0x40, true);
    apic.setUint32(at.apic_divide_configuration, 0xb, true);
    apic.setUint32(at.apic_initial_count, 4_000_000_000, true);
    apic.setUint32(at.apic_counter_value, 3_000_000_000, true);
    expect(vpState(0, MSHV_SET_VP_STATE, MSHV_VP_STATE.LAPIC, page.handle)).toEqual([0, PAGE]);
    expect([count(), count()]).toEqual([3_000_000_000, 3_000_000_000]);
    expect(vmm.setProperty(TIME_FREEZE, 0n)).toBe(0);
    const running = count();
    expect(running).toBeLessThanOrEqual(3_000_000_000);
    while (count() >= running);
    expect(vmm.setProperty(TIME_FREEZE, 1n)).toBe(0);
    const stood = count();
    expect(stood).toBeLessThan(running);
    expect([count(), apic.getUint32(at.apic_initial_count, true)]).toEqual([stood, 4_000_000_000]);
    page.unmap();
  });
});

whole('the synthetic interrupt controller', () => {
  test('its registers, pages and timers are kept, each VP has its own', () => {
    start(2);
    const { SINT0, SIMP: PAGE_ADDRESS } = abi.HV_REGISTER;
    // Masked, as after a reset.
    expect([register(1, SINT0 + 3), register(1, PAGE_ADDRESS)]).toEqual([0x1_0000n, 0n]);
    setRegister(1, SINT0 + 3, 0x41n);
    setRegister(1, PAGE_ADDRESS, 0x7001n);
    expect([register(1, SINT0 + 3), register(1, PAGE_ADDRESS)]).toEqual([0x41n, 0x7001n]);
    expect([register(0, SINT0 + 3), register(0, PAGE_ADDRESS)]).toEqual([0x1_0000n, 0n]);
    const page = vmm.kernel.map({ length: PAGE, shared: false });
    const bytes = new Uint8Array(page.view(0, PAGE));
    const { MSHV_GET_VP_STATE, MSHV_SET_VP_STATE } = abi;
    const { SIMP, SIEFP, SYNTHETIC_TIMERS } = MSHV_VP_STATE;
    for (const type of [SIMP, SIEFP, SYNTHETIC_TIMERS]) {
      const size = type === SYNTHETIC_TIMERS ? abi.SYNTHETIC_TIMERS_STATE_SIZE : PAGE;
      bytes.fill(0x10 + type);
      expect(vpState(1, MSHV_SET_VP_STATE, type, page.handle)).toEqual([0, size]);
    }
    for (const type of [SIMP, SIEFP, SYNTHETIC_TIMERS]) {
      const size = type === SYNTHETIC_TIMERS ? abi.SYNTHETIC_TIMERS_STATE_SIZE : PAGE;
      bytes.fill(0xff);
      vpState(1, MSHV_GET_VP_STATE, type, page.handle);
      expect([bytes[0], bytes[size - 1]]).toEqual([0x10 + type, 0x10 + type]);
      vpState(0, MSHV_GET_VP_STATE, type, page.handle);
      expect(bytes[0]).toBe(0);
    }
    page.unmap();
  });

  test('a type that there is not, and a buffer of no whole pages', () => {
    start(1);
    const page = vmm.kernel.map({ length: PAGE, shared: false });
    const { address } = page.handle;
    const get = (type: number, at: bigint, length: number) =>
      vpState(0, abi.MSHV_GET_VP_STATE, type, { address: at, length })[0];
    expect(get(MSHV_VP_STATE.SIMP, address, PAGE)).toBe(0);
    expect(get(5, address, PAGE)).toBe(-EINVAL);
    expect(get(MSHV_VP_STATE.SIMP, address, 100)).toBe(-EINVAL);
    expect(get(MSHV_VP_STATE.SIMP, address + 8n, PAGE)).toBe(-EINVAL);
    page.unmap();
  });
});
