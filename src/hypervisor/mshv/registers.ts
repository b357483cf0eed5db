/** x86 state by the hypervisor's register names. */
import type { Msr, X86Registers, X86Segment, X86SpecialRegisters } from '../x86-state.js';
import * as abi from './abi.js';

const R = abi.HV_X64_REGISTER;

export type RegisterValue = readonly [name: number, low: bigint, high?: bigint];

export const GENERAL_REGISTERS = {
  ...{ rax: R.RAX, rcx: R.RCX, rdx: R.RDX, rbx: R.RBX, rsp: R.RSP, rbp: R.RBP, rsi: R.RSI, rdi: R.RDI },
  ...{ r8: R.R8, r9: R.R9, r10: R.R10, r11: R.R11, r12: R.R12, r13: R.R13, r14: R.R14, r15: R.R15 },
  ...{ rip: R.RIP, rflags: R.RFLAGS },
} as const satisfies Record<keyof X86Registers, number>;

const SEGMENTS = {
  ...{ cs: R.CS, ds: R.DS, es: R.ES, fs: R.FS, gs: R.GS, ss: R.SS, tr: R.TR, ldt: R.LDTR },
} as const;
const TABLES = { gdt: R.GDTR, idt: R.IDTR } as const;
const CONTROLS = {
  ...{ cr0: R.CR0, cr2: R.CR2, cr3: R.CR3, cr4: R.CR4, cr8: R.CR8, efer: R.EFER, apicBase: R.APIC_BASE },
} as const;
/** All of X86SpecialRegisters. */
export const SPECIAL_REGISTERS: readonly number[] = [SEGMENTS, TABLES, CONTROLS].flatMap((names) =>
  Object.values(names),
);

const VARIABLE_MTRRS = 8;
const FIXED_4K_MTRRS = 8;
/** MTRRs by their numbers: Intel SDM volume 3, 12.11.2. */
const MTRRS: readonly (readonly [msr: number, name: number])[] = [
  [0x2ff, R.MSR_MTRR_DEF_TYPE],
  [0x250, R.MSR_MTRR_FIX64K00000],
  [0x258, R.MSR_MTRR_FIX16K80000],
  [0x259, R.MSR_MTRR_FIX16KA0000],
  ...Array.from({ length: FIXED_4K_MTRRS }, (_, at) => [0x268 + at, R.MSR_MTRR_FIX4KC0000 + at] as const),
  ...Array.from({ length: VARIABLE_MTRRS }, (_, at) => [0x200 + 2 * at, R.MSR_MTRR_PHYS_BASE0 + at] as const),
  ...Array.from({ length: VARIABLE_MTRRS }, (_, at) => [0x201 + 2 * at, R.MSR_MTRR_PHYS_MASK0 + at] as const),
];

/** The model-specific registers of every processor: Intel SDM volume 4. */
const COMMON_MSRS = new Map<number, number>([
  [0x174, R.SYSENTER_CS],
  [0x175, R.SYSENTER_ESP],
  [0x176, R.SYSENTER_EIP],
  [0x1d9, R.DEBUG_CTL],
  [0x277, R.PAT],
  [0xc000_0081, R.STAR],
  [0xc000_0082, R.LSTAR],
  [0xc000_0083, R.CSTAR],
  [0xc000_0084, R.SFMASK],
  [0xc000_0102, R.KERNEL_GS_BASE],
  ...MTRRS,
]);

/** Those of some, which the hypervisor refuses to read for others. */
const FEATURE_MSRS = new Map<number, number>([
  [0x3b, R.TSC_ADJUST],
  [0x48, R.SPEC_CTRL],
  [0x6a0, R.U_CET],
  [0x6a2, R.S_CET],
  [0x6a4, R.PL0_SSP],
  [0x6a5, R.PL1_SSP],
  [0x6a6, R.PL2_SSP],
  [0x6a7, R.PL3_SSP],
  [0x6a8, R.INTERRUPT_SSP_TABLE_ADDR],
  [0xda0, R.U_XSS],
  [0xc000_0103, R.TSC_AUX],
]);
const MSRS: ReadonlyMap<number, number> = new Map([...COMMON_MSRS, ...FEATURE_MSRS]);
/** What is saved of a processor's model-specific registers. */
export const SAVED_MSRS = { common: [...COMMON_MSRS], feature: [...FEATURE_MSRS] } as const;

/** IA32_MISC_ENABLE: the hypervisor's own from power-on says what its processor has, and an AMD processor has none. */
const LEFT_ALONE = [0x1a0];

/** @returns undefined: it has none */
export function msrName(index: number): number | undefined {
  return MSRS.get(index);
}

/** @throws RangeError for one that has no name */
export function msrRegister(index: number): number {
  const name = msrName(index);
  if (name === undefined) throw new RangeError(`MSR 0x${index.toString(16)} has no register name`);
  return name;
}

/** @throws RangeError for one that has no name */
export function msrValues(msrs: readonly Msr[]): RegisterValue[] {
  return msrs.filter(({ index }) => !LEFT_ALONE.includes(index)).map(({ index, value }) => [msrRegister(index), value]);
}

function segmentValue({ base, limit, selector, ...flags }: X86Segment): [bigint, bigint] {
  const bit = abi.SEGMENT_ATTRIBUTE_BIT;
  const { type, s, dpl, present, avl, l, db, g, unusable } = flags;
  // An unusable segment is one that is not present.
  const attributes =
    (type << bit.segment_type) |
    (s << bit.non_system_segment) |
    (dpl << bit.descriptor_privilege_level) |
    ((unusable !== 0 ? 0 : present) << bit.present) |
    (avl << bit.available) |
    (l << bit._long) |
    (db << bit._default) |
    (g << bit.granularity);
  return [base, BigInt(limit) | (BigInt(selector) << 32n) | (BigInt(attributes) << 48n)];
}

function segmentAt(view: DataView, at: number): X86Segment {
  const attributes = view.getUint16(at + abi.SEGMENT_REGISTER.attributes, true);
  const field = (name: keyof typeof abi.SEGMENT_ATTRIBUTE_BIT, mask = 1) =>
    (attributes >> abi.SEGMENT_ATTRIBUTE_BIT[name]) & mask;
  return {
    base: view.getBigUint64(at + abi.SEGMENT_REGISTER.base, true),
    limit: view.getUint32(at + abi.SEGMENT_REGISTER.limit, true),
    selector: view.getUint16(at + abi.SEGMENT_REGISTER.selector, true),
    type: field('segment_type', 0xf),
    s: field('non_system_segment'),
    dpl: field('descriptor_privilege_level', 3),
    present: field('present'),
    avl: field('available'),
    l: field('_long'),
    db: field('_default'),
    g: field('granularity'),
    unusable: field('present') === 0 ? 1 : 0,
  };
}

export function specialValues(registers: X86SpecialRegisters): RegisterValue[] {
  const entries = <T extends Record<string, number>>(names: T) => Object.entries(names) as [keyof T & string, number][];
  return [
    ...entries(SEGMENTS).map(([field, name]): RegisterValue => [name, ...segmentValue(registers[field])]),
    // struct hv_x64_table_register: three words of padding, the limit, the base.
    ...entries(TABLES).map(([field, name]): RegisterValue => {
      const { base, limit } = registers[field];
      return [name, BigInt(limit) << 48n, base];
    }),
    ...entries(CONTROLS).map(([field, name]): RegisterValue => [name, registers[field]]),
  ];
}

/** @param view the values of {@link SPECIAL_REGISTERS} */
export function specialRegistersAt(view: DataView): X86SpecialRegisters {
  const at = (name: number) => SPECIAL_REGISTERS.indexOf(name) * abi.REGISTER_VALUE_SIZE;
  const read = <T extends Record<string, number>, V>(names: T, value: (at: number) => V) =>
    Object.fromEntries(Object.entries(names).map(([field, name]) => [field, value(at(name))])) as Record<keyof T, V>;
  return {
    ...read(SEGMENTS, (place) => segmentAt(view, place)),
    ...read(TABLES, (place) => ({
      base: view.getBigUint64(place + abi.TABLE_REGISTER.base, true),
      limit: view.getUint16(place + abi.TABLE_REGISTER.limit, true),
    })),
    ...read(CONTROLS, (place) => view.getBigUint64(place, true)),
  };
}

/** @param values in the order of the hypervisor's names: RAX to R15, RIP, RFLAGS */
export function generalRegistersOf(values: readonly bigint[]): X86Registers {
  const entries = Object.entries(GENERAL_REGISTERS).map(([field, name]): [string, bigint] => [
    field,
    values[name - R.RAX],
  ]);
  return Object.fromEntries(entries) as Record<keyof X86Registers, bigint>;
}

export function generalValues(registers: X86Registers): RegisterValue[] {
  const names = Object.entries(GENERAL_REGISTERS) as [keyof X86Registers, number][];
  return names.map(([field, name]) => [name, registers[field]]);
}
