/**
 * A PCI function: its type 0 header, its BARs, which the guest may move, and its capabilities (PCI Local Bus 3.0, 6.1, 6.2.5
 * and 6.7). Modelled: memory BARs, single functions, interrupt pin A. Not modelled: I/O BARs, expansion ROMs.
 */
import type { AccessSize, BusDevice } from '../devices/bus.js';
import { filler } from '../devices/bus.js';
import type { StateBlock } from '../state/state-block.js';
import type { PciDevice } from './config-space.js';

const COMMAND_MEMORY = 0x2;
const COMMAND_MASTER = 0x4;
export const COMMAND_INTX_DISABLE = 0x400;
/** Memory decoding, bus mastering, INTx disable. */
const COMMAND_WRITABLE = 0x4 | COMMAND_MEMORY | COMMAND_INTX_DISABLE;
const STATUS_CAPABILITIES = 0x0010_0000;
const STATUS_INTERRUPT = 0x0008_0000;
const INTERRUPT_PIN_A = 0x0100;
const CAPABILITIES_START = 0x40;
const BAR_REGISTERS = 6;
const BAR_64_BIT = 0x4;

export interface BarDescription {
  /** Register 0 to 5. */
  readonly index: number;
  /** Bytes; a power of two, at least 16. */
  readonly size: number;
  /** 64 bits: takes the next register as well. */
  readonly wide: boolean;
}

export interface FunctionDescription {
  readonly vendor: number;
  readonly device: number;
  readonly subsystemVendor: number;
  readonly subsystem: number;
  readonly revision: number;
  /** Class, subclass, interface: 24 bits. */
  readonly classCode: number;
  readonly bars: readonly BarDescription[];
  /** The capability list as it stands in configuration space from 0x40 on. */
  readonly capabilities: Uint8Array;
}

/** Words of a function in its device's state block. */
export const FunctionWord = { command: 0, interruptLine: 1, bars: 2 } as const;
export const FUNCTION_WORDS = FunctionWord.bars + BAR_REGISTERS;
/** The greatest value of each that a guest can have written. */
export const FUNCTION_LIMITS: readonly number[] = [
  COMMAND_WRITABLE,
  0xff,
  ...new Array<number>(BAR_REGISTERS).fill(0xffff_ffff),
];

/** What a device adds to its function. Calls come on vCPU threads; those that write configuration hold the block's lock. */
export interface FunctionDevice {
  /** A capability register, on top of its description. @returns undefined where the description says it all */
  readCapability?(register: number): number | undefined;
  writeCapability?(register: number, value: number, mask: number): void;
  /** The interrupt status bit: whether an interrupt by the pin is due, masked or not (6.2.3). */
  readonly interruptStatus: boolean;
  /** The pin has been masked or unmasked. */
  interruptMaskChanged(): void;
  /** The addresses to which the device answers have changed. */
  decodingChanged?(): void;
  /** Bus mastering was switched: whether the function may access memory. */
  masteringChanged?(on: boolean): void;
  /** After a write to the command register; without the block's lock, so that it can wait. */
  commandWritten?(): void;
  readBar(bar: number, offset: number, size: AccessSize): number;
  writeBar(bar: number, offset: number, size: AccessSize, value: number): void;
}

/** An 8-, 16- or 32-bit write as its effect on a whole register. */
function merge(old: number, value: number, mask: number): number {
  return (old & ~mask) | (value & mask);
}

export class PciFunction implements PciDevice {
  readonly #capabilities: Uint32Array;
  readonly #words: Int32Array;

  /** @param at the function's first word in the block */
  constructor(
    private readonly state: StateBlock,
    private readonly at: number,
    private readonly description: FunctionDescription,
    private readonly device: FunctionDevice,
  ) {
    this.#words = state.words;
    const bytes = new Uint8Array(0x100 - CAPABILITIES_START);
    bytes.set(description.capabilities);
    this.#capabilities = new Uint32Array(bytes.buffer);
  }

  /** Where a BAR is at power-on. */
  static placeBar(words: Int32Array, at: number, bar: BarDescription, address: number): void {
    words[at + FunctionWord.bars + bar.index] = address % 2 ** 32;
    if (bar.wide) words[at + FunctionWord.bars + bar.index + 1] = Math.floor(address / 2 ** 32);
  }

  /** What firmware writes to the interrupt line register: the input that the pin is wired to. */
  static setInterruptLine(words: Int32Array, at: number, line: number): void {
    words[at + FunctionWord.interruptLine] = line;
  }

  /** It answers nowhere. */
  powerOff(): void {
    this.#words[this.at + FunctionWord.command] = 0;
  }

  /** Its state has been loaded: what stands there is what a guest can have put there. */
  restored(): void {
    this.#words[this.at + FunctionWord.command] &= COMMAND_WRITABLE;
    for (let index = 0; index < BAR_REGISTERS; index++) {
      this.#words[this.at + FunctionWord.bars + index] &= this.#writableBar(index);
    }
  }

  get decoding(): boolean {
    return (this.#words[this.at + FunctionWord.command] & COMMAND_MEMORY) !== 0;
  }

  /** Guest physical address of a BAR, decoded or not. */
  barAddress(bar: BarDescription): number {
    const word = this.at + FunctionWord.bars + bar.index;
    const high = bar.wide ? this.#words[word + 1] >>> 0 : 0;
    return (this.#words[word] >>> 0) + high * 2 ** 32;
  }

  readConfig(register: number): number {
    const { description, at } = this;
    const words = this.#words;
    switch (register) {
      case 0x00:
        return ((description.device << 16) | description.vendor) >>> 0;
      case 0x04:
        return this.#status() | words[at + FunctionWord.command];
      case 0x08:
        return ((description.classCode << 8) | description.revision) >>> 0;
      case 0x2c:
        return ((description.subsystem << 16) | description.subsystemVendor) >>> 0;
      case 0x34:
        return description.capabilities.length > 0 ? CAPABILITIES_START : 0;
      case 0x3c:
        return INTERRUPT_PIN_A | (words[at + FunctionWord.interruptLine] & 0xff);
    }
    if (register >= 0x10 && register < 0x28) return this.#readBarRegister((register - 0x10) >> 2);
    if (register < CAPABILITIES_START || register >= 0x100) return 0;
    return this.device.readCapability?.(register) ?? this.#capabilities[(register - CAPABILITIES_START) >> 2];
  }

  #status(): number {
    return STATUS_CAPABILITIES | (this.device.interruptStatus ? STATUS_INTERRUPT : 0);
  }

  writeConfig(register: number, value: number, mask: number): void {
    this.state.lock();
    try {
      this.#write(register, value, mask);
    } finally {
      this.state.unlock();
    }
    if (register === 0x04) this.device.commandWritten?.();
  }

  #write(register: number, value: number, mask: number): void {
    const { at } = this;
    const words = this.#words;
    if (register === 0x04) {
      const command = at + FunctionWord.command;
      const before = words[command];
      words[command] = merge(before, value, mask & COMMAND_WRITABLE);
      const changed = before ^ words[command];
      if ((changed & COMMAND_MEMORY) !== 0) this.device.decodingChanged?.();
      if ((changed & COMMAND_MASTER) !== 0) this.device.masteringChanged?.((words[command] & COMMAND_MASTER) !== 0);
      if ((changed & COMMAND_INTX_DISABLE) !== 0) this.device.interruptMaskChanged();
    } else if (register === 0x3c) {
      words[at + FunctionWord.interruptLine] = merge(words[at + FunctionWord.interruptLine], value, mask & 0xff);
    } else if (register >= 0x10 && register < 0x28) {
      this.#writeBarRegister((register - 0x10) >> 2, value, mask);
    } else if (register >= CAPABILITIES_START && register < 0x100) {
      this.device.writeCapability?.(register, value, mask);
    }
  }

  #readBarRegister(index: number): number {
    const value = this.#words[this.at + FunctionWord.bars + index] >>> 0;
    const bar = this.description.bars.find((candidate) => candidate.index === index);
    return bar?.wide === true ? (value | BAR_64_BIT) >>> 0 : value;
  }

  #writeBarRegister(index: number, value: number, mask: number): void {
    const word = this.at + FunctionWord.bars + index;
    const before = this.#words[word];
    this.#words[word] = merge(before, value, mask) & this.#writableBar(index);
    if (this.decoding && this.#words[word] !== before) this.device.decodingChanged?.();
  }

  /** Bits below the size are fixed: a driver that writes ones reads the size (6.2.5.1). @returns the others of a register, as ones */
  #writableBar(index: number): number {
    for (const bar of this.description.bars) {
      if (bar.index === index) return bar.size >= 2 ** 32 ? 0 : ~(bar.size - 1);
      if (bar.wide && bar.index + 1 === index) return bar.size >= 2 ** 32 ? ~(bar.size / 2 ** 32 - 1) : ~0;
    }
    return 0;
  }

  /** Which BAR answers at an address. @returns undefined: none of this function's */
  barAt(address: number): BarDescription | undefined {
    if (!this.decoding) return undefined;
    for (const bar of this.description.bars) {
      const start = this.barAddress(bar);
      if (address >= start && address < start + bar.size) return bar;
    }
    return undefined;
  }

  readMemory(bar: BarDescription, address: number, size: AccessSize): number {
    return this.device.readBar(bar.index, address - this.barAddress(bar), size);
  }

  writeMemory(bar: BarDescription, address: number, size: AccessSize, value: number): void {
    this.device.writeBar(bar.index, address - this.barAddress(bar), size, value);
  }
}

/**
 * A window of guest addresses in which the BARs of a segment lie. Whoever answers is read from the functions' own state at
 * each access, so a BAR that one vCPU moved is where it belongs for all of them.
 */
export class PciWindow implements BusDevice {
  readonly #functions: PciFunction[] = [];
  #last: PciFunction | undefined;

  /** @param start guest physical address of the window */
  constructor(private readonly start: number) {}

  insert(fn: PciFunction): void {
    this.#functions.push(fn);
  }

  remove(fn: PciFunction): void {
    this.#functions.splice(this.#functions.indexOf(fn), 1);
    this.#last = undefined;
  }

  read(offset: number, size: AccessSize): number {
    const address = this.start + offset;
    const bar = this.#find(address);
    return bar === undefined ? filler(size) : this.#last!.readMemory(bar, address, size);
  }

  write(offset: number, size: AccessSize, value: number): void {
    const address = this.start + offset;
    const bar = this.#find(address);
    if (bar !== undefined) this.#last!.writeMemory(bar, address, size, value);
  }

  #find(address: number): BarDescription | undefined {
    const cached = this.#last?.barAt(address);
    if (cached !== undefined) return cached;
    for (const candidate of this.#functions) {
      const bar = candidate.barAt(address);
      if (bar === undefined) continue;
      this.#last = candidate;
      return bar;
    }
    return undefined;
  }
}
