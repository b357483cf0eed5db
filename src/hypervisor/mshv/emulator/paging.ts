/**
 * Linear to guest-physical addresses: Intel SDM volume 3, chapter 4. All paging modes, large pages, write protection,
 * execute-disable, SMEP, SMAP, reserved bits, accessed and dirty flags.
 *
 * Not modelled: protection keys; PAE's page-directory-pointer registers (the entries are read from memory, as AMD's processors
 * do). MAXPHYADDR is taken as 52: an address that the guest's processor has no wires for is simply not RAM. Flags are set by a
 * plain store, which another processor's at the same moment may overtake.
 */
import * as x86 from './cpu.js';
import { TWO_32, type EmulatorCpu, type EmulatorMemory } from './cpu.js';

/** What an address is used for, as page-fault error codes tell it. */
export const Use = { Read: 0, Write: 2, Fetch: 16 } as const;
export type Use = (typeof Use)[keyof typeof Use];

export const Walk = {
  Done: 0,
  /** A page fault with `errorCode`. */
  Fault: 1,
  /** A table lies at `physical`, where there is no RAM. */
  Outside: 2,
} as const;
export type Walk = (typeof Walk)[keyof typeof Walk];

/** Bits of an entry's low word. */
const P = 1 << 0;
const RW = 1 << 1;
const US = 1 << 2;
const A = 1 << 5;
const D = 1 << 6;
const PS = 1 << 7;

const ERROR_PRESENT = 1;
const ERROR_USER = 4;
const ERROR_RESERVED = 8;

/** Bits 20:13 and 29:13: reserved in entries that map 2 MiB and 1 GiB. */
const RESERVED_2M = 0x001f_e000;
const RESERVED_1G = 0x3fff_e000;
/** Bits 62:52, reserved under PAE paging. */
const RESERVED_PAE_HIGH = 0x7ff0_0000;
/** Bits 51:32. */
const ADDRESS_HIGH = 0x000f_ffff;
/** Bits 20:13 of an entry that maps 4 MiB are address bits 39:32; bit 21 is reserved. */
const RESERVED_4M = 1 << 21;

/** Translations of one instruction: it uses each page's first one to its end. No instruction needs more. */
const TRANSLATIONS = 8;

export class PageWalker {
  /** The address of the last walk that ended well. */
  physical = 0;
  /** Of the last walk that ended in a fault. */
  errorCode = 0;
  readonly #entry = new Uint8Array(8);
  readonly #view = new DataView(this.#entry.buffer);
  readonly #pageLow = new Uint32Array(TRANSLATIONS);
  readonly #pageHigh = new Uint32Array(TRANSLATIONS);
  readonly #uses = new Uint8Array(TRANSLATIONS);
  readonly #frames = new Float64Array(TRANSLATIONS);
  #count = 0;

  constructor(
    private readonly cpu: EmulatorCpu,
    private readonly memory: EmulatorMemory,
  ) {}

  /** Before each instruction. */
  forget(): void {
    this.#count = 0;
  }

  /** @param user whether it is an access of CPL 3 */
  walk(low: number, high: number, use: Use, user: boolean): Walk {
    const { cpu } = this;
    if ((cpu.cr0 & x86.CR0_PG) === 0) {
      this.physical = low;
      return Walk.Done;
    }
    const page = (low & ~0xfff) >>> 0;
    for (let index = 0; index < this.#count; index++) {
      if (this.#pageLow[index] === page && this.#pageHigh[index] === high && this.#uses[index] === use) {
        this.physical = this.#frames[index] + (low & 0xfff);
        return Walk.Done;
      }
    }
    const result =
      (cpu.cr4 & x86.CR4_PAE) === 0 ? this.#legacy(low, use, user) : this.#walk(low, high >>> 0, use, user);
    if (result === Walk.Done && this.#count < TRANSLATIONS) {
      const index = this.#count++;
      this.#pageLow[index] = page;
      this.#pageHigh[index] = high;
      this.#uses[index] = use;
      this.#frames[index] = this.physical - (low & 0xfff);
    }
    return result;
  }

  /** Entries of 64 bits: 5-level, 4-level and PAE paging. */
  #walk(low: number, high: number, use: Use, user: boolean): Walk {
    const { cpu } = this;
    const long = (cpu.eferLow & x86.EFER_LMA) !== 0;
    const noExecute = (cpu.eferLow & x86.EFER_NXE) !== 0;
    const reservedHigh = (noExecute ? 0 : 0x8000_0000) | (long ? 0 : RESERVED_PAE_HIGH);
    let level = !long ? 3 : (cpu.cr4 & x86.CR4_LA57) !== 0 ? 5 : 4;
    let table = long
      ? ((cpu.cr3Low & ~0xfff) >>> 0) + (cpu.cr3High & ADDRESS_HIGH) * TWO_32
      : (cpu.cr3Low & ~0x1f) >>> 0;
    let rights = RW | US;
    let executable = true;
    for (; ; level--) {
      const at = table + indexAt(level, low, high, long) * 8;
      if (!this.memory.read(at, this.#entry, 8)) return this.#outside(at);
      const entry = this.#view.getUint32(0, true);
      const entryHigh = this.#view.getUint32(4, true);
      if ((entry & P) === 0) return this.#fault(0, use, user);
      if (!long && level === 3) {
        // A pointer of PAE's: no rights and no accessed flag.
        table = ((entry & ~0xfff) >>> 0) + (entryHigh & ADDRESS_HIGH) * TWO_32;
        continue;
      }
      const large = level > 1 && (entry & PS) !== 0;
      const reserved = !large ? 0 : level === 2 ? RESERVED_2M : level === 3 ? RESERVED_1G : PS;
      if ((entry & reserved) !== 0 || (entryHigh & reservedHigh) !== 0) {
        return this.#fault(ERROR_PRESENT | ERROR_RESERVED, use, user);
      }
      rights &= entry;
      if (entryHigh >>> 31 !== 0) executable = false;
      if (level > 1 && !large) {
        this.#set(at, entry, A);
        table = ((entry & ~0xfff) >>> 0) + (entryHigh & ADDRESS_HIGH) * TWO_32;
        continue;
      }
      if (this.#forbidden(rights, executable, use, user)) return this.#fault(ERROR_PRESENT, use, user);
      this.#set(at, entry, use === Use.Write ? A | D : A);
      const mask = level === 1 ? 0xfff : level === 2 ? 0x1f_ffff : 0x3fff_ffff;
      this.physical = ((entry & ~mask) >>> 0) + (entryHigh & ADDRESS_HIGH) * TWO_32 + (low & mask);
      return Walk.Done;
    }
  }

  /** Entries of 32 bits: SDM volume 3, 4.3. */
  #legacy(low: number, use: Use, user: boolean): Walk {
    const { cpu } = this;
    const directoryAt = ((cpu.cr3Low & ~0xfff) >>> 0) + (low >>> 22) * 4;
    if (!this.memory.read(directoryAt, this.#entry, 4)) return this.#outside(directoryAt);
    const directory = this.#view.getUint32(0, true);
    if ((directory & P) === 0) return this.#fault(0, use, user);
    if ((cpu.cr4 & x86.CR4_PSE) !== 0 && (directory & PS) !== 0) {
      if ((directory & RESERVED_4M) !== 0) return this.#fault(ERROR_PRESENT | ERROR_RESERVED, use, user);
      if (this.#forbidden(directory, true, use, user)) return this.#fault(ERROR_PRESENT, use, user);
      this.#set(directoryAt, directory, use === Use.Write ? A | D : A);
      const high = (directory >>> 13) & 0xff;
      this.physical = ((directory & 0xffc0_0000) >>> 0) + high * TWO_32 + (low & 0x3f_ffff);
      return Walk.Done;
    }
    this.#set(directoryAt, directory, A);
    const at = ((directory & ~0xfff) >>> 0) + ((low >>> 12) & 0x3ff) * 4;
    if (!this.memory.read(at, this.#entry, 4)) return this.#outside(at);
    const entry = this.#view.getUint32(0, true);
    if ((entry & P) === 0) return this.#fault(0, use, user);
    if (this.#forbidden(directory & entry, true, use, user)) return this.#fault(ERROR_PRESENT, use, user);
    this.#set(at, entry, use === Use.Write ? A | D : A);
    this.physical = ((entry & ~0xfff) >>> 0) + (low & 0xfff);
    return Walk.Done;
  }

  /** SDM volume 3, 4.6.1. @param rights the R/W and U/S bits that all entries have */
  #forbidden(rights: number, executable: boolean, use: Use, user: boolean): boolean {
    const { cr0, cr4, words } = this.cpu;
    if (use === Use.Fetch && !executable) return true;
    if (user) return (rights & US) === 0 || (use === Use.Write && (rights & RW) === 0);
    if (use === Use.Write && (rights & RW) === 0 && (cr0 & x86.CR0_WP) !== 0) return true;
    if ((rights & US) === 0) return false;
    if (use === Use.Fetch) return (cr4 & x86.CR4_SMEP) !== 0;
    return (cr4 & x86.CR4_SMAP) !== 0 && (words[x86.RFLAGS * 2] & x86.Flag.AC) === 0;
  }

  /** Both flags are in the entry's first byte. */
  #set(at: number, entry: number, flags: number): void {
    if ((entry & flags) === flags) return;
    this.#entry[0] = entry | flags;
    this.memory.write(at, this.#entry, 1);
  }

  #outside(at: number): Walk {
    this.physical = at;
    return Walk.Outside;
  }

  /** SDM volume 3, 4.7: I/D is told only where there is execute-disable or SMEP. */
  #fault(code: number, use: Use, user: boolean): Walk {
    const { cr4, eferLow } = this.cpu;
    const paePaging = (cr4 & x86.CR4_PAE) !== 0;
    const told = (paePaging && (eferLow & x86.EFER_NXE) !== 0) || (cr4 & x86.CR4_SMEP) !== 0;
    this.errorCode = code | (user ? ERROR_USER : 0) | (use === Use.Fetch && !told ? 0 : use);
    return Walk.Fault;
  }
}

function indexAt(level: number, low: number, high: number, long: boolean): number {
  switch (level) {
    case 1:
      return (low >>> 12) & 0x1ff;
    case 2:
      return (low >>> 21) & 0x1ff;
    case 3:
      return long ? ((high & 0x7f) << 2) | (low >>> 30) : low >>> 30;
    case 4:
      return (high >>> 7) & 0x1ff;
    default:
      return (high >>> 16) & 0x1ff;
  }
}
