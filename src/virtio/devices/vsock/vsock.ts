/**
 * The vsock device (virtio 1.3, 5.10): stream sockets between the guest and programs of the host.
 *
 * On the host's side they are Unix sockets, as Cloud Hypervisor and Firecracker have it. A program that connects to the
 * device's socket says `CONNECT <port>\n` and reads `OK <port>\n` once the guest has accepted; a guest that connects to
 * port P of the host reaches the program that listens at `<socket>_<P>`.
 *
 * Modelled: streams, credit both ways, half-closed connections; the transport reset event, after a restore. Not modelled: seqpacket
 * and datagram sockets.
 *
 * Data goes between sockets and the guest's memory without a copy, save what a host program is slow to take. Nothing is
 * kept for a guest that is slow: its bytes stay in the socket.
 */
import { EPOLL, SystemError } from '../../../sys/host-kernel.js';
import type { DeviceContext, DeviceQueue, Driver, Timer, VirtioDevice } from '../../device.js';
import { IovecArray } from '../../queue/iovec.js';
import { type Chain, MAX_CHAIN, Pop } from '../../queue/queue.js';
import { type Connection, Control, State } from './connection.js';
import { Connections } from './connections.js';
import { VsockCounter, VsockOwn } from './description.js';
import { VsockGreeter } from './greeter.js';
import { HEADER_BYTES, HOST_CID, MAX_PACKET, Op, PacketHeader, PacketType, Shutdown } from './packet.js';
import { VsockSender } from './sender.js';

const RECEIVE = 0;
const TRANSMIT = 1;
const EVENT = 2;
/** 5.10.6.7: struct virtio_vsock_event, whose only field is its id. */
const TRANSPORT_RESET = Uint8Array.of(0, 0, 0, 0);

/** Chains taken from the transmit queue before others of the worker get their turn. */
const BATCH = 256;

export interface VsockOptions {
  /** The guest's CID. */
  readonly cid: number;
  /** Path of the socket that `listener` listens at. */
  readonly socket: string;
  /** Not blocking. Its opener closes it, after this device. */
  readonly listener: number;
}

export class VsockDevice implements VirtioDevice {
  readonly #cidLow: number;
  readonly #cidHigh: number;
  readonly #incoming = new PacketHeader();
  readonly #vectors: IovecArray;
  readonly #connections: Connections;
  readonly #sender: VsockSender;
  readonly #greeter: VsockGreeter;
  /** Goes on with what a turn had to leave. */
  readonly #again: Timer;

  #receive: DeviceQueue | undefined;
  #transmit: DeviceQueue | undefined;
  #event: DeviceQueue | undefined;
  #active = false;
  #broken = false;
  /** The transmit queue waits for room in the sender's `resets`. */
  #paused = false;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: VsockOptions,
  ) {
    const { cid, listener } = options;
    this.#cidLow = cid % 2 ** 32;
    this.#cidHigh = Math.floor(cid / 2 ** 32);
    this.#vectors = new IovecArray(context.kernel, MAX_CHAIN);
    this.#again = context.loop.timer(() => this.#goOn());
    this.#connections = new Connections(context, {
      ready: (connection, ready) => this.#ready(connection, ready),
      sweep: () => this.#sweep(),
    });
    this.#sender = new VsockSender(context, this.#connections, cid, (fault) => this.#break(fault));
    this.#greeter = new VsockGreeter(context, this.#connections, listener, () => this.#again.start(0));
  }

  activate({ queues }: Driver): void {
    this.#receive = queues[RECEIVE];
    this.#transmit = queues[TRANSMIT];
    this.#event = queues[EVENT];
    this.#active = true;
    this.#broken = false;
    this.#paused = false;
    this.#connections.start();
    this.#sender.start();
    this.#greeter.start();
  }

  kick(queue: DeviceQueue): void {
    if (this.#broken) return;
    if (queue === this.#transmit) this.#fromGuest(queue);
    else if (queue === this.#receive) this.#sender.kick(queue);
    else if (queue === this.#event) this.#tellReset(queue);
    this.#toGuest();
  }

  /** Its buffers wait in the ring until there is something to tell. */
  #tellReset(queue: DeviceQueue): void {
    const { own, counters } = this.context;
    const { ring } = queue;
    ring.suppressKicks();
    for (let left = ring.size; left > 0 && own[VsockOwn.resetDue] !== 0; left--) {
      const pop = ring.pop();
      if (pop === Pop.Taken) {
        const { chain } = ring;
        const room = chain.readable === 0 && chain.writableBytes >= TRANSPORT_RESET.length;
        if (room) own[VsockOwn.resetDue] = 0;
        else counters[VsockCounter.malformed]++;
        ring.push(chain.id, room ? chain.write(0, TRANSPORT_RESET, 0, TRANSPORT_RESET.length) : 0);
      } else if (pop === Pop.Broken) {
        this.#break(ring.fault);
        return;
      } else if (!ring.resumeKicks()) break;
    }
    queue.signal();
  }

  #goOn(): void {
    if (this.#connections.waiting) this.#greeter.accept();
    if (this.#transmit !== undefined && !this.#broken) this.#fromGuest(this.#transmit);
    this.#toGuest();
  }

  #sweep(): void {
    if (this.#connections.waiting) this.#greeter.accept();
    this.#connections.checkDeadlines();
    this.#toGuest();
  }

  #break(fault: string): void {
    if (this.#broken) return;
    this.#broken = true;
    this.context.needsReset(fault);
  }

  #toGuest(): void {
    if (this.#receive === undefined || this.#broken) return;
    const more = this.#sender.send(this.#receive);
    if (!this.#sender.goesOn) return;
    if (this.#paused && !this.#sender.resets.isFull) {
      this.#paused = false;
      this.#again.start(0);
    } else if (more) this.#again.start(0);
  }

  #fromGuest(queue: DeviceQueue): void {
    const { ring } = queue;
    ring.suppressKicks();
    let left = BATCH;
    for (; left > 0; left--) {
      if (this.#sender.resets.isFull) {
        // Kicks stay off: `#toGuest` goes on when it has made room.
        if (!this.#paused) this.context.counters[VsockCounter.paused]++;
        this.#paused = true;
        break;
      }
      const pop = ring.pop();
      if (pop === Pop.Taken) {
        this.#packet(ring.chain);
        ring.push(ring.chain.id, 0);
      } else if (pop === Pop.Broken) {
        this.#break(ring.fault);
        break;
      } else if (ring.resumeKicks()) ring.suppressKicks();
      else break;
    }
    queue.signal();
    if (left === 0) this.#again.start(0);
  }

  #packet(chain: Chain): void {
    const packet = this.#incoming;
    if (chain.read(0, packet.bytes, 0, HEADER_BYTES) < HEADER_BYTES) {
      this.context.counters[VsockCounter.malformed]++;
      return;
    }
    // 5.10.6: what does not come from the guest's own CID is nobody's.
    if (packet.sourceCidLow !== this.#cidLow || packet.sourceCidHigh !== this.#cidHigh) {
      this.context.counters[VsockCounter.malformed]++;
      return;
    }
    const toHost = packet.targetCidLow === HOST_CID && packet.targetCidHigh === 0 && packet.type === PacketType.stream;
    const connection = toHost ? this.#connections.table.find(packet.sourcePort, packet.targetPort) : undefined;
    if (connection === undefined) {
      if (packet.op === Op.reset) return;
      if (toHost && packet.op === Op.request) this.#connect(packet);
      else this.#sender.resets.add(packet);
      return;
    }
    // The guest has not heard yet that it is gone.
    if (connection.state === State.Reset && packet.op !== Op.reset) return;
    if (packet.length > MAX_PACKET || packet.length > chain.readableBytes - HEADER_BYTES) {
      this.context.counters[VsockCounter.malformed]++;
      this.#finish(connection);
      return;
    }
    connection.learnCredit(packet.bufferSize, packet.forwarded);
    if (!this.#perform(connection, packet, chain)) this.#finish(connection);
    else if (connection.state === State.Open && (connection.control !== 0 || connection.readable))
      this.#connections.service.add(connection);
  }

  /** @returns false when the packet has no place in the connection */
  #perform(connection: Connection, packet: PacketHeader, chain: Chain): boolean {
    if (packet.op === Op.reset) {
      if (connection.state === State.Requested) this.context.counters[VsockCounter.refused]++;
      this.#connections.leave(connection);
      return true;
    }
    if (connection.state === State.Requested) {
      return packet.op === Op.response && this.#answered(connection);
    }
    switch (packet.op) {
      case Op.data:
        return this.#data(connection, packet.length, chain);
      case Op.creditUpdate:
        return true;
      case Op.creditRequest:
        connection.control |= Control.creditUpdate;
        return true;
      case Op.shutdown:
        connection.shutdown(packet.flags);
        if (connection.guestShutdown === Shutdown.both) this.#finish(connection);
        return true;
      default:
        return false;
    }
  }

  #data(connection: Connection, length: number, chain: Chain): boolean {
    if ((connection.guestShutdown & Shutdown.send) !== 0) return false;
    if (length === 0) return true;
    this.context.counters[VsockCounter.fromGuest]++;
    const vectors = this.#vectors;
    const count = vectors.describe(0, chain, 0, HEADER_BYTES, length);
    if (!connection.receive(chain, HEADER_BYTES, length, vectors.address(0), count)) return false;
    if (connection.buffered > 0) this.#connections.watch(connection, connection.watched | EPOLL.OUT);
    return true;
  }

  /** A connection from the guest. */
  #connect(packet: PacketHeader): void {
    const { kernel } = this.context;
    let fd = -1;
    try {
      if (this.#connections.makeRoom()) fd = kernel.connectUnix(`${this.options.socket}_${packet.targetPort}`);
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
    }
    const connection = fd < 0 ? undefined : this.#connections.open(fd);
    if (connection === undefined) {
      this.context.counters[VsockCounter.refused]++;
      this.#sender.resets.add(packet);
      return;
    }
    connection.guestPort = packet.sourcePort;
    connection.hostPort = packet.targetPort;
    connection.learnCredit(packet.bufferSize, packet.forwarded);
    connection.state = State.Open;
    connection.control = Control.response;
    this.#connections.table.add(connection);
    this.#connections.service.add(connection);
    this.context.counters[VsockCounter.opened]++;
  }

  /** The guest has accepted a connection from the host. */
  #answered(connection: Connection): boolean {
    connection.state = State.Open;
    connection.deadline = Infinity;
    if (!this.#greeter.accepted(connection)) return false;
    this.context.counters[VsockCounter.opened]++;
    this.#connections.watch(connection, EPOLL.IN);
    return true;
  }

  /** The guest is done, or did what it may not: it hears a RST (5.10.6.5), and what it sent before goes on its way. */
  #finish(connection: Connection): void {
    if (connection.buffered > 0) {
      this.#sender.resets.add(this.#incoming);
      this.#connections.leave(connection);
    } else this.#connections.reset(connection);
  }

  /** The loop has something of a connection's socket. What it says may be old: only reads and writes are believed. */
  #ready(connection: Connection, ready: number): void {
    if (connection.buffered > 0) {
      connection.flush();
      if (connection.buffered === 0) this.#connections.watch(connection, connection.watched & ~EPOLL.OUT);
    }
    switch (connection.state) {
      case State.Greeting:
        this.#greeter.greet(connection);
        break;
      case State.Requested:
        if (connection.probe()) this.#connections.reset(connection);
        break;
      case State.Open:
        this.#readyOpen(connection, ready);
        return;
      case State.Lingering:
        if (connection.buffered === 0) this.#connections.close(connection);
        break;
    }
    this.#toGuest();
  }

  #readyOpen(connection: Connection, ready: number): void {
    const silent = connection.ended || (connection.guestShutdown & Shutdown.receive) !== 0;
    if (silent) {
      connection.probe();
      this.#connections.expectReset(connection);
    } else if ((ready & ~EPOLL.OUT) !== 0) connection.readable = true;
    if (connection.control !== 0 || connection.readable) this.#connections.service.add(connection);
    this.#toGuest();
    // Bytes that wait for buffers or credit of the guest wait for its kicks and packets: the loop need not tell of them.
    if (silent || connection.readable) this.#connections.watch(connection, connection.watched & ~EPOLL.IN);
  }

  deactivate(): void {
    if (!this.#active) return;
    this.#active = false;
    this.#again.stop();
    this.#greeter.stop();
    this.#connections.stop();
    this.#sender.stop();
    this.#receive = undefined;
    this.#transmit = undefined;
    this.#event = undefined;
  }

  close(): void {
    this.deactivate();
    this.#connections.end();
    this.#sender.end();
    this.#greeter.end();
    this.#vectors.close();
  }
}
