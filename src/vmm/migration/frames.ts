/**
 * What goes over a migration's connections: frames of a kind, a length and a checksum, all little endian.
 *
 * | bytes | what                                            |
 * | ----- | ----------------------------------------------- |
 * | 2     | kind                                            |
 * | 2     | zero                                            |
 * | 4     | length of what follows the header               |
 * | 4     | CRC-32 of the eight bytes before and of the rest |
 *
 * A peer's input is untrusted: each kind has a largest length, and nothing is allocated or done by more than that.
 */
import type { Duplex } from 'node:stream';
import { crc32 } from 'node:zlib';
import { foreignText } from '../machine/machine-error.js';
import { ConnectionLost, MigrationError, Refused } from './migration-error.js';

export const Frame = {
  /** JSON: who speaks. The first frame of either side. */
  hello: 1,
  /** JSON: what the machine is made of. */
  machine: 2,
  /** The destination has memory for it. */
  accepted: 3,
  /** Guest physical address (8 bytes), and what is there: whole pages. */
  memory: 4,
  /** Number of a round (4 bytes), all of whose memory has been sent on this connection; answered by the same. */
  round: 5,
  /** Guest physical address (8 bytes), and the CRC-32 of each page from there on. */
  checksums: 6,
  /** JSON: where its processors and devices stand. */
  state: 7,
  /** The destination could go on. */
  prepared: 8,
  /** JSON: it is to go on. */
  go: 9,
  /** The machine is the destination's. */
  taken: 10,
  /** JSON: why not. The last frame of either side. */
  refused: 11,
  /**
   * Before the hello of a machine that stays on its host: how many descriptors come with it (4 bytes), of the files that its memory is in,
   * in the order of its stretches.
   */
  descriptors: 12,
} as const;
export type Frame = (typeof Frame)[keyof typeof Frame];

export const PAGE_SIZE = 4096;
/** Bytes of memory in one frame, at most. */
export const MEMORY_AT_ONCE = 2 ** 20;
export const ADDRESS_BYTES = 8;

/** How long the other side's end is waited for at most, milliseconds. */
const LINGER = 2000;
const HEADER = 12;
const SUMMED = 8;
const SMALL = 4096;
/** The state of 254 vCPUs with AMX has some 20 MiB. */
const STATE = 64 * 2 ** 20;
const LARGEST: ReadonlyMap<number, number> = new Map([
  [Frame.hello, SMALL],
  [Frame.machine, STATE],
  [Frame.accepted, 0],
  [Frame.memory, ADDRESS_BYTES + MEMORY_AT_ONCE],
  [Frame.round, 4],
  [Frame.checksums, ADDRESS_BYTES + MEMORY_AT_ONCE],
  [Frame.state, STATE],
  [Frame.prepared, 0],
  [Frame.go, SMALL],
  [Frame.taken, 0],
  [Frame.refused, SMALL],
  [Frame.descriptors, 4],
]);

export interface Header {
  readonly kind: number;
  /** Bytes. */
  readonly length: number;
}

/** @returns the header of a frame with this body */
function frameHeader(kind: Frame, body: Uint8Array): Buffer {
  const header = Buffer.alloc(HEADER);
  header.writeUInt16LE(kind, 0);
  header.writeUInt32LE(body.length, 4);
  header.writeUInt32LE(crc32(body, crc32(header.subarray(0, SUMMED))), SUMMED);
  return header;
}

/** What goes with descriptors. @param count of them */
export function descriptorsFrame(count: number): Buffer {
  const body = Buffer.alloc(4);
  body.writeUInt32LE(count);
  return Buffer.concat([frameHeader(Frame.descriptors, body), body]);
}

/** One connection, as one side of it uses it: one reader and one writer at a time. */
export class Connection {
  /** Bytes that have been sent. */
  sent = 0;
  readonly #header = Buffer.alloc(HEADER);
  /** Of the frame that is being read: the checksum that it is to have, and that of what has been read. */
  #expected = 0;
  #sum = 0;
  /** What has come and is not used yet. */
  #chunk: Buffer = Buffer.alloc(0);

  /** @param patience milliseconds for which the other side may neither take nor send anything */
  constructor(
    private readonly stream: Duplex,
    private readonly patience: number,
  ) {
    // What is asked of it next tells why.
    stream.on('error', () => undefined);
  }

  /** @param body what follows the header @throws ConnectionLost */
  async send(kind: Frame, body: Uint8Array = new Uint8Array(0)): Promise<void> {
    const header = frameHeader(kind, body);
    this.sent += HEADER + body.length;
    this.stream.cork();
    let room = this.stream.write(header);
    if (body.length > 0) room = this.stream.write(body);
    this.stream.uncork();
    if (!room) await this.#event('drain', () => !this.stream.destroyed && !this.stream.writableNeedDrain);
  }

  /** @throws ConnectionLost */
  async sendJson(kind: Frame, value: unknown): Promise<void> {
    await this.send(kind, Buffer.from(JSON.stringify(value)));
  }

  /**
   * The next frame's. What it announces is read by `body`, or by `start` and `rest`, wholly.
   *
   * @param patience how long it may take to come, milliseconds
   * @throws MigrationError
   */
  async header(patience = this.patience): Promise<Header> {
    const header = this.#header;
    if (this.#chunk.length === 0) this.#chunk = await this.#read(patience);
    await this.#into(header);
    const kind = header.readUInt16LE(0);
    const length = header.readUInt32LE(4);
    const largest = LARGEST.get(kind);
    if (largest === undefined || header.readUInt16LE(2) !== 0) {
      throw new MigrationError('The other side sent what is no frame of a migration');
    }
    if (length > largest) {
      throw new MigrationError(`The other side sent a frame ${kind} of ${length} bytes; accepted are up to ${largest}`);
    }
    this.#expected = header.readUInt32LE(SUMMED);
    this.#sum = crc32(header.subarray(0, SUMMED));
    if (length === 0) this.#check();
    return { kind, length };
  }

  async body({ length }: Header): Promise<Buffer> {
    const body = Buffer.alloc(length);
    await this.#into(body);
    this.#sum = crc32(body, this.#sum);
    if (length > 0) this.#check();
    return body;
  }

  /** The first bytes of a body; `rest` reads what is left of it. */
  async start(length: number): Promise<Buffer> {
    const start = Buffer.alloc(length);
    await this.#into(start);
    this.#sum = crc32(start, this.#sum);
    return start;
  }

  /** @param take called with what comes, in order; not valid afterwards */
  async rest(length: number, take: (bytes: Uint8Array) => void): Promise<void> {
    for (let left = length; left > 0;) {
      const bytes = await this.#next(left);
      this.#sum = crc32(bytes, this.#sum);
      take(bytes);
      left -= bytes.length;
    }
    this.#check();
  }

  #check(): void {
    if (this.#sum !== this.#expected) throw new MigrationError('What the other side sent has been damaged on its way');
  }

  /** A frame of one kind. @returns its body @throws MigrationError also when the other side refuses */
  async expect(kind: Frame): Promise<Buffer> {
    return await this.bodyOf(kind, await this.header());
  }

  /** As `expect`, where the header has been read. */
  async bodyOf(kind: Frame, header: Header): Promise<Buffer> {
    if (header.kind === Frame.refused) throw await this.refusal(header);
    if (header.kind !== kind) throw new MigrationError(`The other side sent a frame ${header.kind} instead of ${kind}`);
    return await this.body(header);
  }

  /** Why the other side refuses. @param header of that frame */
  async refusal(header: Header): Promise<Refused> {
    return new Refused(`The other side refuses: ${reasonIn(await this.body(header))}`);
  }

  /** Tells the other side why not, and ends the connection. Never rejects. */
  async refuse(reason: string): Promise<void> {
    // It may take nothing any more, and is not waited for.
    this.sendJson(Frame.refused, { reason: reason.slice(0, MAX_REASON) }).catch(() => undefined);
    await this.end();
  }

  /** Whatever is sent from now on goes nowhere. */
  destroy(): void {
    this.stream.destroy();
  }

  /** Resolves when the other side has all that was sent and has ended its side as well, or will not. */
  async end(): Promise<void> {
    const { stream } = this;
    stream.end();
    // A connection that is closed over what has come and is not read loses what was sent last.
    const ended = () => {
      while (stream.read() !== null);
      return stream.readableEnded;
    };
    await this.#event('readable', ended, Math.min(LINGER, this.patience)).catch(() => undefined);
    stream.destroy();
  }

  async #into(target: Buffer): Promise<void> {
    for (let at = 0; at < target.length;) {
      const bytes = await this.#next(target.length - at);
      target.set(bytes, at);
      at += bytes.length;
    }
  }

  /** Some of what comes next, at least one byte and at most so many. */
  async #next(most: number): Promise<Buffer> {
    if (this.#chunk.length === 0) this.#chunk = await this.#read(this.patience);
    const bytes = this.#chunk.subarray(0, most);
    this.#chunk = this.#chunk.subarray(bytes.length);
    return bytes;
  }

  async #read(patience: number): Promise<Buffer> {
    let chunk: Buffer | null = null;
    await this.#event('readable', () => (chunk = this.stream.read() as Buffer | null) !== null, patience);
    return chunk!;
  }

  /** Until something is so; looked at when an event tells. @throws ConnectionLost */
  #event(name: 'drain' | 'readable', so: () => boolean, patience = this.patience): Promise<void> {
    const { stream } = this;
    return new Promise((resolve, reject) => {
      const settle = (error?: Error) => {
        clearTimeout(timer);
        for (const event of [name, 'end', 'close']) stream.off(event, look);
        if (error === undefined) resolve();
        else reject(error);
      };
      const look = () => {
        if (so()) settle();
        else if (stream.errored != null)
          settle(new ConnectionLost(`The connection broke: ${stream.errored.message}`, false));
        else if (stream.readableEnded) settle(new ConnectionLost('The other side has ended the connection', true));
        else if (stream.destroyed) settle(new ConnectionLost('The connection was given up', false));
      };
      const silent = () => {
        settle(new ConnectionLost(`The other side has done nothing for ${patience / 1000} s`, false));
      };
      const timer = patience === Infinity ? undefined : setTimeout(silent, patience);
      for (const event of [name, 'end', 'close']) stream.on(event, look);
      look();
    });
  }
}

/** Characters, each of which JSON may write as six. */
const MAX_REASON = 600;

/** As another process gave it, on one line. */
function reasonIn(body: Buffer): string {
  try {
    const { reason } = JSON.parse(body.toString('utf8')) as { reason?: unknown };
    if (typeof reason === 'string') return foreignText(reason.slice(0, MAX_REASON));
  } catch {
    // It is no JSON.
  }
  return 'for a reason that cannot be read';
}
