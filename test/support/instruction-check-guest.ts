/** A guest for unit tests of the emulator: RAM, registers, and a device wherever there is no RAM. */
import {
  CR0_PE,
  CR0_PG,
  CR4_PAE,
  EFER_LMA,
  EFER_NXE,
  RFLAGS,
  RIP,
  TWO_32,
} from '../../src/hypervisor/mshv/emulator/cpu.js';
import {
  Emulator,
  type EmulatorCpu,
  type EmulatorMemory,
  type EmulatorSegment,
  Outcome,
} from '../../src/hypervisor/mshv/emulator/emulator.js';

export const RAM = 0x4_0000;
export const CODE = 0x1_0000;
export const DATA = 0x2_0000;
/** No RAM is there; linear addresses are the same, by a page of 1 GiB. */
export const DEVICE = 0xd000_0000;
/** Page tables of long mode: the first GiB maps to itself in pages of 2 MiB, but the first 2 MiB in small ones. */
export const PML4 = 0x3_0000;
export const PDPT = 0x3_1000;
export const PD = 0x3_2000;
export const PT = 0x3_3000;

const MAX_ADDRESS = 2 ** 52;

/** RAM from 0 on. Remembers each access that no guest memory should see. */
export class GuestRam implements EmulatorMemory {
  readonly bytes = new Uint8Array(RAM);
  readonly view = new DataView(this.bytes.buffer);
  readonly violations: string[] = [];

  #has(address: number, length: number, buffer: Uint8Array): boolean {
    const sound =
      Number.isInteger(address) && address >= 0 && address + length <= MAX_ADDRESS + 16 && length > 0 && length <= 16;
    if (!sound || buffer.length < length) this.violations.push(`${address}, ${length} bytes`);
    return sound && address + length <= RAM;
  }

  read(address: number, into: Uint8Array, length: number): boolean {
    if (!this.#has(address, length, into)) return false;
    into.set(this.bytes.subarray(address, address + length));
    return true;
  }

  write(address: number, from: Uint8Array, length: number): boolean {
    if (!this.#has(address, length, from)) return false;
    this.bytes.set(from.subarray(0, length), address);
    return true;
  }

  entry(at: number, value: bigint): void {
    this.view.setBigUint64(at, value, true);
  }
}

export class GuestCpu implements EmulatorCpu {
  readonly words = new Uint32Array(36);
  readonly segments: EmulatorSegment[] = Array.from({ length: 6 }, () => ({
    baseLow: 0,
    baseHigh: 0,
    limit: 0xffff_ffff,
    selector: 0,
    attributes: 0xc093,
  }));
  cr0 = 0;
  cr3Low = 0;
  cr3High = 0;
  cr4 = 0;
  eferLow = 0;
  readonly vectors = new Uint8Array(16 * 32);
  loads = 0;

  load(): void {
    this.loads++;
  }

  loadVector(index: number, into: Uint8Array): void {
    into.set(this.vectors.subarray(index * 32, index * 32 + 32));
  }

  storeVector(index: number, from: Uint8Array): void {
    this.vectors.set(from.subarray(0, 32), index * 32);
  }

  get(register: number): bigint {
    return (BigInt(this.words[register * 2 + 1]) << 32n) | BigInt(this.words[register * 2]);
  }

  set(register: number, value: bigint | number): void {
    const bits = BigInt.asUintN(64, BigInt(value));
    this.words[register * 2] = Number(bits & 0xffff_ffffn);
    this.words[register * 2 + 1] = Number(bits >> 32n);
  }
}

export const P = 1n;
export const RW = 2n;
export const US = 4n;
export const ACCESSED = 0x20n;
export const DIRTY = 0x40n;
export const PS = 0x80n;
export const NX = 1n << 63n;

export type GuestMode = 'long' | 'user' | 'protected' | 'real';

export class Guest {
  readonly ram = new GuestRam();
  readonly cpu = new GuestCpu();
  readonly emulator = new Emulator(this.cpu, this.ram);
  /** What was asked of the device, in order. */
  readonly accesses: string[] = [];
  /** What its reads answer, one after another; then zeros. */
  answers: bigint[] = [];

  constructor(mode: GuestMode = 'long') {
    const { cpu, ram } = this;
    const [, cs, ss] = cpu.segments;
    cpu.set(RIP, CODE);
    cpu.set(RFLAGS, 2);
    cpu.set(4, DATA + 0x800);
    if (mode === 'real') {
      for (const segment of cpu.segments) Object.assign(segment, { limit: 0xffff, attributes: 0x93 });
      Object.assign(cs, { attributes: 0x9b, baseLow: CODE, selector: CODE >> 4 });
      cpu.set(RIP, 0);
      return;
    }
    cpu.cr0 = CR0_PE;
    cs.attributes = 0xc09b;
    if (mode === 'protected') return;
    const dpl = mode === 'user' ? 0x60 : 0;
    cs.attributes = 0xa09b | dpl;
    ss.attributes |= dpl;
    cpu.cr0 |= CR0_PG;
    cpu.cr4 = CR4_PAE;
    cpu.cr3Low = PML4;
    cpu.eferLow = EFER_LMA | EFER_NXE;
    const all = P | RW | US;
    ram.entry(PML4, BigInt(PDPT) | all);
    ram.entry(PDPT, BigInt(PD) | all);
    ram.entry(PDPT + 3 * 8, 0xc000_0000n | all | PS);
    ram.entry(PD, BigInt(PT) | all);
    for (let page = 0; page < 512; page++) ram.entry(PT + page * 8, BigInt(page * 0x1000) | all);
  }

  /** Puts an instruction at RIP. */
  code(...bytes: number[]): this {
    const base = this.cpu.segments[1].baseLow;
    this.ram.bytes.set(bytes, Number(this.cpu.get(RIP)) + base);
    return this;
  }

  /** Runs the instruction at RIP to an end that is none of the device's, once. */
  step(bytes = new Uint8Array(0)): Outcome {
    const { emulator, accesses } = this;
    const { access } = emulator;
    let outcome = emulator.begin(bytes, bytes.length);
    for (let count = 0; count < 1000; count++) {
      const name = outcome === Outcome.Read ? 'read' : outcome === Outcome.Write ? 'write' : undefined;
      const port = outcome === Outcome.PortRead ? 'in' : outcome === Outcome.PortWrite ? 'out' : undefined;
      if (name === undefined && port === undefined) return outcome;
      const at = `${name ?? port} ${access.address.toString(16)} ${access.size}`;
      if (outcome === Outcome.Read || outcome === Outcome.PortRead) {
        const answer = this.answers.shift() ?? 0n;
        access.low = Number(answer & 0xffff_ffffn);
        access.high = Number((answer >> 32n) & 0xffff_ffffn);
        accesses.push(at);
      } else accesses.push(`${at} ${(access.high * TWO_32 + access.low).toString(16)}`);
      outcome = emulator.resume();
    }
    throw new Error('It does not end');
  }
}
