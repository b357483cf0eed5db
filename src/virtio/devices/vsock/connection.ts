/**
 * One connection of the vsock device: its state, the credit of both sides (virtio 1.3, 5.10.6.3), and what the guest sent
 * and the host's program has not taken yet.
 */
import { type HostKernel, type HostMapping, SystemError } from '../../../sys/host-kernel.js';
import type { Chain } from '../../queue/queue.js';
import { Shutdown } from './packet.js';

/**
 * Bytes from the guest that a connection holds for a host program that does not read (buf_alloc). A guest that sends more
 * than it has credit for loses the connection, so this times the number of connections bounds the host's memory.
 */
export const BUFFER_BYTES = 0x4_0000;
/** The guest is told of room when it has got so much more of it. */
const CREDIT_STEP = BUFFER_BYTES / 4;
/** Buffers without data that are kept for the next connection that needs one. */
const SPARE_BUFFERS = 8;

const EINTR = 4;
const EAGAIN = 11;

export const State = {
  /** A host program has connected and not yet said where to. */
  Greeting: 0,
  /** The guest has to answer our REQUEST. */
  Requested: 1,
  Open: 2,
  /** Only a RST to the guest is left. */
  Reset: 3,
  /** The guest is done with it; what it sent is still on its way to the host program. */
  Lingering: 4,
  Closed: 5,
} as const;
export type State = (typeof State)[keyof typeof State];

/** Packets without data that wait for a buffer of the guest's. */
export const Control = {
  reset: 0x1,
  request: 0x2,
  response: 0x4,
  creditUpdate: 0x8,
  creditRequest: 0x10,
  shutdown: 0x20,
} as const;

/** A ring of bytes that system calls can read. */
class SendBuffer {
  readonly #mapping: HostMapping;
  readonly #bytes: Uint8Array;
  readonly #address: number;
  #first = 0;
  used = 0;

  constructor(kernel: HostKernel) {
    this.#mapping = kernel.map({ length: BUFFER_BYTES, shared: false });
    this.#bytes = new Uint8Array(this.#mapping.view(0, BUFFER_BYTES));
    this.#address = Number(this.#mapping.handle.address);
  }

  /** Copies from the readable part of a chain; the caller knows that there is room. */
  append(chain: Chain, offset: number, length: number): void {
    const at = (this.#first + this.used) % BUFFER_BYTES;
    const count = Math.min(length, BUFFER_BYTES - at);
    chain.read(offset, this.#bytes, at, count);
    if (count < length) chain.read(offset + count, this.#bytes, 0, length - count);
    this.used += length;
  }

  /** One write. @returns its result */
  write(kernel: HostKernel, fd: number): number {
    const count = Math.min(this.used, BUFFER_BYTES - this.#first);
    const result = kernel.writeRaw(fd, this.#address + this.#first, count);
    if (result > 0) {
      this.#first = (this.#first + result) % BUFFER_BYTES;
      this.used -= result;
    }
    return result;
  }

  clear(): void {
    this.#first = 0;
    this.used = 0;
  }

  close(): void {
    this.#mapping.unmap();
  }
}

/** Buffers for the connections that need one. */
export class BufferPool {
  readonly #spare: SendBuffer[] = [];

  constructor(private readonly kernel: HostKernel) {}

  /** @returns undefined when the host has no memory */
  take(): SendBuffer | undefined {
    try {
      return this.#spare.pop() ?? new SendBuffer(this.kernel);
    } catch (error) {
      if (error instanceof SystemError) return undefined;
      throw error;
    }
  }

  give(buffer: SendBuffer): void {
    buffer.clear();
    if (this.#spare.length < SPARE_BUFFERS) this.#spare.push(buffer);
    else buffer.close();
  }

  close(): void {
    for (const buffer of this.#spare.splice(0)) buffer.close();
  }
}

export class Connection {
  state: State = State.Greeting;
  guestPort = 0;
  hostPort = 0;
  /** What the loop watches the socket for. */
  watched = 0;
  /** Control bits. */
  control = 0;
  /** The socket has, or may have, bytes for the guest. */
  readable = false;
  /** The last read was not short: the next will probably be worth a large one. */
  bulk = false;
  /** The host program will send no more, and all it sent is with the guest. */
  ended = false;
  /** The host program takes no more. */
  deaf = false;
  /** Shutdown bits that the guest sent. */
  guestShutdown = 0;
  /** When to give up, by the loop's clock. */
  deadline = Infinity;
  /** The greeting so far. */
  line = '';
  /** Lingering: bytes that the host program has yet to take, and when it last took some. */
  left = -1;
  taken = 0;
  /** Bytes that the guest sent and the host had no memory for. */
  lost = 0;

  /** Neighbours in the list of those that have something for the guest. */
  queued = false;
  previous: Connection | undefined;
  next: Connection | undefined;
  /** In the table: the next of the same hash. */
  sibling: Connection | undefined;

  /** Bytes, modulo 2^32: passed to the host program, and of these what the guest knows. */
  #forwarded = 0;
  #told = 0;
  /** Bytes sent to the guest, modulo 2^32; what it said that it took of them, and how many it can hold. */
  #sent = 0;
  #peerForwarded = 0;
  #peerBuffer = 0;
  /** The guest was asked for credit since it last had some. */
  #asked = false;
  #buffer: SendBuffer | undefined;

  constructor(
    private readonly kernel: HostKernel,
    private readonly pool: BufferPool,
    readonly fd: number,
  ) {}

  /** Bytes from the guest that the host program has not taken. */
  get buffered(): number {
    return this.#buffer === undefined ? 0 : this.#buffer.used;
  }

  /** What every packet to the guest says: the guest knows it from now on. */
  tellForwarded(): number {
    this.#told = this.#forwarded;
    return this.#forwarded;
  }

  /** What every packet of the guest says. */
  learnCredit(bufferSize: number, forwarded: number): void {
    this.#peerBuffer = bufferSize;
    this.#peerForwarded = forwarded;
    if (this.credit > 0) this.#asked = false;
  }

  /** Bytes that the guest can take. One that lies gets what it asked for, up to one packet for each of its buffers. */
  get credit(): number {
    const flying = (this.#sent - this.#peerForwarded) >>> 0;
    return Math.max(this.#peerBuffer - flying, 0);
  }

  /** The guest has no credit: asks for some, once. */
  askCredit(): void {
    if (this.#asked) return;
    this.#asked = true;
    this.control |= Control.creditRequest;
  }

  sent(bytes: number): void {
    this.#sent = (this.#sent + bytes) >>> 0;
  }

  /**
   * Passes data of the guest on: straight from its memory as far as the socket takes it, the rest from a buffer.
   *
   * @param iovecs address of `count` struct iovec that describe it
   * @param offset where it lies in the chain
   * @returns false when the guest had no credit for it, or the host has no memory
   */
  receive(chain: Chain, offset: number, length: number, iovecs: number, count: number): boolean {
    if (this.buffered + length > BUFFER_BYTES) return false;
    let done = this.deaf ? length : 0;
    while (done === 0 && this.buffered === 0) {
      const result = this.kernel.writevRaw(this.fd, iovecs, count);
      if (result === -EINTR) continue;
      if (result === -EAGAIN || result === 0) break;
      if (result < 0) this.#goDeaf();
      done = result < 0 ? length : result;
    }
    this.#forward(done);
    if (done < length) {
      this.#buffer ??= this.pool.take();
      if (this.#buffer === undefined) {
        this.lost = length - done;
        return false;
      }
      this.#buffer.append(chain, offset + done, length - done);
    }
    return true;
  }

  /** Writes what is buffered as far as the socket takes it. */
  flush(): void {
    while (this.#buffer !== undefined) {
      const result = this.#buffer.write(this.kernel, this.fd);
      if (result === -EINTR) continue;
      if (result === -EAGAIN || result === 0) return;
      if (result < 0) this.#goDeaf();
      else this.#forward(result);
      if (this.buffered === 0) this.releaseBuffer();
    }
    if ((this.guestShutdown & Shutdown.send) !== 0) this.kernel.shutdownSocket(this.fd, 1);
  }

  #forward(bytes: number): void {
    this.#forwarded = (this.#forwarded + bytes) >>> 0;
    if ((this.#forwarded - this.#told) >>> 0 >= CREDIT_STEP) this.control |= Control.creditUpdate;
  }

  /** What the guest sends from now on is thrown away; it is told not to. */
  #goDeaf(): void {
    const { buffered } = this;
    this.deaf = true;
    this.control |= Control.shutdown;
    this.releaseBuffer();
    this.#forward(buffered);
  }

  /** Looks whether the host program has closed its end altogether, which reading alone does not tell. */
  probe(): boolean {
    // No bytes: only the answer counts.
    if (!this.deaf && this.kernel.writeRaw(this.fd, 0, 0) < 0) this.#goDeaf();
    return this.deaf;
  }

  /** The guest said that it will send or receive no more. */
  shutdown(flags: number): void {
    const fresh = flags & Shutdown.both & ~this.guestShutdown;
    this.guestShutdown |= fresh;
    if ((fresh & Shutdown.receive) !== 0) {
      this.readable = false;
      this.kernel.shutdownSocket(this.fd, 0);
    }
    if ((fresh & Shutdown.send) !== 0) this.flush();
  }

  /** The Shutdown bits of this side. */
  get ownShutdown(): number {
    return (this.deaf ? Shutdown.receive : 0) | (this.ended ? Shutdown.send : 0);
  }

  releaseBuffer(): void {
    if (this.#buffer !== undefined) this.pool.give(this.#buffer);
    this.#buffer = undefined;
  }
}
