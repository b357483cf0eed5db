/** What is kept of a KVM machine on aarch64, and how it is set back. */
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { type Arm64Vcpu, type Arm64Vm, HypervisorError } from '../../../src/hypervisor/hypervisor.js';
import * as abi from '../../../src/hypervisor/kvm/aarch64/abi.js';
import { openKvmArm64 } from '../../../src/hypervisor/kvm/aarch64/kvm.js';
import type { Arm64Register, Arm64VcpuState, Arm64VmState } from '../../../src/hypervisor/saved-state.js';
import type { FakeVcpu } from '../../support/arm-state-kernel.js';
import { ArmStateKernel, attributeKey } from '../../support/arm-state-kernel.js';

const {
  KVM_DEV_ARM_VGIC_GRP_DIST_REGS: DIST,
  KVM_DEV_ARM_VGIC_GRP_REDIST_REGS: REDIST,
  KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS: ICC,
  KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO: LEVEL,
  KVM_DEV_ARM_VGIC_GRP_ITS_REGS: ITS,
} = abi;
const GIC = { distributor: 0x0800_0000, its: 0x0808_0000, redistributors: 0x080a_0000, spis: 64 };
const PSCI_VERSION = 0x6030_0000_0014_0000n;
const SCTLR_EL1 = 0x6030_0000_0013_c080n;
const ID_AA64PFR0_EL1 = 0x6030_0000_0013_c020n;
const Z0 = 0x6080_0000_0015_0000n;
const FPSR = 0x6020_0000_0010_00d4n;
/** Aff1 is 1 for the second processor: its GIC's registers have 0x100 in the upper half of their ids. */
const SECOND = 0x100n << 32n;

function u64(value: bigint, bytes = 8): Uint8Array {
  const all = new Uint8Array(bytes);
  new DataView(all.buffer).setBigUint64(0, value, true);
  return all;
}
const u32 = (value: number) => u64(BigInt(value)).slice(0, 4);

/** In KVM's own order. */
function registersOf(vcpu: number) {
  return [
    [abi.REG_X0, { value: u64(1n) }],
    [abi.REG_PC, { value: u64(2n) }],
    [FPSR, { value: u32(3) }],
    [abi.KVM_REG_ARM64_SVE_VLS, { value: u64(0xfn, 64), invariant: true }],
    [Z0, { value: u64(4n, 256) }],
    [PSCI_VERSION, { value: u64(0x1_0001n) }],
    [abi.REG_MPIDR_EL1, { value: u64(0x8000_0000n | (BigInt(vcpu) << 8n)) }],
    [ID_AA64PFR0_EL1, { value: u64(0x11n), invariant: true }],
    [SCTLR_EL1, { value: u64(5n) }],
  ] as [bigint, { value: Uint8Array; invariant?: boolean }][];
}

interface Made {
  readonly host: ArmStateKernel;
  readonly vm: Arm64Vm;
  readonly vcpus: readonly Arm64Vcpu[];
  readonly fakes: readonly FakeVcpu[];
}

function make(registers: typeof registersOf = registersOf, spis = GIC.spis): Made {
  const host = new ArmStateKernel(registers);
  const vm = openKvmArm64(host.kernel).createVm({ ipaBits: 40, gic: { ...GIC, spis } });
  const vcpus = [0, 1].map((id) => vm.createVcpu(id, id > 0));
  vm.finishVcpus();
  host.set.length = 0;
  host.commands.length = 0;
  host.gic.set(attributeKey(DIST, 4n), u32((spis + 32) / 32 - 1));
  for (const processor of [0n, SECOND]) host.gic.set(attributeKey(REDIST, processor | 0x1_0100n), u32(0xffff));
  return { host, vm, vcpus, fakes: [...host.vcpus.values()] };
}

/** A machine that has been used. */
function used(): Made {
  const made = make();
  const { host, fakes } = made;
  fakes[0].registers.get(abi.REG_X0)!.value = u64(0x1234n);
  fakes[1].registers.get(Z0)!.value = new Uint8Array(256).fill(0x5a);
  fakes[1].mpState[0] = abi.KVM_MP_STATE_STOPPED;
  const put = (group: number, id: bigint, value: Uint8Array) => host.gic.set(attributeKey(group, id), value);
  put(DIST, 0n, u32(0x12));
  put(DIST, 0x204n, u32(0x100));
  put(DIST, 0x6000n + 8n * 40n, u32(0x100));
  put(LEVEL, 32n, u32(0x200));
  for (const [processor, enabled] of [
    [0n, 0x8000],
    [SECOND, 0xffff],
  ] as const) {
    put(REDIST, processor | 0x1_0100n, u32(enabled));
    put(REDIST, processor | 0x70n, u32(0x4013_000d));
    put(REDIST, processor | 0x78n, u32(0x4014_0000));
    put(REDIST, processor, u32(1));
    put(ICC, processor | 0xc230n, u64(0xf8n)); // ICC_PMR_EL1
  }
  put(ITS, 0x80n, u64(0x8000_0000_4012_0000n));
  put(ITS, 0x88n, u64(0xe0n));
  put(ITS, 0x90n, u64(0xc0n));
  put(ITS, 0n, u64(1n));
  return made;
}

interface Saved {
  readonly vcpus: Arm64VcpuState[];
  readonly vm: Arm64VmState;
}

function save({ vm, vcpus }: Made): Saved {
  vm.stopTime();
  return { vcpus: vcpus.map((vcpu) => vcpu.save()), vm: vm.save() };
}

function load({ vm, vcpus }: Made, saved: Saved): void {
  vcpus.forEach((vcpu, id) => vcpu.load(saved.vcpus[id]));
  vm.load(saved.vm);
}

/** A record with one group or one list of registers changed. */
function changed(registers: readonly Arm64Register[], id: bigint, value?: Uint8Array): Arm64Register[] {
  const rest = registers.filter((register) => register.id !== id);
  return value === undefined ? rest : [...rest, { id, value }];
}
const withRegister = (saved: Saved, id: bigint, value?: Uint8Array): Saved => ({
  ...saved,
  vcpus: saved.vcpus.map((vcpu) => ({ ...vcpu, registers: changed(vcpu.registers, id, value) })),
});
const withGic = (saved: Saved, group: string, id: bigint, value?: Uint8Array): Saved => ({
  ...saved,
  vm: { ...saved.vm, gic: { ...saved.vm.gic, [group]: changed(saved.vm.gic[group], id, value) } },
});

/** In the order of the calls: where each first stands. */
function expectOrder(set: readonly string[], expected: readonly string[]): void {
  expect(expected.map((one) => set.indexOf(one)).every((at) => at >= 0)).toBe(true);
  const at = expected.map((one) => set.indexOf(one));
  expect(at).toEqual([...at].sort((a, b) => a - b));
}

test('a machine comes back as it was saved', () => {
  const saved = save(used());
  const next = make();
  load(next, saved);
  const { counterFrequency } = saved.vm;
  const again = save(next);
  expect({ ...again, vm: { ...again.vm, counterFrequency } }).toEqual(saved);
  // What KVM has from the start does not stay beside what was saved.
  expect(next.host.gic.get(attributeKey(REDIST, 0x1_0100n))).toEqual(u32(0x8000));
  expect(next.fakes[1].mpState[0]).toBe(abi.KVM_MP_STATE_STOPPED);
  expect(next.host.mapped).toBe(make().host.mapped);
});

test("the virtual counter goes on where it stood, and is the VM's alone", () => {
  const first = used();
  const saved = save(first);
  expect(saved.vcpus[0].registers.map(({ id }) => id)).not.toContain(abi.REG_TIMER_CNT);
  expect(saved.vm.counterFrequency / 62_500_000).toBeCloseTo(1, 1);
  const next = make();
  load(next, { ...saved, vm: { ...saved.vm, counter: 1n << 60n } });
  next.vm.startTime();
  next.vm.stopTime();
  const passed = next.vm.save().counter - (1n << 60n);
  expect(passed).toBeGreaterThanOrEqual(0n);
  expect(passed).toBeLessThan(62_500_000n);
});

test('the virtual counter is set ahead when it goes on', () => {
  const next = make();
  load(next, save(used()));
  next.vm.stopTime();
  const { counter } = next.vm.save();
  next.vm.startTime(100_000_000_000n);
  next.vm.stopTime();
  const seconds = Number(next.vm.save().counter - counter) / 62_500_000;
  // The frequency is measured, to one percent at least.
  expect(seconds).toBeGreaterThan(99);
  expect(seconds).toBeLessThan(110);
});

test('nothing is saved while time runs', () => {
  expect(() => make().vm.save()).toThrow(/time has to stand still/);
});

test('tables are in memory before the registers are read', () => {
  const { host, vm } = used();
  vm.stopTime();
  vm.save();
  expect(host.commands).toEqual([abi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, abi.KVM_DEV_ARM_ITS_SAVE_TABLES]);
});

test('each part is set in the order that KVM asks for', () => {
  const next = make();
  load(next, save(used()));
  const dist = (id: number) => attributeKey(DIST, BigInt(id));
  const redist = (id: number) => attributeKey(REDIST, SECOND | BigInt(id));
  const its = (id: number) => attributeKey(ITS, BigInt(id));
  expectOrder(next.host.set, [
    ...[PSCI_VERSION, abi.REG_X0, SCTLR_EL1].map((id) => `0x${id.toString(16)}`),
    ...[0x8, 0, 0x84, 0x404 + 28, 0x6000 + 8 * 32, 0xc08, 0x184, 0x104, 0x204, 0x304].map(dist),
    ...[0x70, 0x74, 0x78, 0x7c, 0, 0x1_0080, 0x1_0180, 0x1_0100, 0x1_0200, 0x1_0300].map(redist),
    attributeKey(LEVEL, 64n),
    attributeKey(ICC, SECOND | 0xc664n), // ICC_CTLR_EL1
    attributeKey(ICC, SECOND | 0xc667n), // ICC_IGRPEN1_EL1
    ...[0x80, 0x90, 0x88, 0x100, 0x138, 0x4].map(its),
    `command ${abi.KVM_DEV_ARM_ITS_RESTORE_TABLES}`,
    its(0),
  ]);
});

test('of what a record says twice or in another order, the order does not count', () => {
  const saved = save(used());
  const reversed = {
    vcpus: saved.vcpus.map((vcpu) => ({ ...vcpu, registers: vcpu.registers.toReversed() })),
    vm: {
      ...saved.vm,
      gic: Object.fromEntries(
        Object.entries(saved.vm.gic)
          .reverse()
          .map(([name, registers]) => [name, registers.toReversed()]),
      ),
    },
  };
  const [one, other] = [make(), make()];
  load(one, saved);
  load(other, reversed);
  expect(other.host.set).toEqual(one.host.set);
});

test('an SError that is pending is pending again', () => {
  const first = used();
  const { events } = first.fakes[0];
  events[abi.VCPU_EVENTS_SERROR_PENDING_OFFSET] = 1;
  events[abi.VCPU_EVENTS_SERROR_HAS_ESR_OFFSET] = 1;
  events[abi.VCPU_EVENTS_SERROR_ESR_OFFSET] = 0x77;
  const saved = save(first);
  expect(saved.vcpus.map(({ serror }) => serror)).toEqual([
    { pending: true, syndrome: 0x77n },
    { pending: false, syndrome: undefined },
  ]);
  const next = make();
  load(next, saved);
  expect(next.fakes[0].events).toEqual(events);
  expect(next.fakes[1].events).toEqual(new Uint8Array(abi.VCPU_EVENTS_SIZE));
});

describe('another host', () => {
  test('that knows registers which the saved one has not keeps them as they are', () => {
    const saved = withRegister(save(used()), SCTLR_EL1);
    const next = make();
    load(next, saved);
    expect(next.fakes[0].registers.get(SCTLR_EL1)!.value).toEqual(u64(5n));
  });

  test('that lacks optional registers of the GIC saves and restores without them', () => {
    const lacking = used();
    const absent = [attributeKey(DIST, 0xcn), ...[1, 2, 3].map((n) => attributeKey(ICC, BigInt(0xc644 + n)))];
    for (const key of absent) lacking.host.absent.add(key);
    const saved = save(lacking);
    const next = make();
    for (const key of absent) next.host.absent.add(key);
    load(next, saved);
    expect(Object.values(saved.vm.gic).flat().length).toBe(Object.values(save(used()).vm.gic).flat().length - 4);
  });

  test.each<[string, (saved: Saved) => Saved, RegExp]>([
    [
      'another processor',
      (saved) => withRegister(saved, ID_AA64PFR0_EL1, u64(0x1122n)),
      /^The machine was saved with 0x0000000000001122 in the register S3_0_C0_C4_0; KVM on this host has 0x0000000000000011$/,
    ],
    [
      'another affinity',
      (saved) => withRegister(saved, abi.REG_MPIDR_EL1, u64(0x8000_0007n)),
      /0x0000000080000007 in the register S3_0_C0_C0_5; KVM on this host has 0x0000000080000000$/,
    ],
    [
      'longer vectors',
      (saved) => withRegister(saved, abi.KVM_REG_ARM64_SVE_VLS, u64(0xffn, 64)),
      /ff in KVM's register 0x606000000015ffff; KVM on this host has 0x0+f$/,
    ],
    [
      'a register that is not known here',
      (saved) => withRegister(saved, 0x6030_0000_0013_c103n, u64(0n)),
      /^The saved machine has the register S3_0_C2_C0_3; KVM on this host has not$/,
    ],
    [
      'the virtual counter as a register',
      (saved) => withRegister(saved, abi.REG_TIMER_CNT, u64(0n)),
      /has the register S3_3_C14_C3_2; KVM on this host has not$/,
    ],
    [
      'too many bytes',
      (saved) => withRegister(saved, abi.REG_PC, u64(0n, 4096)),
      /^The saved state has 4096 bytes for KVM's register 0x6030000000100040, which has 8$/,
    ],
    ['too few bytes', (saved) => withRegister(saved, Z0, new Uint8Array(255)), /has 255 bytes for .* which has 256$/],
    ['no program counter', (saved) => withRegister(saved, abi.REG_PC), /lacks KVM's register 0x6030000000100040$/],
    [
      'a register twice',
      (saved) => ({
        ...saved,
        vcpus: saved.vcpus.map((vcpu) => ({ ...vcpu, registers: [...vcpu.registers, vcpu.registers[0]] })),
      }),
      /^The saved state has KVM's register 0x606000000015ffff twice$/,
    ],
    [
      'other interrupts',
      (saved) => withGic(saved, 'distributor', 4n, u32(7)),
      /^The machine was saved with 0x00000007 in GICD_TYPER; KVM on this host has 0x00000002$/,
    ],
    [
      'an interrupt too many',
      (saved) => withGic(saved, 'distributor', 0x10cn, u32(0)),
      /^The saved machine has a GIC's register 0x10c; KVM on this host has not$/,
    ],
    [
      'a processor too many',
      (saved) => withGic(saved, 'redistributors', (2n << 32n) | 0x70n, u32(0)),
      /has a GIC's register 0x200000070; KVM on this host has not$/,
    ],
    [
      'another last processor',
      (saved) => withGic(saved, 'redistributors', SECOND | 8n, u32(0x10)),
      /0x00000010 in GICR_TYPER of processor 256; KVM on this host has 0x00000000$/,
    ],
    [
      'a processor interface too few',
      (saved) => withGic(saved, 'processorInterfaces', SECOND | 0xc230n),
      /lacks ICC_PMR_EL1 of processor 256$/,
    ],
    [
      'no ITS',
      ({ vcpus, vm: { gic, ...vm } }) => ({
        vcpus,
        vm: { ...vm, gic: Object.fromEntries(Object.entries(gic).filter(([name]) => name !== 'its')) },
      }),
      /^The saved interrupt controller lacks its part its$/,
    ],
    [
      'a part that is not known',
      ({ vcpus, vm }) => ({ vcpus, vm: { ...vm, gic: { ...vm.gic, __proto: [] } } }),
      /has an unknown part, __proto$/,
    ],
    [
      'a faster counter',
      ({ vcpus, vm }) => ({ vcpus, vm: { ...vm, counterFrequency: 65_000_000 } }),
      /^The machine was saved with a counter of about 65\.0 MHz; this host's has about 6[23]\.\d MHz$/,
    ],
  ])('is refused in a line: %s', (_what, change, line) => {
    const saved = save(used());
    const next = make();
    expect(() => load(next, change(saved))).toThrow(line);
    expect(next.host.mapped).toBe(make().host.mapped);
  });

  test('that has fewer shared interrupts is refused before any of them is set', () => {
    const saved = save(used());
    const next = make(registersOf, 32);
    next.vcpus.forEach((vcpu, id) => vcpu.load(saved.vcpus[id]));
    next.host.set.length = 0;
    expect(() => next.vm.load(saved.vm)).toThrow(
      /^The saved interrupt controller has 64 shared interrupts; this machine's has 32$/,
    );
    expect(next.host.set).toEqual([]);
  });
});

test('whatever is in a record, it is loaded or refused in a line, and nothing is left behind', () => {
  const saved = save(used());
  const { mapped } = make().host;
  const bit = fc.bigInt({ min: 0n, max: 63n }).map((shift) => 1n << shift);
  const change = fc.record({
    list: fc.nat(),
    at: fc.nat(),
    id: fc.oneof(fc.constant(0n), bit),
    value: fc.option(fc.uint8Array({ maxLength: 300 })),
    repeat: fc.nat(2),
  });
  fc.assert(
    fc.property(fc.array(change, { minLength: 1, maxLength: 4 }), (changes) => {
      const copy = structuredClone(saved) as { vcpus: { registers: Arm64Register[] }[] } & Saved;
      const gic = copy.vm.gic as Record<string, Arm64Register[]>;
      const lists = [...copy.vcpus.map(({ registers }) => registers), ...Object.values(gic)];
      for (const { list, at, id, value, repeat } of changes) {
        const registers = lists[list % lists.length];
        if (registers.length === 0) continue;
        const old = registers[at % registers.length];
        const next = { id: old.id ^ id, value: value ?? old.value };
        registers.splice(at % registers.length, 1, ...Array.from({ length: repeat }, () => next));
      }
      const next = make();
      try {
        load(next, copy);
      } catch (error) {
        expect(error).toBeInstanceOf(HypervisorError);
        expect((error as Error).message).not.toContain('\n');
      }
      expect(next.host.mapped).toBe(mapped);
    }),
    { numRuns: 200 },
  );
});

test.each([
  [abi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, /^KVM cannot save the pending interrupts to the guest's memory: EINVAL$/],
  [abi.KVM_DEV_ARM_ITS_SAVE_TABLES, /^KVM cannot save the tables of the ITS to/],
])('tables that the guest has put nowhere are told in a line (%i)', (command, line) => {
  const made = used();
  made.host.failing = command;
  expect(() => save(made)).toThrow(line);
});

test('tables of the ITS that make no sense are told in a line, and it stays off', () => {
  const next = make();
  next.host.failing = abi.KVM_DEV_ARM_ITS_RESTORE_TABLES;
  expect(() => load(next, save(used()))).toThrow(/^KVM cannot restore the tables of the ITS from the guest's memory/);
  expect(next.host.set).not.toContain(attributeKey(ITS, 0n));
});
