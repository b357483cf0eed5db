/** The instruction forms that the check generates, as opcode bytes (Intel SDM volume 2, appendix A). */
import { Flag } from '../../src/hypervisor/mshv/emulator/cpu.js';

export interface CheckForm {
  readonly opcode: readonly number[];
  /** A prefix that is part of the opcode. */
  readonly prefix?: number;
  /** The ModRM byte's reg field, where it is part of the opcode; 'none': no ModRM. */
  readonly digit?: number | 'none';
  /** Operand size: a byte; by prefixes; or fixed in bytes. */
  readonly size: 'b' | 'v' | 4 | 8 | 16 | 2;
  /** By prefixes, but never 16 bits. */
  readonly wide?: boolean;
  /** Bytes of an immediate; 'z': of the operand, at most 4; 'a': of an address. */
  readonly immediate?: 1 | 'z' | 'a';
  readonly lock?: boolean;
  /** Whether it reads and writes memory. */
  readonly modifies?: boolean;
  readonly longOnly?: boolean;
  readonly vector?: boolean;
  /** MOVBE: not every processor has it, and QEMU's TCG takes the wrong operand size in 16-bit code. */
  readonly movbe?: boolean;
  /** Where REX.W makes another instruction of it. */
  readonly noRexW?: boolean;
  readonly special?: 'string' | 'stack' | 'branch' | 'port' | 'bit' | 'shift';
  /** Flags that are not compared: the architecture leaves them undefined, and QEMU's TCG is not the processors. */
  readonly undefinedFlags?: number;
}

const { AF, OF, SF, PF, CF } = Flag;

function alu(): CheckForm[] {
  const forms: CheckForm[] = [];
  for (let operation = 0; operation < 8; operation++) {
    const lock = operation !== 7;
    const base = operation * 8;
    // Logic leaves AF undefined.
    const undefinedFlags = operation === 1 || operation === 4 || operation === 6 ? AF : 0;
    forms.push(
      { opcode: [base], size: 'b', lock, undefinedFlags },
      { opcode: [base + 1], size: 'v', lock, undefinedFlags },
    );
    forms.push({ opcode: [base + 2], size: 'b', undefinedFlags }, { opcode: [base + 3], size: 'v', undefinedFlags });
    const digit = operation;
    forms.push({ opcode: [0x80], digit, size: 'b', immediate: 1, lock, undefinedFlags });
    forms.push({ opcode: [0x81], digit, size: 'v', immediate: 'z', lock, undefinedFlags });
    forms.push({ opcode: [0x83], digit, size: 'v', immediate: 1, lock, undefinedFlags });
  }
  return forms;
}

function shifts(): CheckForm[] {
  return [4, 5, 6, 7].flatMap((digit): CheckForm[] =>
    [0xc0, 0xc1, 0xd0, 0xd1, 0xd2, 0xd3].map((opcode) => ({
      opcode: [opcode],
      digit,
      size: (opcode & 1) === 0 ? 'b' : 'v',
      ...(opcode < 0xd0 ? { immediate: 1 as const } : {}),
      special: 'shift',
      // OF is defined for shifts by one alone, CF for those by less than the operand's width.
      undefinedFlags: opcode === 0xd0 || opcode === 0xd1 ? AF : AF | OF | CF,
    })),
  );
}

function bits(): CheckForm[] {
  const undefinedFlags = OF | SF | AF | PF;
  return [4, 5, 6, 7].flatMap((digit): CheckForm[] => [
    { opcode: [0x0f, 0x83 + digit * 8], size: 'v', special: 'bit', lock: digit !== 4, undefinedFlags },
    { opcode: [0x0f, 0xba], digit, size: 'v', immediate: 1, lock: digit !== 4, undefinedFlags },
  ]);
}

function vectors(): CheckForm[] {
  const forms: CheckForm[] = [];
  const add = (prefix: number | undefined, size: 4 | 8 | 16, ...opcodes: number[]) => {
    for (const opcode of opcodes) {
      forms.push({ opcode: [0x0f, opcode], size, vector: true, ...(prefix === undefined ? {} : { prefix }) });
    }
  };
  add(undefined, 16, 0x10, 0x11, 0x28, 0x29, 0x2b);
  add(0x66, 16, 0x10, 0x11, 0x28, 0x29, 0x2b, 0x6f, 0x7f, 0xe7);
  add(0xf3, 16, 0x6f, 0x7f);
  add(0xf2, 16, 0xf0);
  add(0xf3, 4, 0x10, 0x11);
  add(0xf2, 8, 0x10, 0x11);
  add(0xf3, 8, 0x7e);
  add(0x66, 8, 0xd6, 0x12, 0x13, 0x16, 0x17);
  add(undefined, 8, 0x12, 0x13, 0x16, 0x17);
  add(0x66, 4, 0x6e, 0x7e);
  forms.push({ opcode: [0x0f, 0x38, 0x2a], prefix: 0x66, size: 16, vector: true });
  return forms;
}

const strings: readonly CheckForm[] = [0xa4, 0xa6, 0xaa, 0xac, 0xae, 0x6c, 0x6e].flatMap((opcode): CheckForm[] => [
  { opcode: [opcode], digit: 'none', size: 'b', special: 'string' },
  { opcode: [opcode + 1], digit: 'none', size: 'v', special: 'string' },
]);

const conditions: readonly CheckForm[] = Array.from({ length: 16 }, (_, condition): CheckForm[] => [
  { opcode: [0x0f, 0x90 + condition], digit: 0, size: 'b' },
  { opcode: [0x0f, 0x40 + condition], size: 'v' },
]).flat();

const ALL: readonly (readonly CheckForm[])[] = [
  [
    { opcode: [0x88], size: 'b' },
    { opcode: [0x89], size: 'v' },
    { opcode: [0x8a], size: 'b' },
    { opcode: [0x8b], size: 'v' },
    { opcode: [0xc6], digit: 0, size: 'b', immediate: 1 },
    { opcode: [0xc7], digit: 0, size: 'v', immediate: 'z' },
    { opcode: [0xa0], digit: 'none', size: 'b', immediate: 'a' },
    { opcode: [0xa1], digit: 'none', size: 'v', immediate: 'a' },
    { opcode: [0xa2], digit: 'none', size: 'b', immediate: 'a' },
    { opcode: [0xa3], digit: 'none', size: 'v', immediate: 'a' },
  ],
  [
    { opcode: [0x0f, 0xb6], size: 'v' },
    { opcode: [0x0f, 0xb7], size: 'v' },
    { opcode: [0x0f, 0xbe], size: 'v' },
    { opcode: [0x0f, 0xbf], size: 'v' },
    // With 16 bits, QEMU's TCG reads 32.
    { opcode: [0x63], size: 'v', wide: true, longOnly: true },
    { opcode: [0x0f, 0xc3], size: 'v', wide: true },
    { opcode: [0x0f, 0x38, 0xf0], size: 'v', movbe: true },
    { opcode: [0x0f, 0x38, 0xf1], size: 'v', movbe: true },
  ],
  alu(),
  alu(),
  [
    { opcode: [0x84], size: 'b', undefinedFlags: AF },
    { opcode: [0x85], size: 'v', undefinedFlags: AF },
    { opcode: [0xf6], digit: 0, size: 'b', immediate: 1, undefinedFlags: AF },
    { opcode: [0xf7], digit: 0, size: 'v', immediate: 'z', undefinedFlags: AF },
    { opcode: [0xf6], digit: 2, size: 'b', lock: true },
    { opcode: [0xf7], digit: 2, size: 'v', lock: true },
    { opcode: [0xf6], digit: 3, size: 'b', lock: true },
    { opcode: [0xf7], digit: 3, size: 'v', lock: true },
    { opcode: [0xfe], digit: 0, size: 'b', lock: true },
    { opcode: [0xff], digit: 0, size: 'v', lock: true },
    { opcode: [0xfe], digit: 1, size: 'b', lock: true },
    { opcode: [0xff], digit: 1, size: 'v', lock: true },
  ],
  [
    { opcode: [0x86], size: 'b', lock: true },
    { opcode: [0x87], size: 'v', lock: true },
    { opcode: [0x0f, 0xb0], size: 'b', lock: true },
    { opcode: [0x0f, 0xb1], size: 'v', lock: true },
    { opcode: [0x0f, 0xc0], size: 'b', lock: true },
    { opcode: [0x0f, 0xc1], size: 'v', lock: true },
  ],
  bits(),
  shifts(),
  conditions,
  strings,
  strings,
  vectors(),
  [
    { opcode: [0xff], digit: 6, size: 'v', special: 'stack' },
    { opcode: [0x8f], digit: 0, size: 'v', special: 'stack' },
    { opcode: [0xff], digit: 2, size: 'v', special: 'branch' },
    { opcode: [0xff], digit: 4, size: 'v', special: 'branch' },
  ],
  [
    { opcode: [0xe4], digit: 'none', size: 'b', immediate: 1, special: 'port' },
    { opcode: [0xe5], digit: 'none', size: 'v', immediate: 1, special: 'port', noRexW: true },
    { opcode: [0xe6], digit: 'none', size: 'b', immediate: 1, special: 'port' },
    { opcode: [0xe7], digit: 'none', size: 'v', immediate: 1, special: 'port', noRexW: true },
    { opcode: [0xec], digit: 'none', size: 'b', special: 'port' },
    { opcode: [0xed], digit: 'none', size: 'v', special: 'port', noRexW: true },
    { opcode: [0xee], digit: 'none', size: 'b', special: 'port' },
    { opcode: [0xef], digit: 'none', size: 'v', special: 'port', noRexW: true },
  ],
];

/** Groups are chosen evenly, then forms in them: rare and common ones alike get their share. */
export const GROUPS: readonly (readonly CheckForm[])[] = ALL.map((forms) =>
  forms.map((form) => ({ ...form, modifies: form.lock === true || form.special === 'shift' })),
);
