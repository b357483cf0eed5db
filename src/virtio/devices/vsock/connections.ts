/** All connections of the vsock device: their sockets, their places in the lists, and how each ends. */
import { EPOLL, SystemError } from '../../../sys/host-kernel.js';
import type { DeviceContext, Timer } from '../../device.js';
import { BufferPool, Connection, Control, State } from './connection.js';
import { VsockCounter } from './description.js';
import { Shutdown } from './packet.js';

/** Each holds a descriptor and up to BUFFER_BYTES: neither guest nor host programs may open them without end. */
export const MAX_CONNECTIONS = 1024;
/** Milliseconds for the guest to answer a shutdown. */
const SHUTDOWN_TIMEOUT = 10_000;
/** Milliseconds after which a host program that has taken nothing of what the guest left may lose it to a new connection. */
const LINGER_TIMEOUT = 30_000;
const SWEEP_INTERVAL = 1000;
/** Bytes in a socket that its other end has not read, in steps of whole buffers of the kernel's. */
const SIOCOUTQ = 0x5411;

/** Connections by their ports. Guests choose ports, so a lookup may walk over all connections, at most 1024. */
export class ConnectionTable {
  readonly #buckets = new Array<Connection | undefined>(1024).fill(undefined);
  /** Packets come in runs. */
  #last: Connection | undefined;

  #bucket(guestPort: number, hostPort: number): number {
    return (Math.imul(guestPort, 0x9e37_79b1) ^ Math.imul(hostPort, 0x85eb_ca6b)) >>> 22;
  }

  find(guestPort: number, hostPort: number): Connection | undefined {
    const last = this.#last;
    if (last?.guestPort === guestPort && last.hostPort === hostPort) return last;
    let found = this.#buckets[this.#bucket(guestPort, hostPort)];
    while (found !== undefined && (found.guestPort !== guestPort || found.hostPort !== hostPort)) found = found.sibling;
    this.#last = found;
    return found;
  }

  add(connection: Connection): void {
    const bucket = this.#bucket(connection.guestPort, connection.hostPort);
    connection.sibling = this.#buckets[bucket];
    this.#buckets[bucket] = connection;
  }

  /** One that is not in it is no error. */
  remove(connection: Connection): void {
    if (this.#last === connection) this.#last = undefined;
    const bucket = this.#bucket(connection.guestPort, connection.hostPort);
    let previous: Connection | undefined;
    for (let at = this.#buckets[bucket]; at !== undefined; at = at.sibling) {
      if (at === connection) {
        if (previous === undefined) this.#buckets[bucket] = at.sibling;
        else previous.sibling = at.sibling;
        at.sibling = undefined;
        return;
      }
      previous = at;
    }
  }
}

/** Connections in the order in which they are served. One that leaves takes its place with it: the list never grows. */
export class ServiceList {
  #first: Connection | undefined;
  #last: Connection | undefined;

  get isEmpty(): boolean {
    return this.#first === undefined;
  }

  add(connection: Connection): void {
    if (connection.queued) return;
    connection.queued = true;
    connection.previous = this.#last;
    if (this.#last === undefined) this.#first = connection;
    else this.#last.next = connection;
    this.#last = connection;
  }

  /** The one whose turn it is. It stays. */
  get first(): Connection | undefined {
    return this.#first;
  }

  remove(connection: Connection): void {
    if (!connection.queued) return;
    const { previous, next } = connection;
    if (previous === undefined) this.#first = next;
    else previous.next = next;
    if (next === undefined) this.#last = previous;
    else next.previous = previous;
    connection.queued = false;
    connection.previous = undefined;
    connection.next = undefined;
  }
}

/** Told to the device. */
export interface ConnectionEvents {
  /** The loop has something of a connection's socket. */
  ready(connection: Connection, ready: number): void;
  /** Once in a while, as long as somebody waits for it. */
  sweep(): void;
}

export class Connections {
  readonly table = new ConnectionTable();
  /** Those with something for the guest. */
  readonly service = new ServiceList();
  /** Somebody waits for a connection to go: the next sweep is to come. */
  waiting = false;
  readonly #all = new Set<Connection>();
  readonly #pool: BufferPool;
  readonly #sweep: Timer;
  #sweeping = false;
  #active = false;
  readonly #unread = new Int32Array(1);
  readonly #unreadBytes = new Uint8Array(this.#unread.buffer);

  constructor(
    private readonly context: DeviceContext,
    private readonly events: ConnectionEvents,
  ) {
    this.#pool = new BufferPool(context.kernel);
    this.#sweep = context.loop.timer(() => {
      this.#sweeping = false;
      events.sweep();
    });
  }

  /**
   * Whether there is a place for one more. One that only waits for its host program to read, and has waited in vain, gives
   * its place up: the longest wait first.
   */
  makeRoom(): boolean {
    if (this.#all.size < MAX_CONNECTIONS) return true;
    let oldest: Connection | undefined;
    for (const connection of this.#all) {
      if (connection.state !== State.Lingering) continue;
      if (oldest === undefined || connection.taken < oldest.taken) oldest = connection;
    }
    if (oldest === undefined || this.context.loop.now() - oldest.taken < LINGER_TIMEOUT) return false;
    this.close(oldest);
    return true;
  }

  start(): void {
    this.#active = true;
    if (this.#all.size > 0) this.startSweep();
  }

  /** @returns undefined when it cannot be watched, and is closed again */
  open(fd: number): Connection | undefined {
    const connection = new Connection(this.context.kernel, this.#pool, fd);
    try {
      this.context.loop.watch(fd, EPOLL.IN, (ready) => this.events.ready(connection, ready));
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      this.context.kernel.close(fd);
      return undefined;
    }
    connection.watched = EPOLL.IN;
    this.#all.add(connection);
    return connection;
  }

  /** @param events none: only the socket's end is told, once */
  watch(connection: Connection, events: number): void {
    const wanted = (events & (EPOLL.IN | EPOLL.OUT)) === 0 ? EPOLL.EDGE : events & (EPOLL.IN | EPOLL.OUT);
    if (connection.watched === wanted) return;
    connection.watched = wanted;
    this.context.loop.rewatch(connection.fd, wanted);
  }

  /** A host program that has sent something that nobody read sees ECONNRESET then, any other the end of the file. */
  #closeSocket(connection: Connection): void {
    if (connection.watched === 0) return;
    connection.watched = 0;
    const lost = connection.buffered + connection.lost;
    if (lost > 0) {
      this.context.counters[VsockCounter.dropped] += lost;
      const { guestPort, hostPort } = connection;
      const which = `the connection between the guest's port ${guestPort} and the host's ${hostPort}`;
      this.context.log('warn', `${lost} bytes that the guest sent were dropped: ${which} ended before they were taken`);
    }
    connection.releaseBuffer();
    this.context.loop.unwatch(connection.fd);
    this.context.kernel.close(connection.fd);
  }

  /** Forgets a connection. */
  close(connection: Connection): void {
    this.#closeSocket(connection);
    connection.state = State.Closed;
    connection.control = 0;
    connection.readable = false;
    this.table.remove(connection);
    this.service.remove(connection);
    this.#all.delete(connection);
    if (this.waiting) this.startSweep();
  }

  /** The guest is to hear that a connection is no more. */
  reset(connection: Connection): void {
    // It has never heard of it.
    if (connection.state === State.Greeting || (connection.control & Control.request) !== 0) {
      this.close(connection);
      return;
    }
    this.#closeSocket(connection);
    connection.state = State.Reset;
    connection.control = Control.reset;
    connection.readable = false;
    this.service.add(connection);
  }

  /**
   * The guest has forgotten a connection. What it sent before still goes to the host program, for as long as that takes, as
   * bytes in a socket outlive their writer.
   */
  leave(connection: Connection): void {
    if (connection.state !== State.Open || connection.buffered === 0) {
      this.close(connection);
      return;
    }
    this.table.remove(connection);
    this.service.remove(connection);
    connection.state = State.Lingering;
    connection.control = 0;
    connection.readable = false;
    connection.shutdown(Shutdown.both);
    connection.deadline = Infinity;
    this.watch(connection, EPOLL.OUT);
    this.#progress(connection);
    this.startSweep();
  }

  /** Whether the host program has read is seen at its end of the socket: epoll tells of room only when there is much of it. */
  #progress(connection: Connection): void {
    if (this.context.kernel.ioctlBufferRaw(connection.fd, SIOCOUTQ, this.#unreadBytes) < 0) return;
    const left = this.#unread[0] + connection.buffered;
    if (left === connection.left) return;
    connection.left = left;
    connection.taken = this.context.loop.now();
  }

  /** 5.10.6.5: a guest that was told of the end of both directions resets the connection, or we do. */
  expectReset(connection: Connection): void {
    if (connection.ownShutdown === Shutdown.both && connection.deadline === Infinity)
      this.expire(connection, SHUTDOWN_TIMEOUT);
  }

  expire(connection: Connection, milliseconds: number): void {
    connection.deadline = this.context.loop.now() + milliseconds;
    this.startSweep();
  }

  startSweep(): void {
    if (this.#sweeping || !this.#active) return;
    this.#sweeping = true;
    this.#sweep.start(SWEEP_INTERVAL);
  }

  checkDeadlines(): void {
    const now = this.context.loop.now();
    for (const connection of this.#all) {
      if (connection.state === State.Lingering) {
        this.#progress(connection);
        this.startSweep();
      } else if (connection.deadline === Infinity) continue;
      else if (connection.deadline > now) this.startSweep();
      else if (connection.state !== State.Reset) this.reset(connection);
    }
  }

  /** The device has lost its queues. What the guest sent before is the host programs' all the same. */
  stop(): void {
    this.#active = false;
    this.waiting = false;
    this.#sweep.stop();
    this.#sweeping = false;
    for (const connection of this.#all) if (connection.state !== State.Lingering) this.leave(connection);
  }

  /** The end, after `stop`. */
  end(): void {
    for (const connection of this.#all) this.close(connection);
    this.#pool.close();
  }
}
