/** What the emulator works on and what it asks for. Register and bit names are those of the Intel SDM. */

/** What a step of the emulator ends with. */
export const Outcome = { Done: 0, Read: 1, Write: 2, PortRead: 3, PortWrite: 4, Fault: 5, Unknown: 6 } as const;
export type Outcome = (typeof Outcome)[keyof typeof Outcome];

export interface EmulatorSegment {
  baseLow: number;
  baseHigh: number;
  /** In bytes, whatever the granularity. */
  limit: number;
  selector: number;
  /** Access rights as in SDM volume 3, 25.4.1, bits 15:0: type, S, DPL, P, AVL, L, D/B, G. */
  attributes: number;
}

/** The processor as the emulator sees it: a thin view of whatever holds the registers. */
export interface EmulatorCpu {
  /** rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15, rip, rflags: 64 bits each, as low and high words. */
  readonly words: Uint32Array;
  /** Loads the registers; called once before each instruction. */
  load(): void;
  /** es, cs, ss, ds, fs, gs */
  readonly segments: readonly EmulatorSegment[];
  readonly cr0: number;
  readonly cr3Low: number;
  readonly cr3High: number;
  readonly cr4: number;
  readonly eferLow: number;
  /** One of 16 vector registers, 32 bytes: what a processor without AVX lacks reads as zeros. */
  loadVector(index: number, into: Uint8Array): void;
  storeVector(index: number, from: Uint8Array): void;
}

/** Guest-physical memory: RAM alone. */
export interface EmulatorMemory {
  /** @returns false: not RAM, or not all of it; nothing is copied */
  read(address: number, into: Uint8Array, length: number): boolean;
  write(address: number, from: Uint8Array, length: number): boolean;
}

export interface EmulatorFault {
  vector: number;
  errorCode: number;
  /** Not in real mode, and not with every vector. */
  hasErrorCode: boolean;
  /** The address that a page fault tells. */
  cr2Low: number;
  cr2High: number;
}

export type Size = 1 | 2 | 4 | 8;

/** The device access that is asked for: a guest-physical address or a port. */
export interface DeviceAccess {
  address: number;
  size: Size;
  low: number;
  high: number;
}

/** Indexes of registers; words have twice that. */
export const RAX = 0;
export const RCX = 1;
export const RDX = 2;
export const RSP = 4;
export const RSI = 6;
export const RDI = 7;
export const RIP = 16;
export const RFLAGS = 17;

export const ES = 0;
export const CS = 1;
export const SS = 2;
export const FS = 4;

export const Flag = {
  CF: 1 << 0,
  PF: 1 << 2,
  AF: 1 << 4,
  ZF: 1 << 6,
  SF: 1 << 7,
  DF: 1 << 10,
  OF: 1 << 11,
  RF: 1 << 16,
  VM: 1 << 17,
  AC: 1 << 18,
} as const;
/** The flags that arithmetic sets. */
export const STATUS_FLAGS = Flag.CF | Flag.PF | Flag.AF | Flag.ZF | Flag.SF | Flag.OF;

export const CR0_PE = 1 << 0;
export const CR0_WP = 1 << 16;
export const CR0_PG = 1 << 31;
export const CR4_PSE = 1 << 4;
export const CR4_PAE = 1 << 5;
export const CR4_LA57 = 1 << 12;
export const CR4_SMEP = 1 << 20;
export const CR4_SMAP = 1 << 21;
export const EFER_LMA = 1 << 10;
export const EFER_NXE = 1 << 11;

/** Access rights of a segment. */
export const SEGMENT_WRITABLE = 1 << 1;
/** Of a data segment: valid offsets lie above the limit. Of a code segment: conforming. */
export const SEGMENT_EXPAND_DOWN = 1 << 2;
export const SEGMENT_CODE = 1 << 3;
export const SEGMENT_DPL_SHIFT = 5;
export const SEGMENT_PRESENT = 1 << 7;
export const SEGMENT_LONG = 1 << 13;
export const SEGMENT_BIG = 1 << 14;

export const Vector = { UD: 6, SS: 12, GP: 13, PF: 14 } as const;

export const TWO_32 = 0x1_0000_0000;
