/** The guest's terminal: the port whose mode is Tty. */
import { EventEmitter, once } from 'node:events';
import type { Readable, Writable } from 'node:stream';
import type { CallOptions } from './connection.js';

/** Output that waits for who reads it. While nobody does, the newest is kept; else the guest finds its port busy. Bytes. */
const MAX_KEPT = 1024 * 1024;

/** Emits `change` when there is more, or no more. */
export class Console implements AsyncIterable<Buffer> {
  #kept: Buffer[] = [];
  #length = 0;
  #readers = 0;
  #ended = false;
  readonly #events = new EventEmitter();

  /** @internal */
  constructor(
    private readonly output: Readable,
    private readonly input: Writable,
  ) {
    output.on('data', (part: Buffer) => {
      this.#kept.push(part);
      this.#length += part.length;
      if (this.#readers > 0 && this.#length >= MAX_KEPT) output.pause();
      this.#dropOldest();
      this.#events.emit('change');
    });
    output.on('close', () => {
      this.#ended = true;
      this.#events.emit('change');
    });
    // Who writes is told.
    for (const stream of [input, output]) stream.on('error', () => undefined);
  }

  #dropOldest(): void {
    if (this.#readers > 0) return;
    for (let excess = this.#length - MAX_KEPT; excess > 0; excess = this.#length - MAX_KEPT) {
      const [oldest] = this.#kept;
      if (oldest.length > excess) this.#kept[0] = oldest.subarray(excess);
      else this.#kept.shift();
      this.#length -= Math.min(oldest.length, excess);
    }
  }

  /** @returns undefined at its end */
  async #next(signal?: AbortSignal): Promise<Buffer | undefined> {
    while (this.#kept.length === 0 && !this.#ended) {
      this.output.resume();
      await once(this.#events, 'change', { signal }).catch(() => signal?.throwIfAborted());
    }
    const part = this.#kept.shift();
    this.#length -= part?.length ?? 0;
    return part;
  }

  #release(): void {
    this.#readers--;
    this.#dropOldest();
    this.output.resume();
  }

  /** What the guest prints, from what nobody has read yet to the end of its process. What one reader takes, another does not get. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Buffer, void, undefined> {
    this.#readers++;
    try {
      for (let part = await this.#next(); part !== undefined; part = await this.#next()) yield part;
    } finally {
      this.#release();
    }
  }

  /**
   * Reads up to a text, or what a pattern finds among the bytes; what comes behind is left for who reads next.
   *
   * @returns what was read, with the text; of much, the end
   * @throws Error when the process ends without it, or the signal's reason; what was read is left then
   */
  async waitFor(text: string | RegExp, { signal }: CallOptions = {}): Promise<string> {
    let seen: Buffer = Buffer.alloc(0);
    this.#readers++;
    try {
      for (;;) {
        const part = await this.#next(signal);
        if (part === undefined) throw new Error(`The guest's process ended without ${String(text)}`);
        seen = Buffer.concat([seen, part]);
        const end = endOf(text, seen);
        if (end !== undefined) {
          const found = seen.toString('utf8', 0, end);
          seen = seen.subarray(end);
          return found;
        }
        if (seen.length > 2 * MAX_KEPT) seen = seen.subarray(-MAX_KEPT);
      }
    } finally {
      if (seen.length > 0) this.#kept.unshift(seen);
      this.#length += seen.length;
      this.#release();
    }
  }

  /** Types into it. Resolves when there is room for more. @throws Error when the process has ended */
  async write(data: string | Uint8Array): Promise<void> {
    if (!this.input.writable) throw new Error("The guest's process has ended");
    if (this.input.write(data)) return;
    const settled = new AbortController();
    const { signal } = settled;
    await Promise.race([once(this.input, 'drain', { signal }), once(this.input, 'close', { signal })]);
    settled.abort();
  }
}

/** Where a text ends; undefined: it is not there. */
function endOf(text: string | RegExp, bytes: Buffer): number | undefined {
  if (typeof text === 'string') {
    const at = bytes.indexOf(text);
    return at < 0 ? undefined : at + Buffer.byteLength(text);
  }
  // As many characters as bytes.
  const match = new RegExp(text.source, text.flags.replace(/[gy]/g, '')).exec(bytes.toString('latin1'));
  return match === null ? undefined : match.index + match[0].length;
}
