/**
 * A client's connection, read by recvmsg: streams of Node.js drop the descriptors that come with bytes (SCM_RIGHTS, unix(7)).
 *
 * They belong to the request that the last of the bytes is of with which they came: recvmsg may put bytes that were sent before in front,
 * and ends with those that were sent with them.
 */
import type { IncomingMessage } from 'node:http';
import type net from 'node:net';
import os from 'node:os';
import { Duplex } from 'node:stream';
import { errnoText, type HostKernel } from '../sys/host-kernel.js';
import { descriptorOf, whenReadable } from '../sys/readable.js';
import { Descriptors } from './descriptors.js';

const { EAGAIN, EINTR } = os.constants.errno;

/** How long a client may take to close its end after its last answer. */
const LINGER_MILLISECONDS = 2000;

interface Parcel {
  readonly descriptors: readonly number[];
  readonly cut: boolean;
}

export class Connection extends Duplex {
  readonly #fd: number;
  #reads = false;
  /** What still comes is thrown away. */
  #lingers = false;
  #stopWaiting: () => void = () => undefined;
  /** Those that came with a byte that has not been parsed yet. */
  readonly #parcels = new Map<Buffer, Parcel>();
  /** Of the request whose headers come next. */
  #next: Descriptors;
  /** The one whose headers came last. */
  #request: IncomingMessage | undefined;
  /** Of those that are not answered yet. */
  readonly #open = new Map<IncomingMessage, Descriptors>();

  /** @param socket the same connection, of which nothing has been read: it writes, and knows what takes too long */
  constructor(
    private readonly kernel: HostKernel,
    private readonly socket: net.Socket,
  ) {
    super();
    this.#next = new Descriptors(kernel);
    this.#fd = descriptorOf(socket);
    socket.on('error', (error) => this.destroy(error));
    socket.on('timeout', () => this.emit('timeout'));
    socket.on('close', () => this.destroy());
    // Before the HTTP server's own listener: each piece before it is parsed.
    this.on('data', (piece: Buffer) => this.#parses(piece));
  }

  #parses(piece: Buffer): void {
    const parcel = this.#parcels.get(piece);
    if (parcel === undefined) return;
    this.#parcels.delete(piece);
    const unfinished = this.#request?.complete === false ? this.#open.get(this.#request) : undefined;
    (unfinished ?? this.#next).add(parcel.descriptors, parcel.cut);
  }

  /** The headers of a request have been parsed. @returns what comes with it, all of it when its body has been read */
  begins(request: IncomingMessage): Descriptors {
    const descriptors = this.#next;
    this.#next = new Descriptors(this.kernel);
    this.#request = request;
    this.#open.set(request, descriptors);
    return descriptors;
  }

  /** The request is answered. */
  ends(request: IncomingMessage): void {
    this.#open.get(request)?.close();
    this.#open.delete(request);
  }

  override _read(): void {
    if (this.#reads) return;
    this.#reads = true;
    // Others have a turn between two pieces.
    setImmediate(() => this.#receive());
  }

  #receive(): void {
    if (this.destroyed || this.socket.destroyed) return;
    const received = this.kernel.receiveUnix(this.#fd);
    if (received.bytes === undefined) {
      if (received.errno === EAGAIN || received.errno === EINTR) this.#wait();
      else this.destroy(new Error(errnoText(received.errno)));
      return;
    }
    const { bytes, descriptors, cut } = received;
    if (this.#lingers) {
      for (const fd of descriptors) this.kernel.close(fd);
      if (bytes.length > 0) setImmediate(() => this.#receive());
      else this.#endSoon();
      return;
    }
    this.#reads = false;
    // It is heard of.
    if (this.socket.timeout) this.socket.setTimeout(this.socket.timeout);
    if (bytes.length === 0) {
      this.push(null);
    } else if (descriptors.length === 0 && !cut) {
      this.push(bytes);
    } else {
      // Their byte by itself, so that the parser is where it was sent when they are told of.
      const last = bytes.subarray(bytes.length - 1);
      this.#parcels.set(last, { descriptors, cut });
      if (bytes.length > 1) this.push(bytes.subarray(0, -1));
      this.push(last);
    }
  }

  /** Nothing comes any more. */
  #endSoon(): void {
    if (this.writableFinished) this.destroy();
    else this.once('finish', () => this.destroy());
  }

  #wait(): void {
    try {
      this.#stopWaiting = whenReadable(this.kernel, this.#fd, () => this.#receive());
    } catch (error) {
      this.destroy(error as Error);
    }
  }

  override _write(piece: Buffer, encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    this.socket.write(piece, encoding, done);
  }

  override _final(done: () => void): void {
    this.socket.end(done);
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    this.#stopWaiting();
    this.socket.destroy();
    for (const { descriptors } of this.#parcels.values()) for (const fd of descriptors) this.kernel.close(fd);
    this.#parcels.clear();
    this.#next.close();
    for (const descriptors of this.#open.values()) descriptors.close();
    done(error);
  }

  // What the HTTP server uses of a socket besides.

  setTimeout(milliseconds: number): this {
    this.socket.setTimeout(milliseconds);
    return this;
  }

  /** Told when the last answer has been given: its client may lose it if it is still writing (RFC 9112, 9.6). */
  destroySoon(): void {
    this.#lingers = true;
    if (this.writable) this.end();
    setTimeout(() => this.destroy(), LINGER_MILLISECONDS).unref();
  }
}
