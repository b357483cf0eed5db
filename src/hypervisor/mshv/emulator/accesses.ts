/**
 * An instruction's accesses to memory and ports: RAM at once, devices by asking.
 *
 * An instruction runs as a whole, and runs again from its start when a device has answered: what was read is kept in a log, so
 * no device is read twice. It changes nothing until all that it needs is there and no fault is left; its stores are queued, and
 * carried out one after another when it has run to its end.
 *
 * A method that answers false has stopped the instruction: `outcome` says why.
 */
import { type DeviceAccess, type EmulatorMemory, Outcome, type Size } from './cpu.js';

/** Guest-physical addresses of a memory operand: it lies in one page or in two. */
export interface Span {
  address: number;
  /** Bytes in the first page. */
  length: number;
  next: number;
}

/** Device reads and stores of one instruction: 32 bytes of a vector in pieces, or two operands that cross pages, are fewer. */
const MAX_ACCESSES = 32;

export class Accesses {
  outcome: Outcome = Outcome.Done;
  readonly access: DeviceAccess = { address: 0, size: 1, low: 0, high: 0 };
  /** The value that was read last. */
  low = 0;
  high = 0;

  readonly #piece = new Uint8Array(8);
  readonly #pieceView = new DataView(this.#piece.buffer);
  readonly #joined = new Uint8Array(8);
  readonly #joinedView = new DataView(this.#joined.buffer);

  readonly #readLow = new Uint32Array(MAX_ACCESSES);
  readonly #readHigh = new Uint32Array(MAX_ACCESSES);
  #reads = 0;
  #nextRead = 0;

  readonly #storeAddress = new Float64Array(MAX_ACCESSES);
  readonly #storeSize = new Uint8Array(MAX_ACCESSES);
  readonly #storeLow = new Uint32Array(MAX_ACCESSES);
  readonly #storeHigh = new Uint32Array(MAX_ACCESSES);
  readonly #storePort = new Uint8Array(MAX_ACCESSES);
  #stores = 0;
  #nextStore = 0;

  constructor(readonly memory: EmulatorMemory) {}

  /** Before an instruction. */
  protected forget(): void {
    this.#reads = 0;
    this.#stores = 0;
    this.#nextStore = 0;
  }

  /** Before the instruction runs, each time. */
  restart(): void {
    this.#nextRead = 0;
    this.#stores = 0;
  }

  /** What `access` has is the answer of the device. */
  answer(): void {
    const { access } = this;
    this.#readLow[this.#reads] = access.size === 4 || access.size === 8 ? access.low : access.low & mask(access.size);
    this.#readHigh[this.#reads] = access.size === 8 ? access.high : 0;
    this.#reads++;
  }

  /** Carries out queued stores up to the first that is a device's. @returns whether none is left */
  store(): boolean {
    while (this.#nextStore < this.#stores) {
      const index = this.#nextStore++;
      const address = this.#storeAddress[index];
      const size = this.#storeSize[index] as Size;
      const port = this.#storePort[index] !== 0;
      this.#pieceView.setUint32(0, this.#storeLow[index], true);
      this.#pieceView.setUint32(4, this.#storeHigh[index], true);
      if (!port && this.memory.write(address, this.#piece, size)) continue;
      const { access } = this;
      access.address = address;
      access.size = size;
      access.low = size >= 4 ? this.#storeLow[index] : this.#storeLow[index] & mask(size);
      access.high = size === 8 ? this.#storeHigh[index] : 0;
      this.outcome = port ? Outcome.PortWrite : Outcome.Write;
      return false;
    }
    return true;
  }

  /** Reads 1 to 8 bytes of an operand, from RAM or a device, into `low` and `high`. */
  read(span: Span, at: number, size: number): boolean {
    if (at + size <= span.length) return this.#readPiece(span.address + at, size as Size);
    if (at >= span.length) return this.#readPiece(span.next + at - span.length, size as Size);
    this.#joinedView.setUint32(0, 0, true);
    this.#joinedView.setUint32(4, 0, true);
    for (let done = 0; done < size;) {
      const address = addressIn(span, at + done);
      const length = pieceSize(address, Math.min(size - done, at + done < span.length ? span.length - at - done : 8));
      if (!this.#readPiece(address, length)) return false;
      for (let byte = 0; byte < length; byte++) {
        this.#joined[done + byte] = (byte < 4 ? this.low >>> (8 * byte) : this.high >>> (8 * (byte - 4))) & 0xff;
      }
      done += length;
    }
    this.low = this.#joinedView.getUint32(0, true);
    this.high = this.#joinedView.getUint32(4, true);
    return true;
  }

  #readPiece(address: number, size: Size): boolean {
    if (!this.memory.read(address, this.#piece, size)) return this.ask(Outcome.Read, address, size);
    const view = this.#pieceView;
    this.high = 0;
    if (size === 1) this.low = this.#piece[0];
    else if (size === 2) this.low = view.getUint16(0, true);
    else {
      this.low = view.getUint32(0, true);
      if (size === 8) this.high = view.getUint32(4, true);
    }
    return true;
  }

  /** Reads a device, or finds what it answered. @param kind Outcome.Read or Outcome.PortRead */
  ask(kind: Outcome, address: number, size: Size): boolean {
    if (this.#nextRead < this.#reads) {
      const index = this.#nextRead++;
      this.low = this.#readLow[index];
      this.high = this.#readHigh[index];
      return true;
    }
    const { access } = this;
    access.address = address;
    access.size = size;
    access.low = 0;
    access.high = 0;
    this.outcome = kind;
    return false;
  }

  /** Queues 1 to 8 bytes for an operand. */
  write(span: Span, at: number, size: number, low: number, high: number): void {
    if (at + size <= span.length) this.#queue(span.address + at, size as Size, low, high, 0);
    else if (at >= span.length) this.#queue(span.next + at - span.length, size as Size, low, high, 0);
    else {
      let restLow = low;
      let restHigh = high;
      for (let done = 0; done < size;) {
        const address = addressIn(span, at + done);
        const length = pieceSize(address, Math.min(size - done, at + done < span.length ? span.length - at - done : 8));
        this.#queue(address, length, restLow, restHigh, 0);
        // A piece of an operand that crosses a page has at most 4 bytes.
        restLow = length === 4 ? restHigh : ((restLow >>> (8 * length)) | (restHigh << (32 - 8 * length))) >>> 0;
        restHigh = length === 4 ? 0 : restHigh >>> (8 * length);
        done += length;
      }
    }
  }

  writePort(port: number, size: Size, low: number): void {
    this.#queue(port, size, low, 0, 1);
  }

  #queue(address: number, size: Size, low: number, high: number, port: number): void {
    const index = this.#stores++;
    this.#storeAddress[index] = address;
    this.#storeSize[index] = size;
    this.#storeLow[index] = low;
    this.#storeHigh[index] = high;
    this.#storePort[index] = port;
  }
}

/** Of an operand of 1 or 2 bytes. */
export function mask(size: number): number {
  return size === 1 ? 0xff : size === 2 ? 0xffff : -1;
}

function addressIn(span: Span, at: number): number {
  return at < span.length ? span.address + at : span.next + at - span.length;
}

/** The largest piece, of a size that devices know, that is aligned and no longer than this. */
function pieceSize(address: number, limit: number): Size {
  if (limit >= 4 && address % 4 === 0) return 4;
  return limit >= 2 && address % 2 === 0 ? 2 : 1;
}
