/** Random cases: an instruction, the state before it, and memory around its operand. */
import { RAX, RCX, RDX, RDI, RFLAGS, RIP, RSI, RSP } from '../../src/hypervisor/mshv/emulator/cpu.js';
import { type CheckForm, GROUPS } from './instruction-check-forms.js';
import {
  CODE,
  type Controls,
  LOW_WINDOWS,
  type Mode,
  MODES,
  PAGE,
  STACK,
  TARGET,
  WINDOW,
  WINDOW_PAGES,
  WINDOWS,
} from './instruction-check-machine.js';

/** The port that IN, OUT and their strings use: nothing in the kernel has it. */
export const DEVICE_PORT = 0xc0;

const MAX_LENGTH = 15;
/** Cases of each instruction, beyond the first. */
const VARIATIONS = 2;
const IOPL_3 = 3 << 12;
const STATUS = 0x8d5;
const DF = 1 << 10;
const AC = 1 << 18;

/** Small and quick, and the same everywhere (mulberry32). */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed | 0;
  }

  word(): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return (mixed ^ (mixed >>> 14)) >>> 0;
  }

  below(limit: number): number {
    return this.word() % limit;
  }

  chance(percent: number): boolean {
    return this.below(100) < percent;
  }

  pick<T>(values: readonly T[]): T {
    return values[this.below(values.length)];
  }

  /** A value of 32 bits, often one at an edge. */
  value(): number {
    const kind = this.below(8);
    if (kind === 0) return 0;
    if (kind === 1) return 0xffff_ffff;
    if (kind === 2) return (1 << this.below(32)) >>> 0;
    if (kind === 3) return this.below(256);
    return this.word();
  }
}

export class Case {
  mode: Mode = MODES[0];
  controls: Controls = { wp: false, smep: false, smap: false, nx: false };
  fsBase = 0n;
  gsBase = 0n;
  form: CheckForm = GROUPS[0][0];
  readonly bytes = new Uint8Array(MAX_LENGTH);
  length = 0;
  /** How many of the bytes the emulator is given. */
  given = 0;
  /** Linear address behind the instruction. */
  end = 0;
  readonly words = new Uint32Array(36);
  readonly xmm = new Uint8Array(256);
  undefinedFlags = 0;
  /** A page of the window whose table entry is the case's own. */
  oddPage = -1;
  oddLow = 0;
  oddHigh = 0;
  /** Physical address of the operand where the window is plainly mapped, and what is put there. */
  operand = WINDOW;
  readonly data = new Uint8Array(64);
  dataLength = 0;
}

export class Generator {
  readonly case = new Case();
  #mode: Mode = MODES[0];
  #at = 0;
  #variations = 0;

  constructor(
    private readonly random: Random,
    private readonly features: { readonly smep: boolean; readonly smap: boolean; readonly movbe: boolean },
  ) {}

  /** A mode, controls and segment bases for the cases that follow. */
  chooseMode(mode: Mode): void {
    const { random, case: c } = this;
    this.#mode = mode;
    this.#variations = 0;
    c.mode = mode;
    const supervisor = mode.ring === 0 && mode.paging !== 'none';
    c.controls = {
      wp: random.chance(70),
      smep: supervisor && this.features.smep && random.chance(30),
      smap: supervisor && this.features.smap && random.chance(40),
      nx: random.chance(60),
    };
    c.fsBase = random.pick([0n, 0x1230n, 0xffff_8000_0000_1000n]);
    c.gsBase = random.pick([0n, 0x7_0000n, 0xffff_ffff_ffff_f000n]);
  }

  next(): Case {
    const { case: c } = this;
    if (this.#variations > 0) {
      // The same instruction with other flags and data: decoding takes longest.
      this.#variations--;
      this.#state();
      if (c.form.special !== 'branch') this.#fill();
      return c;
    }
    const lastEnd = c.end;
    do this.#fresh();
    while (
      // Where the last case's OUT was, KVM would take this instruction for it and skip it.
      c.end - c.length ===
      lastEnd
    );
    this.#variations = VARIATIONS;
    return c;
  }

  #fresh(): void {
    const { random, case: c } = this;
    let form: CheckForm;
    do form = random.pick(random.pick(GROUPS));
    while (
      (form.longOnly === true && this.#mode.bits !== 64) ||
      (form.movbe === true && (!this.features.movbe || this.#mode.bits === 16))
    );
    c.form = form;
    c.undefinedFlags = form.undefinedFlags ?? 0;
    for (let index = 0; index < 32; index++) c.words[index] = random.value();
    // The upper halves of what is no 64-bit register are not there.
    if (this.#mode.bits !== 64) for (let index = 0; index < 16; index++) c.words[index * 2 + 1] = 0;
    if (this.#mode.bits !== 64) c.words.fill(0, 16, 32);
    this.#stack();
    this.#state();
    this.#place();
    this.#encode(form);
    this.#set(RIP, BigInt(c.end - c.length - c.mode.codeBase));
  }

  /** Flags, vector registers, page tables, and how much of the instruction is given. */
  #state(): void {
    const { random, case: c } = this;
    c.words[RFLAGS * 2] = (random.word() & (STATUS | AC)) | (random.chance(30) ? DF : 0) | IOPL_3 | 2;
    c.words[RFLAGS * 2 + 1] = 0;
    if (c.form.vector === true) {
      for (let at = 0; at < c.xmm.length; at += 4) {
        const word = random.word();
        c.xmm[at] = word;
        c.xmm[at + 1] = word >>> 8;
        c.xmm[at + 2] = word >>> 16;
        c.xmm[at + 3] = word >>> 24;
      }
    }
    this.#oddPage();
    c.given = random.chance(50) ? MAX_LENGTH : random.chance(50) ? 0 : random.below(MAX_LENGTH);
  }

  #stack(): void {
    const { mode } = this.case;
    const pushes = this.case.form.special === 'stack' || this.case.form.special === 'branch';
    // Where an exception is pushed elsewhere, the stack may be anywhere.
    if (pushes && (mode.paging === 'long' || mode.ring === 3) && this.random.chance(40)) {
      this.#segmentUsed = 0;
      this.#set(RSP, this.#target(8, 8));
      return;
    }
    const linear = STACK + 0x100 + this.random.below(0x400) * 2;
    this.#set(RSP, BigInt(linear - mode.base));
  }

  #set(register: number, value: bigint): void {
    const { words, mode } = this.case;
    const cut = BigInt.asUintN(mode.bits === 64 ? 64 : 32, value);
    words[register * 2] = Number(cut & 0xffff_ffffn);
    words[register * 2 + 1] = Number(cut >> 32n);
  }

  /** A share of cases has a page that is not there, or not for this access. */
  #oddPage(): void {
    const { random, case: c } = this;
    c.oddPage = -1;
    if (c.mode.paging === 'none' || random.chance(65)) return;
    c.oddPage = random.below(WINDOW_PAGES);
    const page = WINDOW + random.below(4) * PAGE;
    const rights = random.word() & 0x66;
    c.oddLow = page | (random.chance(75) ? 1 : 0) | (random.chance(50) ? 6 : rights) | (rights & 0x60);
    // What a branch reads must be what was put there.
    if (c.form.special === 'branch') c.oddLow = (c.oddLow & 0xfff) | (WINDOW + c.oddPage * PAGE);
    c.oddHigh = 0;
    if (c.mode.paging === 'legacy') return;
    if (random.chance(15)) c.oddHigh = 0x8000_0000;
    if (c.mode.paging === 'pae' && random.chance(5)) c.oddHigh |= 1 << (20 + random.below(11));
  }

  // Encoding.

  #emit(...bytes: number[]): void {
    for (const byte of bytes) this.case.bytes[this.#at++] = byte;
  }

  #emitValue(value: bigint, size: number): void {
    for (let byte = 0; byte < size; byte++) this.#emit(Number((value >> BigInt(8 * byte)) & 0xffn));
  }

  #encode(form: CheckForm): void {
    const { random, case: c } = this;
    const { bits } = c.mode;
    this.#at = 0;
    const sized = form.size === 'v';
    // With 16 bits a branch does not reach the code outside 16-bit modes.
    const small = sized && form.wide !== true && (form.special !== 'branch' || bits === 16) && random.chance(30);
    let operand =
      form.size === 'b' ? 1 : form.size === 'v' ? (bits === 16 ? (small ? 4 : 2) : small ? 2 : 4) : form.size;
    if (form.wide === true && bits === 16) operand = 4;
    const rexW = bits === 64 && form.noRexW !== true && form.vector !== true && sized && random.chance(35);
    if (rexW) operand = 8;
    const pushes = form.special === 'stack' || form.special === 'branch';
    if (pushes && bits === 64) operand = small && form.special === 'stack' && !rexW ? 2 : 8;
    // Addresses of 16 bits do not reach the window from 32-bit code: a branch would go anywhere; and KVM, which carries out
    // port strings by itself, does not let them wrap.
    const far = form.special === 'branch' || (form.special === 'string' && (form.opcode[0] & ~3) === 0x6c);
    const other = random.chance(20) && !(far && bits === 32);
    const addressSize = bits === 64 ? (other ? 4 : 8) : bits === 32 ? (other ? 2 : 4) : other ? 4 : 2;
    const defaultSize = bits === 16 ? 2 : 4;
    const prefixed = sized && form.wide !== true && operand !== 8 && operand !== defaultSize;
    if (form.lock === true && random.chance(25)) this.#emit(0xf0);
    const segment = random.chance(25)
      ? random.pick(bits === 64 ? [0x64, 0x65] : [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65])
      : 0;
    // Code segments cannot be written outside real mode; QEMU's TCG does not look.
    this.#segment(segment === 0x2e && (c.mode.real !== true || form.special === 'branch') ? 0 : segment);
    if (prefixed) this.#emit(0x66);
    if (other) this.#emit(0x67);
    const repeat = form.special === 'string' ? random.pick([0, 0xf3, 0xf2]) : 0;
    if (repeat !== 0 && !(repeat === 0xf2 && !this.#compares(form))) this.#emit(repeat);
    if (form.prefix !== undefined) this.#emit(form.prefix);
    if (form.digit === 'none') {
      if (bits === 64 && rexW) this.#emit(0x48);
      this.#emit(...form.opcode);
      this.#implicit(form, operand, addressSize);
    } else this.#withModrm(form, operand, addressSize, rexW);
    c.length = this.#at;
    c.bytes.fill(0, c.length);
  }

  #segmentUsed = 0;
  #segment(prefix: number): void {
    this.#segmentUsed = prefix;
    if (prefix !== 0) this.#emit(prefix);
  }

  #compares(form: CheckForm): boolean {
    const opcode = form.opcode[0] & ~1;
    return opcode === 0xa6 || opcode === 0xae;
  }

  /** Offset of an operand: where its pages are, at an edge of one, or anywhere. */
  #target(operand: number, addressSize: number): bigint {
    const { random, case: c } = this;
    const { mode } = c;
    const windows = mode.bits === 32 && mode.paging === 'long' ? LOW_WINDOWS : WINDOWS[mode.paging];
    let high = mode.bits === 16 ? 0n : random.pick(windows);
    if (addressSize === 4 && high > 0xffff_ffffn) high = 0n;
    const page = WINDOW + random.below(WINDOW_PAGES) * PAGE;
    const edge = random.chance(35);
    const within = edge
      ? PAGE - 1 - random.below(operand + 2)
      : random.below(PAGE - 64) & (random.chance(60) ? ~15 : ~0);
    c.operand = page + within;
    const base =
      mode.bits === 64
        ? this.#segmentUsed === 0x64
          ? c.fsBase
          : this.#segmentUsed === 0x65
            ? c.gsBase
            : 0n
        : this.#segmentUsed === 0x2e
          ? BigInt(mode.codeBase)
          : BigInt(mode.base);
    return high + BigInt(page + within) - base;
  }

  /** What an addressing mode of 16 bits can reach is little: only with a base. */
  #withModrm(form: CheckForm, operand: number, addressSize: number, rexW: boolean): void {
    const { random, case: c } = this;
    const { bits } = c.mode;
    const offset = this.#target(operand, addressSize);
    const long = bits === 64;
    const reg = typeof form.digit === 'number' ? form.digit : random.below(long ? 16 : 8);
    if (addressSize === 2) {
      const mod = random.pick([0, 1, 2, 2]);
      const rm = random.below(8);
      this.#emit(...form.opcode, (mod << 6) | ((reg & 7) << 3) | rm);
      const bases: number[][] = [[3, 6], [3, 7], [5, 6], [5, 7], [6], [7], [5], [3]];
      const registers = mod === 0 && rm === 6 ? [] : bases[rm];
      const size = mod === 0 ? (registers.length === 0 ? 2 : 0) : mod;
      const displacement = size === 0 ? 0 : registers.length === 0 ? Number(BigInt.asIntN(17, offset)) : random.word();
      this.#emitValue(BigInt(displacement), size);
      const signed = size === 1 ? (displacement << 24) >> 24 : displacement & 0xffff;
      const second = registers.length === 2 ? c.words[registers[1] * 2] : 0;
      if (registers.length > 0) {
        const low = Number(BigInt.asUintN(16, offset - BigInt(signed) - BigInt(second)));
        c.words[registers[0] * 2] = ((c.words[registers[0] * 2] & 0xffff_0000) | low) >>> 0;
      }
    } else {
      const absolute = random.chance(8) && !long;
      const ripRelative = long && random.chance(10);
      const base = this.#pickBase(form, long);
      const withIndex = !absolute && !ripRelative && (random.chance(40) || (base & 7) === 4);
      let index = withIndex ? random.below(long ? 16 : 8) : 4;
      if (index === base) index = 4;
      const scale = random.below(4);
      const mod = absolute || ripRelative ? 0 : (base & 7) === 5 ? 1 + random.below(2) : random.below(3);
      const displacementSize = absolute || ripRelative ? 4 : mod === 0 ? 0 : mod === 1 ? 1 : 4;
      const rex = 0x40 | (rexW ? 8 : 0) | (reg >= 8 ? 4 : 0) | (index >= 8 ? 2 : 0) | (base >= 8 && !absolute ? 1 : 0);
      if (long && (rex !== 0x40 || random.chance(20))) this.#emit(rex);
      const rm = absolute || ripRelative ? 5 : withIndex ? 4 : base & 7;
      this.#emit(...form.opcode, (mod << 6) | ((reg & 7) << 3) | rm);
      if (withIndex) this.#emit((scale << 6) | ((index & 7) << 3) | (base & 7));
      let displacement = displacementSize === 1 ? BigInt(random.below(256) - 128) : BigInt(random.word() | 0);
      if (absolute) displacement = BigInt.asIntN(32, offset);
      // From the end of the instruction, which is where the case has its end.
      if (ripRelative) displacement = BigInt.asIntN(32, offset - BigInt(c.end));
      this.#emitValue(displacement, displacementSize);
      if (displacementSize === 0) displacement = 0n;
      if (!absolute && !ripRelative) {
        let rest = offset - displacement;
        if (withIndex && index !== 4) {
          const value = BigInt(c.words[index * 2]) | (BigInt(c.words[index * 2 + 1]) << 32n);
          rest -= value << BigInt(scale);
        }
        // An address of 4 bytes leaves the register's upper half to chance.
        if (addressSize === 4 && long) c.words[base * 2] = Number(BigInt.asUintN(32, rest));
        else this.#set(base, rest);
      }
    }
    this.#immediate(form, operand);
    this.#operandData(form, operand, reg);
  }

  /** Not the stack pointer where an exception would be pushed there. */
  #pickBase(form: CheckForm, long: boolean): number {
    for (;;) {
      const base = this.random.below(long ? 16 : 8);
      if (base !== RSP || (long && form.special === undefined)) return base;
    }
  }

  #immediate(form: CheckForm, operand: number): void {
    const { random } = this;
    if (form.immediate === 1) this.#emitValue(BigInt(random.value()), 1);
    else if (form.immediate === 'z') this.#emitValue(BigInt(random.value()), Math.min(operand, 4));
  }

  /** Registers and data that an instruction needs for more than garbage. */
  #operandData(form: CheckForm, operand: number, reg: number): void {
    const { random, case: c } = this;
    c.dataLength = operand >= 8 ? 16 : 8;
    this.#fill();
    if (form.special === 'branch') {
      const target = TARGET - c.mode.codeBase;
      c.data.fill(0, 0, 8);
      for (let byte = 0; byte < 4; byte++) c.data[byte] = target >>> (8 * byte);
    } else if (form.special === 'bit' && random.chance(70)) {
      c.words[reg * 2] = (random.below(256) - 128) >>> 0;
      if (c.mode.bits === 64) c.words[reg * 2 + 1] = c.words[reg * 2] >>> 31 === 0 ? 0 : 0xffff_ffff;
    } else if (form.opcode[1] === 0xb0 || form.opcode[1] === 0xb1) {
      // CMPXCHG that finds what it expects.
      if (random.chance(50))
        for (let byte = 0; byte < 8; byte++) c.data[byte] = c.words[byte >> 2] >>> (8 * (byte & 3));
    }
  }

  #fill(): void {
    for (let index = 0; index < 16; index++) this.case.data[index] = this.random.value();
  }

  #implicit(form: CheckForm, operand: number, addressSize: number): void {
    const { random, case: c } = this;
    const { bits } = c.mode;
    this.#operandData(form, operand, 0);
    if (form.immediate === 'a') {
      this.#emitValue(this.#target(operand, addressSize), addressSize);
    } else if (form.special === 'port') {
      if (form.immediate === 1) this.#emit(DEVICE_PORT);
      c.words[RDX * 2] = ((c.words[RDX * 2] & 0xffff_0000) | DEVICE_PORT) >>> 0;
    } else if (form.special === 'string') {
      c.words[RDX * 2] = ((c.words[RDX * 2] & 0xffff_0000) | DEVICE_PORT) >>> 0;
      const count = random.below(10);
      const pointer = (register: number, value: bigint) => {
        const low = BigInt.asUintN(addressSize * 8, value);
        const at = register * 2;
        if (addressSize === 2) c.words[at] = ((c.words[at] & 0xffff_0000) | Number(low)) >>> 0;
        else if (addressSize === 4) c.words[at] = Number(low);
        else {
          c.words[at] = Number(low & 0xffff_ffffn);
          c.words[at + 1] = Number(low >> 32n);
        }
      };
      // Where upper halves stay or go with a prefix, processors differ.
      if (bits === 64 && addressSize === 4) for (const register of [RSI, RDI, RCX]) c.words[register * 2 + 1] = 0;
      pointer(RCX, BigInt(count));
      pointer(RSI, this.#target(operand, addressSize));
      this.#segmentUsed = 0;
      pointer(RDI, this.#target(operand, addressSize));
      // Comparisons that go on for a while.
      if (this.#compares(form) && random.chance(50)) c.words[RAX * 2] = 0;
    }
  }

  /** In the first code page, or over its edge. */
  #place(): void {
    this.case.end = this.random.chance(80) ? CODE + 0x800 : CODE + PAGE + 1 + this.random.below(6);
  }
}
