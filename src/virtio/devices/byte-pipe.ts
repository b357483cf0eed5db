/**
 * Bytes between the console device on its worker and main, in shared memory: one ring for each direction, each with one
 * writer and one reader. What is in it has left the guest, or is yet to come to it, so it is saved.
 */
import { StateBlock, StateError, stateLayout, upTo } from '../../state/state-block.js';

/** Bytes of each direction; a power of two. */
const CAPACITY = 0x4000;
/** Heads and tails count bytes, modulo this and one more. */
const MOST = 0x7fff_ffff;

const pipeLayout = stateLayout('byte-pipe', 1, {
  outputHead: upTo(MOST),
  outputTail: upTo(MOST),
  inputHead: upTo(MOST),
  inputTail: upTo(MOST),
  output: CAPACITY / 4,
  input: CAPACITY / 4,
});

class Ring {
  readonly #bytes: Uint8Array;

  constructor(
    private readonly words: Int32Array,
    private readonly head: number,
    private readonly tail: number,
    data: number,
  ) {
    this.#bytes = new Uint8Array(words.buffer, data * 4, CAPACITY);
  }

  get used(): number {
    return (Atomics.load(this.words, this.tail) - Atomics.load(this.words, this.head)) & MOST;
  }

  get room(): number {
    return CAPACITY - this.used;
  }

  /** @returns bytes taken */
  write(source: Uint8Array, at: number, length: number): number {
    const count = Math.min(length, this.room);
    const tail = this.words[this.tail];
    for (let index = 0; index < count; index++) this.#bytes[(tail + index) % CAPACITY] = source[at + index];
    Atomics.store(this.words, this.tail, (tail + count) & MOST);
    return count;
  }

  /** @returns bytes given */
  read(target: Uint8Array, at: number, length: number): number {
    const count = Math.min(length, this.used);
    const head = this.words[this.head];
    for (let index = 0; index < count; index++) target[at + index] = this.#bytes[(head + index) % CAPACITY];
    Atomics.store(this.words, this.head, (head + count) & MOST);
    return count;
  }
}

export class BytePipe {
  /** From the guest. */
  readonly output: Ring;
  /** To the guest. */
  readonly input: Ring;
  readonly state: StateBlock;

  /** @param buffer what another thread made; none: a new one */
  constructor(buffer?: SharedArrayBuffer) {
    const block = new StateBlock(pipeLayout, buffer);
    this.state = block;
    const { outputHead, outputTail, inputHead, inputTail, output, input } = pipeLayout.at;
    this.output = new Ring(block.words, outputHead, outputTail, output);
    this.input = new Ring(block.words, inputHead, inputTail, input);
  }

  /** Its state has been loaded. @throws StateError when more is in it than it can hold */
  restored(): void {
    if (Math.max(this.output.used, this.input.used) > CAPACITY)
      throw new StateError('A console holds more than it can');
  }
}
