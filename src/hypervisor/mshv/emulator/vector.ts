/**
 * Moves between memory and vector registers: Intel SDM volume 2. What is wider than eight bytes goes in elements of eight.
 *
 * Not modelled: the conditions that the processor has checked before it came to the operand (CR0.TS, CR4.OSFXSR, XCR0).
 */
import { type Core } from './core.js';
import { Kind, type Operation } from './operation.js';
import { Use } from './paging.js';

const VECTOR_BYTES = 32;
const XMM_BYTES = 16;

export class VectorMoves {
  readonly #register = new Uint8Array(VECTOR_BYTES);
  readonly #view = new DataView(this.#register.buffer);
  readonly #old = new Uint8Array(VECTOR_BYTES);

  constructor(private readonly core: Core) {}

  /** @returns false: it has stopped; `core.outcome` says why */
  execute(operation: Operation): boolean {
    const { core } = this;
    const store = operation.kind === Kind.VectorStore;
    if (!core.locate(operation, store ? Use.Write : Use.Read)) return false;
    return store ? this.#store(operation) : this.#load(operation);
  }

  #store({ second, size, offset }: Operation): boolean {
    const { core } = this;
    core.cpu.loadVector(second.index, this.#register);
    for (let at = 0; at < size; at += 8) {
      const high = size >= 8 ? this.#view.getUint32(offset + at + 4, true) : 0;
      core.write(core.span, at, Math.min(size, 8), this.#view.getUint32(offset + at, true), high);
    }
    return true;
  }

  #load({ kind, first, size, offset, vex }: Operation): boolean {
    const { core } = this;
    const merge = kind === Kind.VectorMerge;
    this.#register.fill(0);
    for (let at = 0; at < size; at += 8) {
      if (!core.read(core.span, at, Math.min(size, 8))) return false;
      this.#view.setUint32(offset + at, core.low, true);
      this.#view.setUint32(offset + at + 4, core.high, true);
    }
    if (!vex) {
      core.cpu.loadVector(first.index, this.#old);
      for (let at = 0; at < VECTOR_BYTES; at++) {
        const kept = merge ? at < offset || at >= offset + size : at >= XMM_BYTES;
        if (kept) this.#register[at] = this.#old[at];
      }
    }
    core.cpu.storeVector(first.index, this.#register);
    return true;
  }
}
