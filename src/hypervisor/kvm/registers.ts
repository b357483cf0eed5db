/** struct kvm_regs and struct kvm_sregs, which struct kvm_sregs2 begins as. */
import type { X86Registers, X86Segment, X86SpecialRegisters } from '../x86-state.js';
import * as abi from './abi.js';

/** The order of struct kvm_regs. */
const REGISTER_ORDER = [
  ...(['rax', 'rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rsp', 'rbp'] as const),
  ...(['r8', 'r9', 'r10', 'r11', 'r12', 'r13', 'r14', 'r15', 'rip', 'rflags'] as const),
];
/** The order of struct kvm_sregs: segments, then the two tables, then the control registers. */
const SEGMENT_ORDER = ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'] as const;
const TABLES_OFFSET = SEGMENT_ORDER.length * abi.SEGMENT_SIZE;
const CONTROL_ORDER = ['cr0', 'cr2', 'cr3', 'cr4', 'cr8', 'efer', 'apicBase'] as const;
const CONTROL_OFFSET = TABLES_OFFSET + 2 * abi.DTABLE_SIZE;

export function writeRegisters(view: DataView, registers: X86Registers): void {
  REGISTER_ORDER.forEach((name, index) => view.setBigUint64(index * 8, registers[name], true));
}

export function readRegisters(view: DataView): X86Registers {
  return Object.fromEntries(
    REGISTER_ORDER.map((name, index) => [name, view.getBigUint64(index * 8, true)]),
  ) as unknown as X86Registers;
}

export function writeSpecialRegisters(view: DataView, registers: X86SpecialRegisters): void {
  SEGMENT_ORDER.forEach((name, index) => writeSegment(view, index * abi.SEGMENT_SIZE, registers[name]));
  [registers.gdt, registers.idt].forEach((table, index) => {
    const at = TABLES_OFFSET + index * abi.DTABLE_SIZE;
    view.setBigUint64(at, table.base, true);
    view.setUint16(at + 8, table.limit, true);
  });
  CONTROL_ORDER.forEach((name, index) => view.setBigUint64(CONTROL_OFFSET + index * 8, registers[name], true));
}

export function readSpecialRegisters(view: DataView): X86SpecialRegisters {
  const table = (index: number) => {
    const at = TABLES_OFFSET + index * abi.DTABLE_SIZE;
    return { base: view.getBigUint64(at, true), limit: view.getUint16(at + 8, true) };
  };
  return {
    ...Object.fromEntries(SEGMENT_ORDER.map((name, index) => [name, readSegment(view, index * abi.SEGMENT_SIZE)])),
    gdt: table(0),
    idt: table(1),
    ...Object.fromEntries(
      CONTROL_ORDER.map((name, index) => [name, view.getBigUint64(CONTROL_OFFSET + index * 8, true)]),
    ),
  } as unknown as X86SpecialRegisters;
}

/** struct kvm_segment. */
function writeSegment(view: DataView, at: number, segment: X86Segment): void {
  view.setBigUint64(at, segment.base, true);
  view.setUint32(at + 8, segment.limit, true);
  view.setUint16(at + 12, segment.selector, true);
  const { type, present, dpl, db, s, l, g, avl, unusable } = segment;
  [type, present, dpl, db, s, l, g, avl, unusable].forEach((value, index) => view.setUint8(at + 14 + index, value));
}

function readSegment(view: DataView, at: number): X86Segment {
  const byte = (index: number) => view.getUint8(at + 14 + index);
  return {
    base: view.getBigUint64(at, true),
    limit: view.getUint32(at + 8, true),
    selector: view.getUint16(at + 12, true),
    type: byte(0),
    present: byte(1),
    dpl: byte(2),
    db: byte(3),
    s: byte(4),
    l: byte(5),
    g: byte(6),
    avl: byte(7),
    unusable: byte(8),
  };
}
