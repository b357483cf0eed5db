/** Saving and restoring a machine of KVM: the orders of the requests, what they carry, and what is refused. */
import fs from 'node:fs';
import { describe, expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/kvm/abi.js';
import { openKvm } from '../../../src/hypervisor/kvm/kvm.js';
import { HypervisorError } from '../../../src/hypervisor/hypervisor.js';
import type { X86VcpuState, X86VmState } from '../../../src/hypervisor/saved-state.js';
import { StateKernel } from '../../support/state-kernel.js';

function machine(host = new StateKernel(), vcpus = 2) {
  const vm = openKvm(host.kernel).createVm({ tssAddress: 0, identityMapAddress: 0 });
  const made = Array.from({ length: vcpus }, (_, id) => vm.createVcpu(id));
  host.orders.length = 0;
  const save = () => ({ vcpus: made.map((vcpu) => vcpu.save()), vm: vm.save() });
  const load = (state: Saved) => {
    made.forEach((vcpu, id) => vcpu.load(state.vcpus[id]));
    vm.load(state.vm);
  };
  const counters = () => made.map((vcpu) => host.counter(vcpu.handle.fd));
  /** Of a vCPU, or of the VM. */
  const kept = (name: string, id?: number) =>
    host.state.get(`${id === undefined ? vm.handle.fd : made[id].handle.fd} ${name}`)!;
  return { host, vm, vcpus: made, save, load, counters, kept };
}

interface Saved {
  readonly vcpus: readonly X86VcpuState[];
  readonly vm: X86VmState;
}

function bytes(length: number, seed: number): Uint8Array {
  return Uint8Array.from({ length }, (_, index) => (index * 31 + seed * 97 + (index >> 8)) & 0xff);
}

/** A machine whose every byte of state is another. */
function full(host = new StateKernel()) {
  const made = machine(host);
  const { vm, vcpus } = made;
  vcpus.forEach(({ handle: { fd } }, id) => {
    const set = (name: string, value: Uint8Array) => host.state.set(`${fd} ${name}`, value);
    set('MP_STATE', Uint8Array.from([id === 0 ? abi.KVM_MP_STATE_HALTED : abi.KVM_MP_STATE_UNINITIALIZED, 0, 0, 0]));
    set('REGS', bytes(abi.REGS_SIZE, 1 + id));
    const sregs = bytes(abi.SREGS2_SIZE, 2 + id);
    // Type, DPL and bits.
    const masks = [15, 1, 3, 1, 1, 1, 1, 1, 1];
    for (let at = 14; at < 8 * abi.SEGMENT_SIZE; at += abi.SEGMENT_SIZE) {
      masks.forEach((mask, index) => (sregs[at + index] &= mask));
    }
    new DataView(sregs.buffer).setBigUint64(abi.SREGS2.flags, id === 0 ? 1n : 0n, true);
    set('SREGS', sregs);
    set('XSAVE', bytes(4096, 3 + id));
    const xcrs = new Uint8Array(abi.XCRS_SIZE);
    xcrs.set([1, 0, 0, 0]);
    xcrs.set([7 + id], abi.XCRS_ENTRIES + 8);
    set('XCRS', xcrs);
    set('LAPIC', bytes(abi.LAPIC_SIZE, 4 + id));
    set('DEBUGREGS', bytes(48, 5 + id));
    const nested = bytes(abi.NESTED_STATE_SIZE + 4096, 6 + id);
    new DataView(nested.buffer).setUint16(abi.NESTED_STATE.format, 0, true);
    new DataView(nested.buffer).setUint32(abi.NESTED_STATE.size, nested.length, true);
    set('NESTED_STATE', nested);
    set('VCPU_EVENTS', eventsOf([1, 3, 1, 1, 9, 0, 0, 0, 1, 0xec, 0, 2, 1, 1, 1], { flags: 0x3d, payload: 0x1234n }));
    for (const index of [0xc000_0081, 0x6e0, 0x3b, 0x2ff, 0x200, 0x401])
      host.msrs.set(`${fd} ${index}`, BigInt(index + id));
  });
  const { fd } = vm.handle;
  for (const chip of [0, 1, 2]) {
    const state = bytes(abi.IRQCHIP_SIZE, 7 + chip);
    state.set([chip, 0, 0, 0, 0, 0, 0, 0]);
    host.state.set(`${fd} IRQCHIP ${chip}`, state);
  }
  host.state.set(`${fd} PIT2`, bytes(abi.PIT_STATE_SIZE, 11));
  return made;
}

function eventsOf(head: readonly number[], { flags, payload }: { flags: number; payload: bigint }): Uint8Array {
  const view = new DataView(new ArrayBuffer(abi.VCPU_EVENTS_SIZE));
  new Uint8Array(view.buffer).set(head);
  view.setUint32(abi.VCPU_EVENTS.flags, flags, true);
  view.setUint8(abi.VCPU_EVENTS.exceptionHasPayload, 1);
  view.setBigUint64(abi.VCPU_EVENTS.exceptionPayload, payload, true);
  return new Uint8Array(view.buffer);
}

function changed(state: Saved, change: Partial<X86VcpuState>): Saved {
  return { ...state, vcpus: state.vcpus.map((vcpu) => ({ ...vcpu, ...change })) };
}

function saved(made = full()): Saved {
  made.vm.stopTime();
  return made.save();
}

describe('a vCPU', () => {
  test('is read in the order that lets nothing come in between', () => {
    const { host, vm, vcpus } = full();
    vm.stopTime();
    host.orders.length = 0;
    vcpus[0].save();
    expect(host.orders.filter((name, at) => name !== host.orders[at - 1])).toEqual([
      ...['GET_MP_STATE', 'GET_REGS', 'GET_SREGS2', 'GET_XSAVE2', 'GET_XCRS', 'GET_LAPIC', 'GET_NESTED_STATE'],
      ...['GET_DEBUGREGS', 'GET_ONE_REG', 'GET_MSRS', 'GET_VCPU_EVENTS'],
    ]);
  });

  test('is set in the order in which nothing undoes what was before it', () => {
    const state = saved();
    const { host, vcpus } = machine();
    vcpus[0].load(state.vcpus[0]);
    expect(host.orders.filter((name) => !name.startsWith('GET_'))).toEqual([
      ...['SET_TSC_OFFSET', 'SET_MP_STATE', 'SET_REGS', 'SET_SREGS2', 'SET_XCRS', 'SET_XSAVE', 'SET_LAPIC'],
      ...['SET_NESTED_STATE', 'SET_MSRS', 'SET_DEBUGREGS', 'SET_VCPU_EVENTS'],
    ]);
    // The timer's deadline is the last.
    expect(host.written.at(-1)).toBe(0x6e0);
  });

  test('is the same again, byte for byte', () => {
    const before = full();
    const state = saved(before);
    const after = machine();
    after.load(state);
    for (const id of [0, 1]) {
      for (const name of ['MP_STATE', 'REGS', 'XSAVE', 'LAPIC', 'NESTED_STATE']) {
        expect([name, after.kept(name, id)]).toEqual([name, before.kept(name, id)]);
      }
      expect(after.kept('DEBUGREGS', id).subarray(0, 48)).toEqual(before.kept('DEBUGREGS', id));
    }
    after.vm.stopTime();
    const again = after.save();
    expect(again).toEqual(state);
    expect(state.vcpus[0].pdptrs).toHaveLength(4);
    expect(state.vcpus[1].pdptrs).toBeUndefined();
    expect(state.vcpus.map(({ xcr0 }) => xcr0)).toEqual([7n, 8n]);
  });

  test('has its interrupt once on a KVM that tells it in two places', () => {
    const host = new StateKernel();
    for (const name of ['SREGS2', 'EXCEPTION_PAYLOAD', 'X86_TRIPLE_FAULT_EVENT']) host.capabilities.set(name, 0);
    const state = saved(full(host));
    const other = new StateKernel();
    other.capabilities.set('SREGS2', 0);
    const after = machine(other);
    after.load({ ...state, vcpus: state.vcpus.map((vcpu) => ({ ...vcpu, pdptrs: [1n, 2n, 3n, 4n] })) });
    const sregs = after.kept('SREGS', 0);
    expect(sregs).toHaveLength(abi.SREGS_SIZE);
    expect([...sregs.subarray(abi.SREGS_SIZE - 32)].every((byte) => byte === 0)).toBe(true);
    expect([...after.kept('VCPU_EVENTS', 0).subarray(8, 10)]).toEqual([1, 0xec]);
  });

  test('has what is under way again, as far as the host can tell it', () => {
    const state = saved();
    expect(state.vcpus[0].events).toEqual({
      exception: { pending: true, injected: true, vector: 3, hasErrorCode: true, errorCode: 9, payload: 0x1234n },
      interrupt: { injected: true, vector: 0xec, soft: false, shadow: 2 },
      nmi: { injected: true, pending: true, masked: true },
      sipiVector: 0,
      smi: { active: false, pending: false, insideNmi: false, latchedInit: false },
      tripleFault: false,
    });
    const { host, vcpus, kept } = machine();
    vcpus[0].load(state.vcpus[0]);
    const flags = () => new DataView(kept('VCPU_EVENTS', 0).buffer).getUint32(abi.VCPU_EVENTS.flags, true);
    expect(flags()).toBe(0x3d);
    vcpus[0].load({ ...state.vcpus[0], activity: 'sipi-received' });
    expect(flags()).toBe(0x3f);
    expect(host.excused).toEqual([]);
  });

  test('with an exception that an old KVM cannot hold apart has it injected; with a payload it is refused', () => {
    const state = saved().vcpus[0];
    const old = new StateKernel();
    for (const name of ['EXCEPTION_PAYLOAD', 'X86_TRIPLE_FAULT_EVENT']) old.capabilities.set(name, 0);
    const { vcpus, kept } = machine(old);
    expect(() => vcpus[0].load(state)).toThrow(/between an exception and its delivery: this host's KVM is too old/);
    const exception = { ...state.events.exception, injected: false, payload: undefined };
    vcpus[0].load({ ...state, events: { ...state.events, exception } });
    expect([...kept('VCPU_EVENTS', 0).subarray(0, 2)]).toEqual([1, 3]);
    expect(kept('VCPU_EVENTS', 0)[abi.VCPU_EVENTS.flags]).toBe(0xd);
    expect(() => vcpus[0].load({ ...state, events: { ...state.events, exception, tripleFault: true } })).toThrow(
      HypervisorError,
    );
  });

  test('has a shadow stack where the processor has', () => {
    const host = new StateKernel();
    host.hasSsp = true;
    const before = full(host);
    host.ssp.set(before.vcpus[0].handle.fd, 0x7fff_0008n);
    const state = saved(before);
    expect(state.vcpus.map(({ ssp }) => ssp)).toEqual([0x7fff_0008n, 0n]);
    const other = new StateKernel();
    expect(() => machine(other).load(state)).toThrow(/has shadow stacks, which this host does not give/);
    other.hasSsp = true;
    const after = machine(other);
    after.load(state);
    expect(other.ssp.get(after.vcpus[0].handle.fd)).toBe(0x7fff_0008n);
  });
});

describe('model-specific registers', () => {
  test('are what KVM lists, those that it does not list, and not those that set something else', () => {
    const indices = saved().vcpus[1].msrs.map(({ index }) => index);
    expect(indices).toEqual(expect.arrayContaining([0xc000_0081, 0x6e0, 0x3b, 0x2ff, 0x200, 0x26f, 0x401]));
    // The counter has its own place; the wall clock is written when it is set; banks without anything are no state.
    for (const index of [0x10, 0x11, 0x4b56_4d00, 0x4000_0020, 0x400]) expect(indices).not.toContain(index);
    expect(new Set(indices).size).toBe(indices.length);
  });

  test('that the host does not give are none, wherever they stand among the others', () => {
    const host = new StateKernel();
    const made = full(host);
    host.msrList = Array.from({ length: 700 }, (_, index) => 0x1000 + index);
    for (const index of [0x1000, 0x107f, 0x1080, 0x1081, 0x12bb, 0x2ff]) host.unreadable.add(index);
    const indices = saved(made).vcpus[0].msrs.map(({ index }) => index);
    const expected = host.msrList.filter((index) => !host.unreadable.has(index));
    expect(indices.filter((index) => index >= 0x1000)).toEqual(expected);
  });

  test('that cannot be set are no harm where they are as they were', () => {
    const state = saved();
    const { host, vcpus } = machine();
    host.unwritable.add(0xc000_0081);
    host.unwritable.add(0x3b);
    for (const { index, value } of state.vcpus[0].msrs) host.msrs.set(`${vcpus[0].handle.fd} ${index}`, value);
    vcpus[0].load(state.vcpus[0]);
    expect(host.written).toContain(0x2ff);
    const nothing = { index: 0x999, value: 0n };
    host.unreadable.add(0x999);
    host.unwritable.add(0x999);
    vcpus[0].load({ ...state.vcpus[0], msrs: [nothing, ...state.vcpus[0].msrs] });
  });

  test('that cannot be set and differ are refused by number and value', () => {
    const state = saved();
    const { host, vcpus } = machine();
    host.unwritable.add(0xc000_0081);
    const [{ handle }] = vcpus;
    host.msrs.set(`${handle.fd} ${String(0xc000_0081)}`, 5n);
    expect(() => vcpus[0].load(state.vcpus[0])).toThrow(
      new HypervisorError('KVM refuses the saved MSR 0xc0000081: it was 0xc0000081, and is 0x5 on this host'),
    );
  });
});

describe('a record from elsewhere', () => {
  const state = saved();
  const nested = (size: number, told = size) => {
    const made = new Uint8Array(size);
    if (size >= 8) new DataView(made.buffer).setUint32(abi.NESTED_STATE.size, told, true);
    return made;
  };

  test.each<[string, Partial<X86VcpuState>, RegExp]>([
    ['a larger XSAVE area', { xsave: new Uint8Array(8192) }, /XSAVE area has 8192 bytes; this host's KVM takes 4096/],
    ['no XSAVE header', { xsave: new Uint8Array(575) }, /impossible xsave/],
    ['a short local APIC', { localApic: new Uint8Array(1023) }, /impossible localApic/],
    ['a long local APIC', { localApic: new Uint8Array(1025) }, /impossible localApic/],
    ['three PDPTEs', { pdptrs: [0n, 0n, 0n] }, /3 saved PDPTEs/],
    ['five debug registers', { debug: { addresses: [0n, 0n, 0n, 0n, 0n], dr6: 0n, dr7: 0n } }, /impossible debug/],
    ['a nested state of no bytes', { nested: nested(0) }, /nested state has 0 bytes/],
    ['a nested state that is cut', { nested: nested(127) }, /nested state has 127 bytes/],
    [
      'a nested state that says that it has more',
      { nested: nested(128, 4224) },
      /nested state has 128 bytes, and says/,
    ],
    ['a nested state that says that it has less', { nested: nested(200, 128) }, /nested state has 200 bytes, and says/],
    ['a larger nested state than there is', { nested: nested(4096 + 129) }, /nested state has 4225 bytes/],
    [
      "the other hypervisor's enlightenments",
      { synthetic: new Uint8Array(8) },
      /enlightenments, which KVM does not have/,
    ],
  ])('with %s is refused before KVM gets it', (_what, change, line) => {
    const after = machine();
    const before = after.host.state.size;
    expect(() => after.load(changed(state, change))).toThrow(HypervisorError);
    expect(() => after.load(changed(state, change))).toThrow(line);
    for (const name of Object.keys(change).map((key) => key.toUpperCase())) {
      expect([...after.host.state.keys()].filter((key) => key.includes(name) && !key.includes('REGS'))).toEqual([]);
    }
    expect(before).toBeGreaterThan(0);
  });

  test.each([
    'SET_SREGS2',
    'SET_XCRS',
    'SET_XSAVE',
    'SET_LAPIC',
    'SET_NESTED_STATE',
    'SET_VCPU_EVENTS',
    'SET_DEBUGREGS',
  ])('that KVM refuses at %s is refused in one line', (name) => {
    const after = machine();
    after.host.refused.add(name);
    expect(() => after.load(state)).toThrow(
      /^KVM refuses the saved [\w0 -]+ \(invalid argument\): this host's KVM,[^\n]*$/i,
    );
  });

  test('of a host with XSAVE, or with guests of guests, is refused where there is neither', () => {
    const plain = new StateKernel();
    plain.capabilities.set('XCRS', 0);
    expect(() => machine(plain).load(state)).toThrow(/has XSAVE, which this host has not/);
    const alone = new StateKernel();
    alone.capabilities.set('NESTED_STATE', 0);
    expect(() => machine(alone).load(state)).toThrow(/guests of its own, which this host's KVM does not give/);
    // A smaller area is filled up, and the x87 alone is what every processor has.
    plain.capabilities.set('XSAVE2', 0);
    const small = changed(state, { xsave: bytes(576, 1), xcr0: 1n, nested: undefined });
    const after = machine(plain);
    after.load(small);
    expect(after.kept('XSAVE', 0)).toHaveLength(4096);
    expect(after.host.orders).not.toContain('SET_XCRS');
    after.vm.stopTime();
    expect(after.save().vcpus[0].xcr0).toBe(1n);
    expect(after.host.orders).toContain('GET_XSAVE');
  });

  test.each<[string, X86VmState['controllers']]>([
    ['one is missing', Object.fromEntries(Object.entries(state.vm.controllers).slice(1))],
    ['one is of another hypervisor', { ...state.vm.controllers, gic: new Uint8Array(4) }],
    ['one is cut', { ...state.vm.controllers, ioapic: new Uint8Array(511) }],
    ['the timer is too long', { ...state.vm.controllers, pit: new Uint8Array(113) }],
    ['there are none', {}],
  ])('is refused when of the controllers %s', (_what, controllers) => {
    const after = machine();
    expect(() => after.load({ ...state, vm: { ...state.vm, controllers } })).toThrow(HypervisorError);
  });
});

describe('a guest without guests of its own', () => {
  test.each<[string, number, bigint, boolean]>([
    ['VMX off', 0, 2n ** 64n - 1n, false],
    ['VMX on', 0, 0x1000n, true],
    ['SVM off', 1, 0n, false],
  ])('is known, so that any host can have it: %s', (_what, format, vmxon, begun) => {
    const made = full();
    const { fd } = made.vcpus[0].handle;
    const header = new Uint8Array(abi.NESTED_STATE_SIZE);
    const view = new DataView(header.buffer);
    view.setUint16(abi.NESTED_STATE.format, format, true);
    view.setUint32(abi.NESTED_STATE.size, header.length, true);
    view.setBigUint64(abi.NESTED_STATE.vmxon, vmxon, true);
    made.host.state.set(`${fd} NESTED_STATE`, header);
    // EFER.SVME is bit 12.
    made.host.state.get(`${fd} SREGS`)!.fill(0, 264, 272);
    made.vm.stopTime();
    expect(made.vcpus[0].save().nested).toEqual(begun ? header : undefined);
  });
});

describe('controllers', () => {
  test('are set after the vCPUs, byte for byte', () => {
    const before = full();
    const state = saved(before);
    expect(Object.keys(state.vm.controllers)).toEqual(['pic-master', 'pic-slave', 'ioapic', 'pit']);
    const after = machine();
    after.load(state);
    for (const name of ['IRQCHIP 0', 'IRQCHIP 1', 'IRQCHIP 2', 'PIT2'])
      expect(after.kept(name)).toEqual(before.kept(name));
    expect(after.host.orders.lastIndexOf('SET_VCPU_EVENTS')).toBeLessThan(after.host.orders.indexOf('SET_IRQCHIP'));
  });
});

describe('time', () => {
  /** What passes on the host. Nanoseconds. */
  const pass = (host: StateKernel, nanoseconds: bigint) => {
    host.clock += nanoseconds;
    host.tsc += (nanoseconds * BigInt(host.hostKhz)) / 1_000_000n;
  };

  /** Two vCPUs, the second 7 ticks behind. */
  function stopped() {
    const made = full();
    const [, second] = made.vcpus;
    made.host.offsets.set(second.handle.fd, made.host.offsets.get(second.handle.fd)! - 7n);
    pass(made.host, 1_000_000n);
    made.vm.stopTime();
    const at = { clock: made.host.clock, counters: made.counters() };
    pass(made.host, 500n);
    return { ...made, at };
  }

  test('is saved as it was when it was stopped', () => {
    const { save, at, counters } = stopped();
    const { vcpus, vm } = save();
    expect(vcpus.map(({ tsc }) => tsc)).toEqual(at.counters);
    expect(vcpus.map(({ tscKhz }) => tscKhz)).toEqual([3_000_000, 3_000_000]);
    expect(vm.clock).toBe(at.clock);
    expect(counters()).not.toEqual(at.counters);
  });

  test('is not to be had while it runs', () => {
    const { vcpus, vm } = full();
    expect(() => vcpus[0].save()).toThrow(/has not been stopped/);
    expect(() => vm.save()).toThrow(/has not been stopped/);
  });

  test.each([0n, 2_500_000_000n])(
    'goes on from there, all counters and the clock by the same: %d ns have passed',
    (passed) => {
      const { save, at } = stopped();
      const state = save();
      const host = new StateKernel();
      host.tsc = 55n;
      host.clock = 3n;
      const after = machine(host);
      for (const [id, vcpu] of after.vcpus.entries()) {
        vcpu.load(state.vcpus[id]);
        pass(host, 40_000n);
      }
      after.vm.load(state.vm);
      pass(host, 10n ** 12n);
      expect(host.excused).toEqual(after.vcpus.map(({ handle }) => handle.fd));
      // It can be saved again before it runs.
      expect(after.save()).toEqual(state);
      if (passed === 0n) after.vm.startTime();
      else after.vm.startTime(passed);
      expect(host.clock).toBe(at.clock + passed);
      expect(after.counters()).toEqual(at.counters.map((counter) => counter + passed * 3n));
      // And the next stop is one like the first.
      pass(host, 1_000n);
      after.vm.stopTime();
      pass(host, 9_000n);
      expect(after.save().vcpus.map(({ tsc }) => tsc)).toEqual(
        at.counters.map((counter) => counter + passed * 3n + 3_000n),
      );
      after.vm.startTime();
      expect(after.counters()).toEqual(at.counters.map((counter) => counter + passed * 3n + 3_000n));
      expect(host.mapped).toBe(2);
    },
  );

  test('of another frequency is scaled where the host can, for vCPUs that come later as well', () => {
    const { save, at } = stopped();
    const state = changed(save(), { tscKhz: 2_000_000 });
    const host = new StateKernel();
    host.capabilities.set('TSC_CONTROL', 1);
    const after = machine(host);
    state.vcpus.forEach((vcpu, id) => after.vcpus[id].load({ ...vcpu, tsc: at.counters[id] }));
    after.vm.load(state.vm);
    pass(host, 600_000n);
    after.vm.startTime();
    expect(after.counters()).toEqual(at.counters);
    pass(host, 3_000_000n);
    expect(after.counters()).toEqual(at.counters.map((counter) => counter + 6_000n * 1_000n));
    const late = after.vm.createVcpu(2);
    expect(host.khz.get(late.handle.fd)).toBe(2_000_000);
    expect(host.counter(late.handle.fd)).toBe(after.counters()[0]);
  });

  test('of another frequency is refused by a host that cannot scale it, unless it is nearly its own', () => {
    const { save } = stopped();
    const state = save();
    const load = (tscKhz: number | undefined) => {
      const after = machine();
      after.load(changed(state, { tscKhz }));
      return after.host.khz.size;
    };
    expect(() => load(2_000_000)).toThrow(/runs at 2000000 kHz and this host's at 3000000 kHz/);
    expect(load(3_000_700)).toBe(2);
    expect(load(3_000_000)).toBe(0);
    expect(load(undefined)).toBe(0);
  });

  test('is set by the register itself before Linux 5.16', () => {
    const before = full();
    before.host.hasOffsets = false;
    before.vm.stopTime();
    const counters = before.counters();
    pass(before.host, 1_000n);
    const state = before.save();
    expect(state.vcpus.map(({ tsc }) => tsc)).toEqual(counters);
    const host = new StateKernel();
    host.hasOffsets = false;
    const after = machine(host);
    after.load(state);
    expect(after.counters()).toEqual(counters);
    expect(after.save()).toEqual(state);
    after.vm.startTime();
    expect(host.clock).toBe(state.vm.clock);
  });
});

/** A machine that was saved on a host, as a file of facts: it has to be taken in all versions to come. */
test('the golden record is taken', () => {
  const state = JSON.parse(fs.readFileSync('test/golden/kvm-x86-1.json', 'utf8'), (_key, value: unknown) => {
    if (typeof value !== 'string') return value;
    if (value.startsWith('0x')) return BigInt(value);
    return value.startsWith('base64:') ? new Uint8Array(Buffer.from(value.slice(7), 'base64')) : value;
  }) as Saved;
  const host = new StateKernel();
  host.hostKhz = state.vcpus[0].tscKhz!;
  host.capabilities.set('NESTED_STATE', 0);
  const after = machine(host);
  host.msrList = state.vcpus[0].msrs.map(({ index }) => index);
  after.load(state);
  expect(after.save()).toEqual(state);
});
