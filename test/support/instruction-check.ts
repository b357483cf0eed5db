/**
 * Runs random instructions on KVM and in the emulator, and compares: registers, flags, memory with the page tables' flags,
 * ports, and faults. On KVM the device's pages are RAM; for the emulator they are a device that answers with the same bytes.
 *
 * Arguments: how many cases, and the seed. Differences are printed; the last line counts them.
 */
import { setFlagsFromString } from 'node:v8';
import { ExitKind } from '../../src/hypervisor/hypervisor.js';
import { RCX, RDI, RFLAGS, RIP, RSP } from '../../src/hypervisor/mshv/emulator/cpu.js';
import { disassemble } from '../../src/hypervisor/mshv/emulator/decoder.js';
import {
  Emulator,
  type EmulatorCpu,
  type EmulatorMemory,
  type EmulatorSegment,
  Outcome,
} from '../../src/hypervisor/mshv/emulator/emulator.js';
import { type Case, DEVICE_PORT, Generator, Random } from './instruction-check-cases.js';
import * as machine from './instruction-check-machine.js';
import { KvmMachine, MODES, PAGE, type SegmentName, type SegmentState } from './instruction-check-machine.js';

// The lab's processor has protection keys but no XSAVE to switch them with: WebAssembly that they protect crashes.
if (process.env['VMM_IN_LAB'] !== undefined) setFlagsFromString('--no-wasm-memory-protection-keys');

const CASES_PER_MODE = 50;
const MAX_PRINTED = 20;
const RF = 1 << 16;
const SEGMENT_ORDER: readonly SegmentName[] = ['es', 'cs', 'ss', 'ds', 'fs', 'gs'];
const REGISTERS = 'rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rip rflags'.split(' ');
/** Vectors with error codes. */
const WITH_ERROR = new Set([8, 10, 11, 12, 13, 14, 17]);
const VECTOR_SS = 12;
const VECTOR_GP = 13;
const VECTOR_PF = 14;
const ERROR_WRITE = 2;
const ERROR_RESERVED = 8;

/** What came of a case. */
class Result {
  /** -1: none. */
  vector = -1;
  errorCode = 0;
  cr2 = 0n;
  readonly words = new Uint32Array(36);
  readonly xmm = new Uint8Array(256);
  /** Sizes and values that ports were written with, and how often they were read. */
  readonly ports: string[] = [];
  portReads = 0;
  /** Why there is nothing to compare. */
  skipped = '';

  clear(): void {
    this.vector = -1;
    this.errorCode = 0;
    this.cr2 = 0n;
    this.ports.length = 0;
    this.portReads = 0;
    this.skipped = '';
  }
}

function portAnswer(read: number): number {
  return Math.imul(read + 1, 0x9e37_79b1) >>> 0;
}

class CheckCpu implements EmulatorCpu {
  readonly words: Uint32Array;
  readonly segments: EmulatorSegment[] = SEGMENT_ORDER.map(() => ({
    baseLow: 0,
    baseHigh: 0,
    limit: 0xffff_ffff,
    selector: 0,
    attributes: 0,
  }));
  cr0 = 0;
  cr3Low = 0;
  cr3High = 0;
  cr4 = 0;
  eferLow = 0;

  constructor(private readonly result: Result) {
    this.words = result.words;
  }

  load(): void {
    // They are here.
  }

  setMode(c: Case, segments: Record<SegmentName, SegmentState>): void {
    const { cr0, cr4, efer } = machine.controlRegisters(c.mode, c.controls);
    this.cr0 = cr0;
    this.cr4 = cr4;
    this.eferLow = efer;
    this.cr3Low = machine.cr3Of(c.mode.paging);
    SEGMENT_ORDER.forEach((name, index) => {
      const { base, selector, attributes } = segments[name];
      const segment = this.segments[index];
      segment.baseLow = Number(base & 0xffff_ffffn);
      segment.baseHigh = Number(base >> 32n);
      segment.selector = selector;
      segment.attributes = attributes;
    });
  }

  loadVector(index: number, into: Uint8Array): void {
    into.fill(0);
    into.set(this.result.xmm.subarray(index * 16, index * 16 + 16));
  }

  storeVector(index: number, from: Uint8Array): void {
    this.result.xmm.set(from.subarray(0, 16), index * 16);
  }
}

/** RAM but for the device's pages. */
class CheckMemory implements EmulatorMemory {
  readonly bytes = new Uint8Array(machine.RAM_SIZE);

  #has(address: number, length: number): boolean {
    return (
      address + length <= machine.RAM_SIZE && (address >= machine.DEVICE_END || address + length <= machine.DEVICE)
    );
  }

  read(address: number, into: Uint8Array, length: number): boolean {
    if (!this.#has(address, length)) return false;
    for (let index = 0; index < length; index++) into[index] = this.bytes[address + index];
    return true;
  }

  write(address: number, from: Uint8Array, length: number): boolean {
    if (!this.#has(address, length)) return false;
    for (let index = 0; index < length; index++) this.bytes[address + index] = from[index];
    return true;
  }
}

class Check {
  readonly random: Random;
  readonly generator: Generator;
  readonly kvm = new KvmMachine();
  readonly memory = new CheckMemory();
  readonly theirs = new Result();
  readonly ours = new Result();
  readonly cpu = new CheckCpu(this.ours);
  readonly emulator = new Emulator(this.cpu, this.memory);
  readonly base = new Uint8Array(machine.RAM_SIZE);
  readonly counts = new Map<string, number>();
  cases = 0;
  differences = 0;

  constructor(seed: number) {
    this.random = new Random(seed);
    const features7 = this.kvm.features.find((entry) => entry.function === 7 && entry.index === 0)?.ebx ?? 0;
    const features1 = this.kvm.features.find((entry) => entry.function === 1)?.ecx ?? 0;
    this.generator = new Generator(this.random, {
      smep: (features7 & (1 << 7)) !== 0,
      smap: (features7 & (1 << 20)) !== 0,
      movbe: (features1 & (1 << 22)) !== 0,
    });
    machine.initialize(this.base);
    for (let at = machine.WINDOW; at < machine.STACK + PAGE; at++) this.base[at] = this.random.word();
    this.kvm.memory.set(this.base);
    this.memory.bytes.set(this.base);
  }

  count(what: string): void {
    this.counts.set(what, (this.counts.get(what) ?? 0) + 1);
  }

  run(cases: number): void {
    for (let mode = 0; this.cases < cases; mode++) {
      const c = this.generator.case;
      this.generator.chooseMode(MODES[mode % MODES.length]);
      const segments = machine.segmentsOf(c.mode, c.fsBase, c.gsBase);
      this.kvm.setMode(c.mode, c.controls, segments, this.base);
      this.cpu.setMode(c, segments);
      for (let count = 0; count < CASES_PER_MODE && this.cases < cases; count++) this.#one(this.generator.next());
    }
  }

  #one(c: Case): void {
    this.#prepare(this.kvm.memory, c);
    this.#prepare(this.memory.bytes, c);
    this.theirs.clear();
    this.ours.clear();
    this.#runKvm(c);
    if (this.theirs.skipped === '') this.#runEmulator(c);
    const skipped = this.theirs.skipped || this.ours.skipped;
    if (skipped !== '') {
      this.count(`skipped, ${skipped}`);
      this.#synchronize();
      return;
    }
    this.cases++;
    this.count(this.ours.vector < 0 ? 'done' : `vector ${this.ours.vector}`);
    const differences = this.#compare(c);
    if (differences.length > 0) {
      if (this.differences++ < MAX_PRINTED) this.#print(c, differences);
      this.#synchronize();
    }
  }

  #synchronize(): void {
    this.memory.bytes.set(this.kvm.memory);
  }

  #prepare(memory: Uint8Array, c: Case): void {
    const { mode } = c;
    memory.set(this.base.subarray(0, machine.SYSTEM_END));
    memory.set(this.base.subarray(machine.TARGET, machine.TARGET + 4), machine.TARGET);
    memory.set(this.base.subarray(machine.TABLES, machine.TABLES_END), machine.TABLES);
    if (mode.paging !== 'none') {
      const table = machine.pageTableOf(mode.paging);
      const size = mode.paging === 'legacy' ? 4 : 8;
      const supervisor = mode.ring === 0;
      for (const page of [machine.CODE, machine.CODE + PAGE, machine.STACK]) {
        const at = table + (page / PAGE) * size;
        memory[at] |= page === machine.STACK ? 0 : 0x60;
        if (supervisor) memory[at] &= ~4;
      }
      if (c.oddPage >= 0) {
        const at = table + (machine.WINDOW / PAGE + c.oddPage) * size;
        const view = new DataView(memory.buffer, memory.byteOffset);
        view.setUint32(at, c.oddLow, true);
        if (size === 8) view.setUint32(at + 4, c.oddHigh, true);
      }
    }
    memory.set(c.data.subarray(0, c.dataLength), c.operand);
    memory.set(c.bytes.subarray(0, c.length), c.end - c.length);
    memory.set([0xe6, machine.PORT_END, 0xeb, 0xfc], c.end);
  }

  #runKvm(c: Case): void {
    const { kvm, theirs } = this;
    if (c.form.vector === true) {
      kvm.fpu.set(c.xmm, machine.XMM_AT);
      kvm.setFpu();
    }
    kvm.setRegisters(c.words);
    const { vcpu } = kvm;
    for (;;) {
      const kind = vcpu.run();
      if (kind === ExitKind.Interrupted || kind === ExitKind.Handled) continue;
      const { exit } = vcpu;
      if (kind === ExitKind.PortWrite && exit.address !== DEVICE_PORT) {
        if (exit.address < machine.VECTORS) theirs.vector = exit.address;
        break;
      }
      if (kind === ExitKind.PortWrite) {
        for (let index = 0; index < exit.count; index++) theirs.ports.push(`${exit.size}:${vcpu.data(index)}`);
      } else if (kind === ExitKind.PortRead) {
        for (let index = 0; index < exit.count; index++) vcpu.setData(index, portAnswer(theirs.portReads++));
      } else {
        theirs.skipped =
          kind === ExitKind.MmioRead || kind === ExitKind.MmioWrite ? 'no RAM' : `exit ${kind} ${exit.detail}`;
        if (kind === ExitKind.MmioRead) vcpu.setData(0, 0);
        // Let KVM finish the access, so that it is not finished in the next case.
        if (theirs.skipped !== 'no RAM') break;
        theirs.skipped = '';
        this.theirs.skipped = 'no RAM';
        for (let tries = 0; tries < 100; tries++) {
          const next = vcpu.run();
          if (next === ExitKind.PortWrite && vcpu.exit.address !== DEVICE_PORT) return;
          if (next === ExitKind.Failed || next === ExitKind.TripleFault) return;
        }
        return;
      }
    }
    if (theirs.skipped !== '') return;
    kvm.getRegisters(theirs.words);
    if (c.form.vector === true) {
      kvm.getFpu();
      theirs.xmm.set(kvm.fpu.subarray(machine.XMM_AT, machine.XMM_AT + 256));
    }
    if (theirs.vector >= 0) this.#readFrame(c);
    else if (kvm.vcpu.exit.address === machine.PORT_END) theirs.words[RIP * 2] = c.end - c.mode.codeBase;
    else theirs.words[RIP * 2] = machine.TARGET - c.mode.codeBase;
    theirs.words[RIP * 2 + 1] = 0;
  }

  /** Puts back what the exception pushed. */
  #readFrame(c: Case): void {
    const { theirs, kvm } = this;
    const { mode } = c;
    const view = new DataView(kvm.memory.buffer, kvm.memory.byteOffset);
    const long = mode.paging === 'long';
    const width = long ? 8 : mode.real === true ? 2 : 4;
    const outer = long || mode.ring === 3;
    const pointer = theirs.words[RSP * 2];
    const start = outer ? pointer : mode.base + (mode.real === true ? pointer & 0xffff : pointer);
    if (start + 5 * width > machine.RAM_SIZE) {
      // A branch that read something else than its target ran what happened to be there.
      theirs.skipped = 'ran away';
      return;
    }
    let at = start;
    const pop = () => {
      const value = width === 2 ? view.getUint16(at, true) : view.getUint32(at, true);
      const high = width === 8 ? view.getUint32(at + 4, true) : 0;
      at += width;
      return [value, high];
    };
    if (WITH_ERROR.has(theirs.vector) && mode.real !== true) [theirs.errorCode] = pop();
    [theirs.words[RIP * 2]] = pop();
    pop();
    const [flags] = pop();
    theirs.words[RFLAGS * 2] = width === 2 ? (c.words[RFLAGS * 2] & ~0xffff) | flags : flags;
    if (outer) [theirs.words[RSP * 2], theirs.words[RSP * 2 + 1]] = pop();
    else {
      theirs.words[RSP * 2] = pointer + (at - start);
      // What it wrote below the stack pointer is no part of the instruction.
      kvm.memory.set(this.memory.bytes.subarray(start, at), start);
    }
    if (theirs.vector === VECTOR_PF) theirs.cr2 = kvm.cr2();
  }

  #runEmulator(c: Case): void {
    const { ours, emulator } = this;
    ours.words.set(c.words);
    ours.xmm.set(c.xmm);
    const rip = c.words[RIP * 2];
    for (let iterations = 0; ; iterations++) {
      let outcome = emulator.begin(c.bytes, c.given);
      for (;;) {
        const { access } = emulator;
        if (outcome === Outcome.Read || outcome === Outcome.Write) {
          if (access.address < machine.DEVICE || access.address + access.size > machine.DEVICE_END) {
            ours.skipped = 'no RAM';
            return;
          }
          this.count('device accesses');
          const view = new DataView(this.memory.bytes.buffer, access.address, 8);
          if (outcome === Outcome.Read) {
            access.low =
              access.size === 1
                ? view.getUint8(0)
                : access.size === 2
                  ? view.getUint16(0, true)
                  : view.getUint32(0, true);
            access.high = access.size === 8 ? view.getUint32(4, true) : 0;
          } else if (access.size === 1) view.setUint8(0, access.low);
          else if (access.size === 2) view.setUint16(0, access.low, true);
          else {
            view.setUint32(0, access.low, true);
            if (access.size === 8) view.setUint32(4, access.high, true);
          }
        } else if (outcome === Outcome.PortRead) access.low = portAnswer(ours.portReads++);
        else if (outcome === Outcome.PortWrite) ours.ports.push(`${access.size}:${access.low}`);
        else break;
        outcome = emulator.resume();
      }
      if (outcome === Outcome.Done) {
        if (ours.words[RIP * 2] !== rip || iterations === 100) return;
        continue;
      }
      if (outcome === Outcome.Fault) {
        const { fault } = emulator;
        ours.vector = fault.vector;
        ours.errorCode = fault.errorCode;
        if (fault.vector === VECTOR_PF) ours.cr2 = BigInt(fault.cr2Low) | (BigInt(fault.cr2High) << 32n);
      } else {
        const text = emulator.describe();
        if (text.includes('page tables reach')) ours.skipped = 'no RAM';
        else {
          ours.vector = -2;
          process.stdout.write(`${text}\n`);
        }
      }
      return;
    }
  }

  #compare(c: Case): string[] {
    const { ours, theirs } = this;
    const differences: string[] = [];
    const differ = (what: string, mine: unknown, right: unknown) => {
      if (mine !== right) differences.push(`${what}: ${String(mine)}, KVM ${String(right)}`);
    };
    const hex = (words: Uint32Array, index: number) =>
      `0x${((BigInt(words[index * 2 + 1]) << 32n) | BigInt(words[index * 2])).toString(16)}`;
    this.#allow(c);
    differ('vector', ours.vector, theirs.vector);
    differ('error code', ours.errorCode, theirs.errorCode);
    differ('CR2', ours.cr2.toString(16), theirs.cr2.toString(16));
    const ignored = RF | c.undefinedFlags;
    ours.words[RFLAGS * 2] &= ~ignored;
    theirs.words[RFLAGS * 2] &= ~ignored;
    for (let index = 0; index < 18; index++) {
      if (
        ours.words[index * 2] === theirs.words[index * 2] &&
        ours.words[index * 2 + 1] === theirs.words[index * 2 + 1]
      ) {
        continue;
      }
      differ(REGISTERS[index], hex(ours.words, index), hex(theirs.words, index));
    }
    if (c.form.vector === true) {
      const text = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
      if (Buffer.compare(ours.xmm, theirs.xmm) !== 0) differ('xmm', text(ours.xmm), text(theirs.xmm));
    }
    differ('port writes', ours.ports.join(), theirs.ports.join());
    // Page tables only after instructions that went well: which flags a fault leaves set, processors may choose.
    if (ours.vector < 0) {
      differ('port reads', ours.portReads, theirs.portReads);
      this.#compareMemory(differences, machine.TABLES, machine.PAE_PDPT);
      this.#compareMemory(differences, machine.PAE_PDPT + PAGE, machine.TABLES_END);
    }
    // TCG stores vectors in two halves, and KVM what INS reads in the parts that pages make: the first before the second faults.
    const halves = c.form.vector === true || c.form.special === 'string';
    if (halves && ours.vector === VECTOR_PF) this.#synchronize();
    this.#compareMemory(differences, machine.WINDOW, machine.WINDOW + machine.WINDOW_PAGES * PAGE);
    this.#compareMemory(differences, machine.STACK, machine.STACK + PAGE);
    return differences;
  }

  /** Takes over what processors may choose, and where QEMU's TCG, which is the lab's processor, is not one of them. */
  #allow(c: Case): void {
    const { ours, theirs } = this;
    // TCG knows no #SS for addresses that are not canonical.
    if (c.mode.bits === 64 && ours.vector === VECTOR_SS && theirs.vector === VECTOR_GP) theirs.vector = VECTOR_SS;
    if (ours.vector !== VECTOR_PF || theirs.vector !== VECTOR_PF) return;
    // With RSVD goes P (SDM volume 3, 4.7); TCG leaves it out.
    if ((theirs.errorCode & ERROR_RESERVED) !== 0) theirs.errorCode |= 1;
    if (c.form.special === 'string' && (c.form.opcode[0] & ~1) === 0x6c) {
      // KVM, which carries out INS by itself, forgets iterations that went well before the one that faults.
      for (const register of [RCX, RDI]) theirs.words[register * 2] = ours.words[register * 2];
    }
    // Which of its two operands CMPS reads first is not said; TCG begins with the second.
    const compares = c.form.special === 'string' && (c.form.opcode[0] & ~1) === 0xa6;
    // TCG looks first at the second page of a store that crosses pages.
    const second = (ours.errorCode & ERROR_WRITE) !== 0 && theirs.cr2 === (ours.cr2 | 0xfffn) + 1n;
    if (compares || second) {
      theirs.cr2 = ours.cr2;
      theirs.errorCode = ours.errorCode;
    }
    // Processors ask for a page that is modified once, for writing; TCG reads it first.
    if (c.form.modifies === true && (theirs.errorCode & ERROR_WRITE) === 0) {
      theirs.errorCode |= ours.errorCode & ERROR_WRITE;
    }
  }

  #compareMemory(differences: string[], start: number, end: number): void {
    const mine = this.memory.bytes;
    const right = this.kvm.memory;
    if (Buffer.compare(mine.subarray(start, end), right.subarray(start, end)) === 0) return;
    for (let at = start; at < end && differences.length < 12; at++) {
      if (mine[at] !== right[at]) differences.push(`memory 0x${at.toString(16)}: ${mine[at]}, KVM ${right[at]}`);
    }
  }

  #print(c: Case, differences: readonly string[]): void {
    const bytes = Buffer.from(c.bytes.subarray(0, c.length)).toString('hex');
    const lines = [
      `${bytes}  ${disassemble(c.mode.bits, c.bytes, c.length)}  (${c.mode.name}, ${JSON.stringify(c.controls)})`,
      `  before: ${REGISTERS.map((name, index) => `${name}=${((BigInt(c.words[index * 2 + 1]) << 32n) | BigInt(c.words[index * 2])).toString(16)}`).join(' ')}`,
      `  odd page ${c.oddPage}: ${c.oddLow.toString(16)} ${c.oddHigh.toString(16)}, fs ${c.fsBase.toString(16)}, gs ${c.gsBase.toString(16)}`,
      ...differences.map((line) => `  ${line}`),
    ];
    process.stdout.write(`${lines.join('\n')}\n`);
  }
}

const [cases = '20000', seed = '1'] = process.argv.slice(2);
const check = new Check(Number(seed));
const start = Date.now();
check.run(Number(cases));
const counts = [...check.counts].sort().map(([what, count]) => `${count} ${what}`);
process.stdout.write(`${counts.join('; ')}; ${check.emulator.formsMet} forms; ${(Date.now() - start) / 1000} s\n`);
process.stdout.write(`${check.cases} cases, ${check.differences} differences\n`);
process.exitCode = check.differences === 0 ? 0 : 1;
check.kvm.close();
