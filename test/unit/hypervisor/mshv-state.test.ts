/** The record of a VP and of a partition of the Microsoft hypervisor: what is in it, in which order it is set, and what is refused. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { HypervisorError } from '../../../src/hypervisor/hypervisor.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { setAhead } from '../../../src/hypervisor/mshv/clocks.js';
import { HYPERCALL_PAGES_SIZE, Hypercalls } from '../../../src/hypervisor/mshv/hypercalls.js';
import { loadPartition, savePartition } from '../../../src/hypervisor/mshv/saved-partition.js';
import { VCPU_STATE_VERSION, type X86VcpuState, type X86VmState } from '../../../src/hypervisor/saved-state.js';
import { MshvDriver, vpOf } from '../../support/mshv-driver.js';

const R = abi.HV_X64_REGISTER;
const H = abi.HV_REGISTER;
const { LAPIC, XSAVE, SIMP, SIEFP, SYNTHETIC_TIMERS } = abi.MSHV_VP_STATE;
const PAGE = abi.MSHV_HV_PAGE_SIZE;
const { PROCESSOR_CLOCK_FREQUENCY, REFERENCE_TIME } = abi.HV_PARTITION_PROPERTY;
const HZ = 2_400_000_000n;
/** Of struct hv_local_interrupt_controller_state. */
const IRR = abi.LAPIC_STATE.apic_irr;

/** A processor in which every register and part has something of its own. */
function full(): MshvDriver {
  const driver = new MshvDriver();
  driver.properties.set(PROCESSOR_CLOCK_FREQUENCY, HZ);
  for (const name of [...Object.values(R), ...Object.values(H)]) driver.registers.set(name, [BigInt(name) << 8n, 0n]);
  for (const [first, count] of [
    [H.SINT0, 16],
    [R.MSR_MTRR_PHYS_BASE0, 8],
    [R.MSR_MTRR_PHYS_MASK0, 8],
    [R.MSR_MTRR_FIX4KC0000, 8],
  ]) {
    for (let name = first; name < first + count; name++) driver.registers.set(name, [BigInt(name) << 8n, 0n]);
  }
  for (const name of [R.ES, R.CS, R.SS, R.DS, R.FS, R.GS, R.LDTR, R.TR]) {
    driver.registers.set(name, [BigInt(name), 0xa09b_0008_ffff_ffffn]);
  }
  for (const name of [R.GDTR, R.IDTR]) driver.registers.set(name, [0x7fn << 48n, BigInt(name)]);
  driver.registers.set(H.PENDING_EVENT0, [0n, 0n]);
  driver.registers.set(H.INTERNAL_ACTIVITY_STATE, [2n, 0n]);
  const filled = (size: number, value: number) => new Uint8Array(size).fill(value);
  driver.parts.set(LAPIC, filled(PAGE, 0)).set(SIMP, filled(PAGE, 3)).set(SIEFP, filled(PAGE, 4));
  driver.parts.get(LAPIC)!.set([7], abi.LAPIC_STATE.apic_id);
  driver.parts.get(LAPIC)!.set([0x34, 0x12], abi.LAPIC_STATE.apic_initial_count);
  driver.parts.get(LAPIC)!.set([9], abi.LAPIC_STATE.apic_error_status);
  driver.parts.set(SYNTHETIC_TIMERS, filled(abi.SYNTHETIC_TIMERS_STATE_SIZE, 5));
  // The compacted form.
  driver.parts.set(XSAVE, filled(driver.xsaveSize, 0x86));
  return driver;
}

function fresh(): MshvDriver {
  const driver = new MshvDriver();
  driver.properties.set(PROCESSOR_CLOCK_FREQUENCY, HZ);
  return driver;
}

/** What a driver refuses, or takes, as one line. */
function refusal(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(HypervisorError);
    const { message } = error as Error;
    expect(message).not.toContain('\n');
    return message;
  }
  return 'taken';
}

test('another VP becomes the same', () => {
  const one = full();
  const state = vpOf(one).save();
  const other = fresh();
  vpOf(other).load(state);
  // All but those that tell or do something when they are touched, or are the partition's.
  const left = [
    ...[H.EXPLICIT_SUSPEND, H.INTERCEPT_SUSPEND, H.DISPATCH_SUSPEND, H.DELIVERABILITY_NOTIFICATIONS],
    ...[H.HYPERVISOR_VERSION, H.VP_RUNTIME, H.VP_INDEX, H.TIME_REF_COUNT, R.INITIAL_APIC_ID, R.MSR_MTRR_CAP],
    ...[H.GUEST_OS_ID, H.REFERENCE_TSC, R.HYPERCALL, R.PENDING_DEBUG_EXCEPTION, R.MSR_IA32_MISC_ENABLE],
    // In the XSAVE area.
    ...Array.from({ length: R.XMM_CONTROL_STATUS - R.XMM0 + 1 }, (_, index) => R.XMM0 + index),
  ];
  for (const name of left) one.registers.delete(name);
  expect([...other.registers].sort()).toEqual([...one.registers].sort());
  expect([...other.parts].sort()).toEqual([...one.parts].sort());
  expect(state).toMatchObject({ activity: 'halted', tsc: BigInt(R.TSC) << 8n, tscKhz: 2_400_000 });
  expect(vpOf(other).save()).toEqual(state);
});

test('modes come before what depends on them, and the counter last', () => {
  const driver = fresh();
  vpOf(driver).load(vpOf(full()).save());
  const place = (what: string) => {
    const at = driver.set.indexOf(what);
    expect([what, at]).not.toEqual([what, -1]);
    return at;
  };
  expect(place(`register ${R.APIC_BASE}`)).toBeLessThan(place(`part ${LAPIC}`));
  expect(place(`register ${R.XFEM}`)).toBeLessThan(place(`part ${XSAVE}`));
  expect(place(`register ${R.U_XSS}`)).toBeLessThan(place(`part ${XSAVE}`));
  expect(place(`register ${H.SIMP}`)).toBeLessThan(place(`part ${SIMP}`));
  expect(place(`part ${SIMP}`)).toBeLessThan(place(`part ${SYNTHETIC_TIMERS}`));
  expect(place(`register ${R.TSC_ADJUST}`)).toBeLessThan(place(`register ${R.TSC}`));
  expect(driver.set.at(-1)).toBe(`register ${R.TSC}`);
});

test('what a processor does not have is not in its record', () => {
  const one = full();
  for (const name of [R.SSP, R.U_CET, R.SPEC_CTRL, R.TSC_ADJUST]) one.refused.add(name);
  const state = vpOf(one).save();
  expect(state.ssp).toBeUndefined();
  expect(state.msrs.map(({ index }) => index)).not.toContain(0x48);
  const other = fresh();
  for (const name of one.refused) other.refused.add(name);
  vpOf(other).load(state);
  other.refused.add(R.TSC_AUX);
  expect(refusal(() => vpOf(other).load(state))).toMatch(/refuses SET_VP_REGISTERS/);
});

test('registers that the hypervisor has not taken back from the page are newer', () => {
  const driver = full();
  const vcpu = vpOf(driver, (page) => {
    page.setUint8(abi.REGISTER_PAGE.isValid, 1);
    page.setUint32(abi.REGISTER_PAGE.dirty, 1 << abi.HV_X64_REGISTER_CLASS.IP, true);
    page.setBigUint64(abi.REGISTER_PAGE.generalRegisters, 0x11n, true);
    page.setBigUint64(abi.REGISTER_PAGE.generalRegisters + 3 * 8, 0x33n, true);
    page.setBigUint64(abi.REGISTER_PAGE.rip, 0x1234n, true);
  });
  expect(vcpu.save().registers).toMatchObject({ rax: 0x11n, rbx: 0x33n, rip: 0x1234n });
  expect(vcpu.registers()).toMatchObject({ rax: 0x11n, rbx: 0x33n, rip: 0x1234n });
});

test('interrupts that the driver has queued in the page are requests of the local APIC', () => {
  const driver = full();
  driver.parts.get(LAPIC)!.set([0xff], abi.LAPIC_STATE.apic_tmr + 8);
  // A count that cannot be takes no more than there is room for.
  const vcpu = vpOf(driver, (page) => {
    page.setUint8(abi.REGISTER_PAGE.interruptVectors, 200);
    for (let index = 1; index < 8; index++) page.setUint8(abi.REGISTER_PAGE.interruptVectors + index, 0x41);
    page.setUint8(abi.REGISTER_PAGE.interruptVectors + 7, 0xfe);
  });
  const state = vcpu.save();
  expect([state.localApic[0x220], state.localApic[0x273]]).toEqual([2, 0x40]);
  const other = fresh();
  vpOf(other).load(state);
  const apic = other.parts.get(LAPIC)!;
  expect([apic[IRR + 8], apic[IRR + 31], apic[abi.LAPIC_STATE.apic_tmr + 8]]).toEqual([2, 0x40, 0xfd]);
});

describe('events have their names', () => {
  const eventsWith = (registers: readonly (readonly [number, bigint, bigint?])[], nmi = false) => {
    const driver = full();
    for (const name of [H.PENDING_INTERRUPTION, H.INTERRUPT_STATE]) driver.registers.set(name, [0n, 0n]);
    for (const [name, low, high = 0n] of registers) driver.registers.set(name, [low, high]);
    if (nmi) driver.parts.get(LAPIC)!.set([4], IRR);
    const { events, localApic } = vpOf(driver).save();
    // No interrupt has the vector by which the hypervisor tells it.
    expect(localApic[0x200]).toBe(0);
    return events;
  };

  test('none', () => {
    expect(eventsWith([])).toMatchObject({
      exception: { pending: false, injected: false },
      interrupt: { injected: false, shadow: 0 },
      nmi: { injected: false, pending: false, masked: false },
    });
  });

  test('a page fault that is to come', () => {
    const { exception } = eventsWith([[H.PENDING_EVENT0, 0x0000_0006_000e_0101n, 0xdead_0000n]]);
    expect(exception).toEqual({
      ...{ pending: true, injected: false, vector: 14, hasErrorCode: true, errorCode: 6, payload: 0xdead_0000n },
    });
  });

  test('an exception, an interrupt and an NMI whose delivery has begun', () => {
    const interruption = (low: bigint) => eventsWith([[H.PENDING_INTERRUPTION, low]]);
    expect(interruption(0x0000_0018_000d_0017n).exception).toEqual({
      ...{ pending: false, injected: true, vector: 13, hasErrorCode: true, errorCode: 0x18, payload: undefined },
    });
    expect(interruption(0x0041_0001n).interrupt).toMatchObject({ injected: true, vector: 0x41, soft: false });
    expect(interruption(0x0080_0009n).interrupt).toMatchObject({ injected: true, vector: 0x80, soft: true });
    expect(interruption(0x0002_0005n).nmi.injected).toBe(true);
  });

  test('an NMI that is pending, and what is masked', () => {
    const { nmi, interrupt } = eventsWith([[H.INTERRUPT_STATE, 3n]], true);
    expect([nmi, interrupt.shadow]).toEqual([{ injected: false, pending: true, masked: true }, 1]);
  });

  test.each([
    [1n, 'wait-for-init'],
    [2n, 'halted'],
    [4n, 'halted'],
    [0n, 'running'],
  ])('activity %d is %s', (value, name) => {
    const driver = full();
    driver.registers.set(H.INTERNAL_ACTIVITY_STATE, [value, 0n]);
    expect(vpOf(driver).save().activity).toBe(name);
  });
});

describe('a record that cannot be is refused in a line', () => {
  const good = vpOf(full()).save();
  const { special, debug } = good;
  const changes: readonly (readonly [what: string, change: Partial<X86VcpuState>, line: RegExp])[] = [
    ['another hypervisor', { synthetic: undefined }, /not of the Microsoft hypervisor$/],
    ['a short XSAVE area', { xsave: good.xsave.subarray(8) }, /area of 824 bytes, and processors here have 832$/],
    ['no XSAVE area', { xsave: new Uint8Array(0) }, /impossible xsave$/],
    ['the standard form', { xsave: new Uint8Array(good.xsave.length) }, /not in the compacted form$/],
    ['another frequency', { tscKhz: 3_000_000 }, /ran at 3000000 kHz when it was saved, and runs at 2400000 kHz here$/],
    ['a large register', { registers: { ...good.registers, rip: 1n << 64n } }, /impossible rip$/],
    ['a negative one', { tsc: -1n }, /impossible tsc$/],
    ['a wide selector', { special: { ...special, cs: { ...special.cs, selector: 0x1_0000 } } }, /impossible cs$/],
    ['a fraction', { special: { ...special, gdt: { base: 0n, limit: 0.5 } } }, /impossible gdt$/],
    ['debug registers', { debug: { ...debug, addresses: [1n] } }, /impossible debug$/],
    ['an unknown MSR', { msrs: [{ index: 0x1234, value: 0n }] }, /MSR 0x1234 where it cannot be$/],
    ['an MSR twice', { msrs: [good.msrs[0], good.msrs[0]] }, /MSR 0x174 where it cannot be$/],
    ['too many', { msrs: Array.from({ length: 2000 }, () => good.msrs[0]) }, /impossible msrs$/],
    ['a short APIC', { localApic: new Uint8Array(8) }, /impossible localApic$/],
  ];

  test.each(changes)('%s', (_what, change, line) => {
    const driver = fresh();
    expect(refusal(() => vpOf(driver).load({ ...good, ...change }))).toMatch(line);
    expect(driver.set.filter((what) => what === `register ${R.TSC}`)).toEqual([]);
  });

  test('frequencies that NTP makes up for are the same', () => {
    vpOf(fresh()).load({ ...good, tscKhz: 2_400_500 });
    expect(refusal(() => vpOf(fresh()).load({ ...good, tscKhz: 2_400_700 }))).toMatch(/here$/);
  });

  test('whatever is in the form of its own, only registers that are saved are set', () => {
    const original = good.synthetic!;
    const reference = fresh();
    vpOf(reference).load(good);
    const allowed = new Set(reference.set);
    const driver = fresh();
    const vcpu = vpOf(driver);
    const change = fc.oneof(
      fc.uint8Array({ maxLength: 200 }),
      fc.nat(original.length).map((length) => original.slice(0, length)),
      fc.tuple(fc.nat(original.length - 1), fc.nat(255)).map(([at, byte]) => {
        const bytes = original.slice();
        bytes[at] = byte;
        return bytes;
      }),
      fc.uint8Array({ minLength: 1, maxLength: 50 }).map((more) => Uint8Array.from([...original, ...more])),
    );
    fc.assert(
      fc.property(change, (synthetic) => {
        driver.set.length = 0;
        refusal(() => {
          vcpu.load({ ...good, synthetic });
        });
        expect(driver.set.filter((what) => !allowed.has(what))).toEqual([]);
      }),
      { numRuns: 2000 },
    );
  });
});

describe('a partition', () => {
  const hypercallsOf = (driver: MshvDriver) =>
    new Hypercalls(driver, -1, driver.map({ length: HYPERCALL_PAGES_SIZE, shared: false }));

  const saved = (): X86VmState => {
    const driver = full();
    driver.properties.set(REFERENCE_TIME, 1234n);
    return savePartition(hypercallsOf(driver));
  };

  test('goes on from its reference time, and tells who its guest is before its hypercalls are there', () => {
    const state = saved();
    expect(state).toMatchObject({ clock: 123_400n, controllers: {} });
    const driver = fresh();
    loadPartition(hypercallsOf(driver), state);
    expect(driver.set).toEqual([
      `property ${REFERENCE_TIME}`,
      ...[H.GUEST_OS_ID, R.HYPERCALL, H.REFERENCE_TSC].map((name) => `register ${name}`),
    ]);
    expect(driver.properties.get(REFERENCE_TIME)).toBe(1234n);
    expect(driver.registers.get(H.REFERENCE_TSC)).toEqual([BigInt(H.REFERENCE_TSC) << 8n, 0n]);
  });

  test('has its clocks set ahead together, whichever part of a unit is left', () => {
    const driver = fresh();
    driver.properties.set(REFERENCE_TIME, 1234n);
    driver.registers.set(R.TSC, [2n ** 64n - 1n, 0n]);
    setAhead(hypercallsOf(driver), [0], 5_000_000_199n);
    expect([driver.properties.get(REFERENCE_TIME), driver.registers.get(R.TSC)]).toEqual([
      50_000_001n + 1234n,
      [(50_000_001n * HZ) / 10_000_000n - 1n, 0n],
    ]);
  });

  test.each([
    [{ synthetic: undefined }, /not of the Microsoft hypervisor$/],
    [{ controllers: { pit: new Uint8Array(1) } }, /has pit, which the Microsoft hypervisor has not$/],
    [{ clock: -1n }, /impossible reference time$/],
    [{ clock: 1n << 80n }, /impossible reference time$/],
    [{ synthetic: new Uint8Array([1, 0, 0, 0, 0, 0, 0, 0]) }, /has 0x0 where it cannot be$/],
  ])('%# is refused in a line', (change: Partial<X86VmState>, line) => {
    const driver = fresh();
    expect(refusal(() => loadPartition(hypercallsOf(driver), { ...saved(), ...change }))).toMatch(line);
    expect(driver.set).toEqual([]);
  });
});

test('the state that version 1 saved can be restored', () => {
  const file = path.resolve('test/golden/mshv-x86-1.json');
  const facts = JSON.parse(fs.readFileSync(file, 'utf8'), (_key, value: unknown) => {
    if (typeof value !== 'string') return value;
    if (value.startsWith('base64:')) return new Uint8Array(Buffer.from(value.slice(7), 'base64'));
    return /^0x[0-9a-f]+$/.test(value) ? BigInt(value) : value;
  }) as { version: number; vcpus: X86VcpuState[]; vm: X86VmState };
  // A later version reads the older file as well, and has one of its own.
  expect(facts.version).toBeLessThanOrEqual(VCPU_STATE_VERSION);
  for (const state of facts.vcpus) {
    const driver = new MshvDriver();
    driver.xsaveSize = state.xsave.length;
    driver.properties.set(PROCESSOR_CLOCK_FREQUENCY, BigInt(state.tscKhz!) * 1000n);
    vpOf(driver).load(state);
    expect(driver.registers.get(R.RIP)).toEqual([state.registers.rip, 0n]);
    expect(driver.registers.get(R.TSC)).toEqual([state.tsc, 0n]);
    // Spurious interrupts: the guest has its local APIC switched on.
    expect(driver.parts.get(LAPIC)!.subarray(abi.LAPIC_STATE.apic_spurious).slice(0, 2)).toEqual(
      Uint8Array.of(0xff, 1),
    );
  }
  const driver = new MshvDriver();
  const pages = driver.map({ length: HYPERCALL_PAGES_SIZE, shared: false });
  loadPartition(new Hypercalls(driver, -1, pages), facts.vm);
  expect(driver.properties.get(REFERENCE_TIME)).toBe(facts.vm.clock / 100n);
});
