/** The simulated /dev/mshv refuses what the driver refuses, with its errno, and delivers interrupts as its messages say. */
import fs from 'node:fs';
import { afterEach, describe, expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { SystemError } from '../../../src/sys/host-kernel.js';
import { assemble, BareVmm, MEMORY_SIZE, type VmmOptions } from '../../support/mshv/bare-vmm.js';

const whole = fs.existsSync('/dev/kvm') ? describe : describe.skip;
const { HV_STATUS, HVMSG } = abi;
const PAGE = abi.MSHV_HV_PAGE_SIZE;

let vmm: BareVmm;
let vps: number[] = [];
afterEach(() => {
  vmm.close(vps);
  vps = [];
});

function start(options?: VmmOptions): void {
  vmm = new BareVmm(options);
}

function newVp(index = 0): number {
  const fd = vmm.createVp(index);
  vps.push(fd);
  return fd;
}

/** The errno's name, or the result. */
function outcome(call: () => unknown): unknown {
  try {
    return call();
  } catch (error) {
    if (error instanceof SystemError) return error.code;
    throw error;
  }
}

/** A structure of 32-bit words and where a value is not a word, of bytes. */
const words = (...values: number[]) => new Uint8Array(Uint32Array.from(values).buffer);

whole('creation', () => {
  test('arguments and order', () => {
    start({ initialize: false });
    const create = (...values: number[]) =>
      outcome(() => vmm.kernel.ioctlBuffer(vmm.device, abi.MSHV_CREATE_PARTITION, words(...values)));
    expect(create(1 << 6, 0, 0, 0)).toBe('EINVAL');
    expect(create(0, 1, 0, 0)).toBe('EINVAL');
    expect(create(1, 0, 1, 0)).toBe('EINVAL');
    // The newer structure: one bank too few, and something reserved.
    expect(create(1 << 3, 0, 0, 0, 1, ...Array.from({ length: 11 }, () => 0))).toBe('EINVAL');
    expect(create(1 << 3, 0, 0, 0, 2 | (1 << 16), ...Array.from({ length: 11 }, () => 0))).toBe('EINVAL');
    expect(create(1 << 3, 0, 0, 0)).toBe('EFAULT');
    expect(outcome(() => vmm.createVp(0))).toBe('EIO');
    const map = () =>
      outcome(() => {
        vmm.mapMemory(0, MEMORY_SIZE, vmm.memory.handle.address);
      });
    expect(map()).toBe('EIO');
    expect(vmm.kernel.ioctl(vmm.partition, abi.MSHV_INITIALIZE_PARTITION)).toBe(0);
    expect(vmm.kernel.ioctl(vmm.partition, abi.MSHV_INITIALIZE_PARTITION)).toBe(0);
    expect(map()).toBeUndefined();
    const vp = newVp();
    expect(outcome(() => vmm.createVp(0))).toBe('EEXIST');
    expect(outcome(() => vmm.createVp(abi.MAX_VPS))).toBe('EINVAL');
    for (const fd of [vmm.device, vmm.partition, vp]) {
      expect(outcome(() => vmm.kernel.ioctl(fd, 0xb8ff))).toBe('ENOTTY');
    }
    expect(outcome(() => vmm.kernel.ioctl(vmm.partition, abi.MSHV_RUN_VP))).not.toBe(0);
  });

  test('early properties are refused once the partition is initialized', () => {
    start();
    const { SYNTHETIC_PROC_FEATURES, TIME_FREEZE, UNIMPLEMENTED_MSR_ACTION } = abi.HV_PARTITION_PROPERTY;
    expect(vmm.setProperty(SYNTHETIC_PROC_FEATURES, 1n)).toBe(HV_STATUS.INVALID_PARTITION_STATE);
    expect(vmm.setProperty(TIME_FREEZE, 1n)).toBe(0);
    expect(vmm.setProperty(UNIMPLEMENTED_MSR_ACTION, 2n)).toBe(HV_STATUS.PROPERTY_VALUE_OUT_OF_RANGE);
    expect(vmm.setProperty(0x1234, 0n)).toBe(HV_STATUS.UNKNOWN_PROPERTY);
  });

  test('each processor has a counter of its own, and TIME_FREEZE stops and starts them together', () => {
    start();
    const { TIME_FREEZE } = abi.HV_PARTITION_PROPERTY;
    const counter = (vp: number) => vmm.get(vp, vps[vp], 'TSC');
    const read = () => vps.map((_, vp) => counter(vp));
    const later = (than: bigint) => {
      while (counter(0) < than);
    };
    newVp(0);
    newVp(1);
    later(1000n);
    vmm.set(1, vps[1], { TSC: 0n });
    // The second lags from now on by what the first had counted: it is less also where a busy host lets time pass between the two.
    const second = counter(1);
    const first = counter(0);
    later(first + 1_000_000n);
    const secondLater = counter(1);
    const firstLater = counter(0);
    expect(second).toBeLessThan(first);
    expect(firstLater - first).toBeGreaterThan(1_000_000n);
    expect(secondLater).toBeLessThan(firstLater);
    expect(vmm.setProperty(TIME_FREEZE, 1n)).toBe(0);
    const frozen = read();
    expect(frozen[1]).toBeLessThan(frozen[0]);
    newVp(2);
    expect(read()).toEqual([...frozen, frozen[0]]);
    vmm.set(2, vps[2], { TSC: 12_345n });
    expect(read()).toEqual([...frozen, 12_345n]);
    expect(vmm.setProperty(TIME_FREEZE, 0n)).toBe(0);
    later(frozen[0] + 1_000_000n);
    const [thawed, , third] = read();
    expect(third - 12_345n).toBeGreaterThanOrEqual(1_000_000n);
    // Both went on at the same moment: the third was read later.
    expect(third - 12_345n).toBeGreaterThanOrEqual(thawed - frozen[0]);
  });

  test('a closed partition makes room for another', () => {
    for (let round = 0; round < 6; round++) {
      start();
      newVp();
      if (round === 5) break;
      vmm.close(vps);
      vps = [];
    }
  });
});

whole('memory', () => {
  test('regions', () => {
    start();
    const user = vmm.memory.handle.address;
    const other = vmm.kernel.map({ length: 4 * PAGE, shared: true });
    const map = (guest: number, size: number, address: bigint, flags = 3, reserved = 0) =>
      outcome(() => {
        vmm.mapMemory(guest, size, address, flags, reserved);
      });
    const at = other.handle.address;
    expect(map(0x40_0000, 0, at)).toBe('EINVAL');
    expect(map(0x40_0000, 100, at)).toBe('EINVAL');
    expect(map(0x40_0000, PAGE, at + 8n)).toBe('EINVAL');
    expect(map(0x40_0000, PAGE, at, 8)).toBe('EINVAL');
    expect(map(0x40_0000, PAGE, at, 3, 1)).toBe('EINVAL');
    expect(map(0x40_0000, PAGE, 0x1000n)).toBe('EINVAL');
    expect(map(MEMORY_SIZE - PAGE, 2 * PAGE, at)).toBe('EEXIST');
    expect(map(0x40_0000, PAGE, user)).toBe('EEXIST');
    expect(map(0x40_0000, 4 * PAGE, at)).toBeUndefined();
    const unmap = 1 << abi.MSHV_SET_MEM_BIT.UNMAP;
    expect(map(0x40_0000, PAGE, at, unmap)).toBe('EINVAL');
    expect(map(0x40_0000, 4 * PAGE, at, unmap)).toBeUndefined();
    expect(map(0x40_0000, 4 * PAGE, at, unmap)).toBe('EINVAL');
    expect(map(0x40_0000, 4 * PAGE, at)).toBeUndefined();
    map(0x40_0000, 4 * PAGE, at, unmap);
    other.unmap();
  });

  test('a write to read-only memory is another message, and dirty pages are told', () => {
    start();
    const readOnly = vmm.kernel.map({ length: PAGE, shared: true });
    vmm.mapMemory(0x40_0000, PAGE, readOnly.handle.address, 0);
    expect(vmm.setProperty(abi.HV_PARTITION_PROPERTY.GPA_PAGE_ACCESS_TRACKING, 1n)).toBe(0);
    const bits = vmm.kernel.map({ length: PAGE, shared: false });
    const argument = new DataView(new ArrayBuffer(abi.GPAP_BITMAP_SIZE));
    argument.setUint8(abi.GPAP_BITMAP.type, abi.MSHV_GPAP_ACCESS_TYPE.DIRTY);
    argument.setUint8(abi.GPAP_BITMAP.operation, abi.MSHV_GPAP_ACCESS_OP.CLEAR);
    argument.setBigUint64(abi.GPAP_BITMAP.pageCount, 16n, true);
    argument.setBigUint64(abi.GPAP_BITMAP.bitmap, bits.handle.address, true);
    const dirty = () => {
      vmm.kernel.ioctlBuffer(vmm.partition, abi.MSHV_GET_GPAP_ACCESS_BITMAP, new Uint8Array(argument.buffer));
      return new DataView(bits.view(0, 2)).getUint16(0, true);
    };
    const vp = newVp();
    vmm.enter(0, vp, 32);
    vmm.load(assemble(32, 'mov ds:0x5000, eax\nmov eax, ds:0x400000\nmov ds:0x400000, eax'));
    expect(dirty()).toBe(0);
    expect(vmm.run(vp)).toBe(HVMSG.GPA_INTERCEPT);
    expect(vmm.message.getBigUint64(abi.MEMORY_MESSAGE.guestPhysicalAddress, true)).toBe(0x40_0000n);
    expect(dirty() & (1 << 5)).not.toBe(0);
    expect(dirty() & (1 << 5)).toBe(0);
    argument.setUint8(abi.GPAP_BITMAP.operation, abi.MSHV_GPAP_ACCESS_OP.NOOP);
    expect(dirty() & (1 << 5)).toBe(0);
    argument.setUint8(abi.GPAP_BITMAP.operation, abi.MSHV_GPAP_ACCESS_OP.CLEAR);
    expect(dirty()).toBe(0xffff);
    argument.setUint8(abi.GPAP_BITMAP.operation, 3);
    expect(outcome(dirty)).toBe('EINVAL');
    readOnly.unmap();
    bits.unmap();
  });
});

whole('hypercalls', () => {
  test('arguments', () => {
    start();
    const vp = newVp();
    const raw = (change: (view: DataView) => void, fd = vmm.partition) => {
      const view = new DataView(new ArrayBuffer(abi.ROOT_HVCALL_SIZE));
      view.setUint16(abi.ROOT_HVCALL.code, abi.HVCALL.GET_PARTITION_PROPERTY, true);
      view.setUint16(abi.ROOT_HVCALL.inSize, 16, true);
      view.setBigUint64(abi.ROOT_HVCALL.inPointer, vmm.memory.handle.address, true);
      change(view);
      return outcome(() => vmm.kernel.ioctlBuffer(fd, abi.MSHV_ROOT_HVCALL, new Uint8Array(view.buffer)));
    };
    expect(raw((view) => view.setUint16(abi.ROOT_HVCALL.status, 1, true))).toBe('EINVAL');
    expect(raw((view) => view.setUint8(abi.ROOT_HVCALL.status + 3, 1))).toBe('EINVAL');
    expect(raw((view) => view.setUint16(abi.ROOT_HVCALL.inSize, 4, true))).toBe('EINVAL');
    expect(raw((view) => view.setUint16(abi.ROOT_HVCALL.inSize, 4097, true))).toBe('EINVAL');
    expect(raw((view) => view.setBigUint64(abi.ROOT_HVCALL.inPointer, 0n, true))).toBe('EINVAL');
    expect(raw((view) => view.setBigUint64(abi.ROOT_HVCALL.inPointer, 1n << 63n, true))).toBe('EFAULT');
    expect(raw((view) => view.setBigUint64(abi.ROOT_HVCALL.outPointer, 0x5000n, true))).toBe('EINVAL');
    expect(raw((view) => view.setUint16(abi.ROOT_HVCALL.code, 0x4e, true))).toBe('EINVAL');
    // Asynchronous calls are the partition's alone, and of the host's own partition little may be asked.
    const setProperty = (view: DataView) =>
      view.setUint16(abi.ROOT_HVCALL.code, abi.HVCALL.SET_PARTITION_PROPERTY, true);
    expect(raw(setProperty, vp)).toBe('EINVAL');
    expect(raw(setProperty, vmm.device)).toBe('EINVAL');
  });

  test('registers: what is not there ends the call with what was done', () => {
    start();
    const vp = newVp();
    vmm.set(0, vp, { RAX: 7n });
    expect(vmm.get(0, vp, 'RAX')).toBe(7n);
    vmm.clear();
    const at = abi.GET_VP_REGISTERS.names;
    vmm.input.setUint32(at, abi.HV_X64_REGISTER.RAX, true);
    vmm.input.setUint32(at + 4, 0xdead, true);
    const get = (vpIndex: number, size: number) => {
      vmm.input.setUint32(abi.GET_VP_REGISTERS.vpIndex, vpIndex, true);
      return vmm.hypercall(vp, abi.HVCALL.GET_VP_REGISTERS, size, 32, 2);
    };
    expect(get(0, 24)).toBe(HV_STATUS.INVALID_PARAMETER | (1 << 16));
    expect(get(0, 20)).toBe(HV_STATUS.INVALID_HYPERCALL_INPUT);
    expect(get(5, 24)).toBe(HV_STATUS.INVALID_VP_INDEX);
  });

  test('CPUID: the hypervisor is there, and results that are registered replace its own', () => {
    start();
    const vp = newVp();
    const ask = (leaf: number, flags: number) => {
      vmm.clear();
      vmm.input.setUint32(abi.GET_VP_CPUID_VALUES.flags, flags, true);
      vmm.input.setUint32(abi.GET_VP_CPUID_VALUES.leaves, leaf, true);
      expect(vmm.hypercall(vp, abi.HVCALL.GET_VP_CPUID_VALUES, 48, 16, 1)).toBe(1 << 16);
      return [0, 4, 8, 12].map((word) => vmm.output.getUint32(word, true));
    };
    expect(ask(1, 0)[2] >>> 31).toBe(1);
    vmm.clear();
    const at = abi.CPUID_RESULT;
    vmm.input.setUint32(at.interceptType, abi.HV_INTERCEPT_TYPE.X64_CPUID, true);
    vmm.input.setUint32(at.eaxIn, 0x4fff_0000, true);
    vmm.input.setUint32(at.ebx, 0x1234_5678, true);
    vmm.input.setUint32(at.ebxMask, 0xffff, true);
    expect(vmm.hypercall(vp, abi.HVCALL.REGISTER_INTERCEPT_RESULT, abi.CPUID_RESULT_SIZE)).toBe(0);
    expect(ask(0x4fff_0000, 0)).toEqual([0, 0, 0, 0]);
    expect(ask(0x4fff_0000, abi.CPUID_VALUES_APPLY_REGISTERED_VALUES)).toEqual([0, 0x5678, 0, 0]);
    vmm.enter(0, vp, 32);
    vmm.load(assemble(32, 'mov eax, 0x4fff0000\ncpuid\nout 0x10, al'));
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    expect(vmm.get(0, vp, 'RBX')).toBe(0x5678n);
  });
});

whole('interrupts', () => {
  test('routes, irqfds and ioeventfds', () => {
    start();
    const { kernel, partition } = vmm;
    const route = (...values: number[]) =>
      outcome(() => kernel.ioctlBuffer(partition, abi.MSHV_SET_MSI_ROUTING, words(...values)));
    expect(route(0, 1)).toBe('EINVAL');
    expect(route(1, 0, 4096, 0xfee0_0000, 0, 0x30)).toBe('EINVAL');
    expect(route(1, 0, 1, 0xfee0_0000, 1, 0x30)).toBe('EINVAL');
    expect(route(2, 0, 1, 0xfee0_0000, 0, 0x30, 1, 0xfee0_0000, 0, 0x31)).toBe('EINVAL');
    expect(route(5000, 0)).toBe('EINVAL');
    expect(route(2, 0, 1, 0xfee0_0000, 0, 0x30, 2, 0xfee0_0000, 0, 0x8031)).toBe(0);
    const event = kernel.eventfd();
    const irqfd = (fd: number, resample: number, gsi: number, flags: number) =>
      outcome(() => kernel.ioctlBuffer(partition, abi.MSHV_IRQFD, words(fd, resample, gsi, flags)));
    expect(irqfd(event, 0, 1, 4)).toBe('EINVAL');
    expect(irqfd(9999, 0, 1, 0)).toBe('EBADF');
    expect(irqfd(vmm.device, 0, 1, 0)).toBe('EINVAL');
    expect(irqfd(event, event, 1, 2)).toBe('EINVAL');
    expect(irqfd(event, 0, 1, 0)).toBe(0);
    expect(irqfd(event, 0, 2, 0)).toBe('EBUSY');
    expect(irqfd(event, 0, 1, 1)).toBe(0);
    const doorbell = (address: number, length: number, fd: number, flags: number, reserved = 0) =>
      outcome(() =>
        kernel.ioctlBuffer(partition, abi.MSHV_IOEVENTFD, words(0, 0, address, 0, length, fd, flags, reserved)),
      );
    expect(doorbell(0xd000_0000, 4, event, 2)).toBe('EOPNOTSUPP');
    expect(doorbell(0xd000_0000, 4, event, 8)).toBe('EINVAL');
    expect(doorbell(0xd000_0000, 4, event, 0, 1)).toBe('EINVAL');
    expect(doorbell(0xd000_0000, 3, event, 0)).toBe('EINVAL');
    expect(doorbell(0xd000_0000, 4, event, 0)).toBe(0);
    expect(doorbell(0xd000_0000, 4, event, 0)).toBe('EEXIST');
    const vp = newVp();
    vmm.enter(0, vp, 32);
    vmm.load(assemble(32, 'mov ds:0xd0000000, eax\nout 0x10, al'));
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    expect(kernel.drainEvent(event)).toBe(true);
    expect(doorbell(0xd000_0000, 4, event, 4)).toBe(0);
    expect(doorbell(0xd000_0000, 4, event, 4)).toBe('ENOENT');
    kernel.close(event);
  });

  test('a level-triggered interrupt is delivered, and its end is told', () => {
    start();
    const vp = newVp();
    const view = new DataView(vmm.bytes.buffer, vmm.bytes.byteOffset, vmm.bytes.length);
    // Flat code at selector 8; the gate of vector 0x40 leads to 0x1800.
    view.setBigUint64(0x2808, 0x00cf_9b00_0000_ffffn, true);
    view.setBigUint64(0x2000 + 0x40 * 8, 0x0000_8e00_0008_1800n, true);
    vmm.enter(0, vp, 32);
    const table = (base: bigint, limit: bigint) => [limit << 48n, base] as const;
    expect(vmm.set(0, vp, { IDTR: table(0x2000n, 0x7ffn), GDTR: table(0x2800n, 15n) })).toBe(2 << 16);
    vmm.load(assemble(32, 'mov dword ptr ds:0xfee000f0, 0x1ff\nout 0x10, al\nsti\n1: pause\njmp 1b'));
    vmm.bytes.set(assemble(32, 'out 0x40, al\nmov dword ptr ds:0xfee000b0, 0\nout 0x41, al'), 0x1800);
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    vmm.skipPort(0, vp);
    const raise = (type: number, flags: number, vector: number) => {
      vmm.clear();
      vmm.input.setUint32(abi.ASSERT_INTERRUPT.interruptType, type, true);
      vmm.input.setUint32(abi.ASSERT_INTERRUPT.controlFlags, flags, true);
      vmm.input.setUint32(abi.ASSERT_INTERRUPT.vector, vector, true);
      return vmm.hypercall(vmm.partition, abi.HVCALL.ASSERT_VIRTUAL_INTERRUPT, abi.ASSERT_INTERRUPT_SIZE);
    };
    expect(raise(0, 1, 5)).toBe(HV_STATUS.INVALID_PARAMETER);
    expect(raise(3, 0, 0x40)).toBe(HV_STATUS.INVALID_PARAMETER);
    expect(raise(0, 4, 0x40)).toBe(HV_STATUS.INVALID_PARAMETER);
    expect(raise(0, abi.INTERRUPT_LEVEL_TRIGGERED, 0x40)).toBe(0);
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    expect(vmm.message.getUint16(abi.IO_PORT_MESSAGE.port, true)).toBe(0x40);
    vmm.skipPort(0, vp);
    expect(vmm.run(vp)).toBe(HVMSG.X64_APIC_EOI);
    expect(vmm.message.getUint32(abi.APIC_EOI_MESSAGE.vector, true)).toBe(0x40);
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    expect(vmm.message.getUint16(abi.IO_PORT_MESSAGE.port, true)).toBe(0x41);
  });
});

whole('processors', () => {
  test('pages to be mapped, and what the register page takes back', () => {
    start();
    const vp = newVp();
    const map = (page: number, length = PAGE) => vmm.kernel.map({ fd: vp, length, offset: page * PAGE, shared: true });
    expect(outcome(() => map(abi.MSHV_VP_MMAP_OFFSET.GHCB))).toBe('ENODEV');
    expect(outcome(() => map(3))).toBe('EINVAL');
    const page = new DataView(map(abi.MSHV_VP_MMAP_OFFSET.REGISTERS).view(0, PAGE));
    const message = new Uint8Array(map(abi.MSHV_VP_MMAP_OFFSET.INTERCEPT_MESSAGE).view(0, PAGE));
    vmm.enter(0, vp, 32, { RAX: 0x55n });
    vmm.load(assemble(32, 'out 0x10, al\nout 0x11, al\nout 0x12, al'));
    expect(page.getUint8(abi.REGISTER_PAGE.isValid)).toBe(0);
    vmm.run(vp);
    expect(Buffer.compare(message.subarray(0, 256), new Uint8Array(vmm.message.buffer))).toBe(0);
    expect(page.getUint8(abi.REGISTER_PAGE.isValid)).toBe(1);
    expect(page.getBigUint64(abi.REGISTER_PAGE.generalRegisters, true)).toBe(0x55n);
    const rip = page.getBigUint64(abi.REGISTER_PAGE.rip, true);
    page.setBigUint64(abi.REGISTER_PAGE.rip, rip + 2n, true);
    page.setBigUint64(abi.REGISTER_PAGE.generalRegisters, 0x66n, true);
    page.setUint32(abi.REGISTER_PAGE.dirty, 1 << abi.HV_X64_REGISTER_CLASS.IP, true);
    vmm.run(vp);
    expect(vmm.message.getUint16(abi.IO_PORT_MESSAGE.port, true)).toBe(0x11);
    expect(vmm.message.getBigUint64(abi.IO_PORT_MESSAGE.rax, true)).toBe(0x55n);
    page.setBigUint64(abi.REGISTER_PAGE.generalRegisters, 0x77n, true);
    page.setBigUint64(abi.REGISTER_PAGE.rip, rip + 4n, true);
    const { IP, GENERAL } = abi.HV_X64_REGISTER_CLASS;
    page.setUint32(abi.REGISTER_PAGE.dirty, (1 << IP) | (1 << GENERAL), true);
    vmm.run(vp);
    expect(vmm.message.getUint16(abi.IO_PORT_MESSAGE.port, true)).toBe(0x12);
    expect(vmm.message.getBigUint64(abi.IO_PORT_MESSAGE.rax, true)).toBe(0x77n);
    expect(vmm.kernel.mshv.counters(vmm.partition).X64_IO_PORT_INTERCEPT).toBe(3);
  });

  test('state buffers are whole pages', () => {
    start();
    const vp = newVp();
    const buffer = vmm.memory.handle.address;
    const state = (type: number, size: number, address: bigint, request: number = abi.MSHV_GET_VP_STATE) => {
      const view = new DataView(new ArrayBuffer(abi.VP_STATE_SIZE));
      view.setUint32(0, type, true);
      view.setUint32(abi.VP_STATE.bufferSize, size, true);
      view.setBigUint64(abi.VP_STATE.buffer, address, true);
      return outcome(() => vmm.kernel.ioctlBuffer(vp, request, new Uint8Array(view.buffer)));
    };
    expect(state(5, PAGE, buffer)).toBe('EINVAL');
    expect(state(0x100, PAGE, buffer)).toBe('EINVAL');
    expect(state(0, 1024, buffer)).toBe('EINVAL');
    expect(state(0, PAGE, buffer + 8n)).toBe('EINVAL');
    expect(state(0, PAGE, 1n << 62n)).toBe('EFAULT');
    for (const type of [0, 2, 3, 4]) expect([type, state(type, PAGE, buffer)]).toEqual([type, 0]);
    expect(state(0, PAGE, buffer)).toBe(0);
    expect(state(0, PAGE, buffer, abi.MSHV_SET_VP_STATE)).toBe(0);
  });

  test('an unknown MSR faults, is ignored or comes to the VMM', () => {
    start();
    const vp = newVp();
    vmm.load(assemble(32, 'mov ecx, 0x12345\nrdmsr\nout 0x10, al'));
    vmm.enter(0, vp, 32);
    // A fault without an interrupt table ends the processor.
    expect(vmm.run(vp)).toBe(HVMSG.UNRECOVERABLE_EXCEPTION);
    vmm.close(vps);
    vps = [];
    start();
    const second = newVp();
    vmm.setProperty(abi.HV_PARTITION_PROPERTY.UNIMPLEMENTED_MSR_ACTION, 1n);
    vmm.enter(0, second, 32, { RAX: 9n, RDX: 8n });
    vmm.load(assemble(32, 'mov ecx, 0x12345\nrdmsr\nout 0x10, al\nrdmsr'));
    expect(vmm.run(second)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    expect(vmm.message.getBigUint64(abi.IO_PORT_MESSAGE.rax, true)).toBe(0n);
    vmm.skipPort(0, second, { RAX: 9n, RDX: 8n });
    vmm.clear();
    vmm.input.setUint32(abi.INSTALL_INTERCEPT.accessType, abi.HV_INTERCEPT_ACCESS_MASK.READ, true);
    vmm.input.setUint32(abi.INSTALL_INTERCEPT.interceptType, abi.HV_INTERCEPT_TYPE.X64_MSR, true);
    expect(vmm.hypercall(vmm.partition, abi.HVCALL.INSTALL_INTERCEPT, abi.INSTALL_INTERCEPT_SIZE)).toBe(0);
    expect(vmm.run(second)).toBe(HVMSG.X64_MSR_INTERCEPT);
    expect(vmm.message.getUint32(abi.MSR_MESSAGE.number, true)).toBe(0x1_2345);
    expect(vmm.message.getBigUint64(abi.INTERCEPT.rip, true)).toBe(0x1009n);
    expect(vmm.get(0, second, 'RAX')).toBe(9n);
    expect(vmm.get(0, second, 'RDX')).toBe(8n);
  });
});
