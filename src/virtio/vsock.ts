/**
 * The vsock device (virtio 1.3, 5.10): stream sockets between the guest and programs of the host.
 *
 * On the host's side they are Unix sockets, as Cloud Hypervisor and Firecracker have it. A program that connects to the
 * device's socket says `CONNECT <port>\n` and reads `OK <port>\n` once the guest has accepted; a guest that connects to
 * port P of the host reaches the program that listens at `<socket>_<P>`.
 *
 * Modelled: streams, credit both ways, half-closed connections. Not modelled: seqpacket and datagram sockets, and the
 * transport reset event, so nothing is ever sent on the event queue.
 *
 * Data goes between sockets and the guest's memory without a copy, save what a host program is slow to take. Nothing is
 * kept for a guest that is slow: its bytes stay in the socket.
 */
import { EPOLL, SystemError } from '../sys/host-kernel.js';
import { IovecArray } from './iovec.js';
import {
  type DeviceContext,
  type DeviceQueue,
  type Driver,
  type Timer,
  type VirtioDescription,
  type VirtioDevice,
  VirtioType,
} from './device.js';
import { type Chain, MAX_CHAIN, Pop } from './queue.js';
import {
  BUFFER_BYTES,
  BufferPool,
  Connection,
  ConnectionTable,
  Control,
  ServiceList,
  State,
} from './vsock-connection.js';
import {
  HEADER_BYTES,
  HOST_CID,
  MAX_PACKET,
  Op,
  PacketHeader,
  PacketType,
  ResetList,
  Shutdown,
} from './vsock-packet.js';

const RECEIVE = 0;
const TRANSMIT = 1;

/** Each holds a descriptor and up to BUFFER_BYTES: neither guest nor host programs may open them without end. */
export const MAX_CONNECTIONS = 1024;
/**
 * Answers to packets that have no connection, of a guest that sends many and offers no buffers for the answers. When so
 * many wait, its transmit queue does.
 */
export const MAX_RESETS = 256;
/** Chains taken from a queue before others of the worker get their turn. */
const BATCH = 256;
/** Bytes read from one socket before the next connection gets its turn, and at most with one system call. */
const BURST = 0x4_0000;
/** Chains with less room than this are worth filling several at a time. */
const SMALL_CHAIN = 0x4000;
/** Connections accepted in one go. */
const ACCEPTS = 64;
/** `CONNECT 4294967295\n` and a little more. */
const LINE_LIMIT = 32;
/** The shortest greeting, `CONNECT 1\n`: what comes behind its end is data, so the rest is read byte by byte. */
const LINE_LEAST = 10;
/** Host ports of connections from the host: from here up. */
const FIRST_PORT = 0x4000_0000;
/** Milliseconds: for the guest to answer a request, to answer a shutdown; for host programs to take what the guest left. */
const REQUEST_TIMEOUT = 5000;
const SHUTDOWN_TIMEOUT = 10_000;
const LINGER_TIMEOUT = 30_000;
const SWEEP_INTERVAL = 1000;
const FIONREAD = 0x541b;
const EINTR = 4;
const EAGAIN = 11;
const ECONNABORTED = 103;

export const VsockCounter = {
  /** Connections that were made. */
  opened: 0,
  /** Packets of data, from and to the guest. */
  fromGuest: 1,
  toGuest: 2,
  /** RST packets sent. */
  resets: 3,
  /** Chains that hold no packet, or have no room for one. */
  malformed: 4,
  /** Connections that were not made. */
  refused: 5,
  /** Times that the transmit queue had to wait. */
  paused: 6,
  /** Chains given back empty because a socket had less than it had said. */
  unused: 7,
} as const;

export function vsockDescription(cid: number): VirtioDescription {
  const config = new Uint8Array(8);
  new DataView(config.buffer).setBigUint64(0, BigInt(cid), true);
  return {
    type: VirtioType.Vsock,
    classCode: 0x078000,
    features: [],
    queueSizes: [256, 256, 256],
    config,
    writable: [],
    counters: Object.keys(VsockCounter),
  };
}

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
  readonly #pool: BufferPool;
  readonly #incoming = new PacketHeader();
  readonly #outgoing = new PacketHeader();
  readonly #transmitVectors: IovecArray;
  readonly #receiveVectors: IovecArray;
  readonly #scratch;
  readonly #scratchAddress: number;
  readonly #scratchBytes: Uint8Array;
  readonly #available = new Uint32Array(1);
  readonly #availableBytes = new Uint8Array(this.#available.buffer);
  /** The receive chains of one read: what `push` wants, guest address of the header, bytes of data. */
  readonly #batchId = new Int32Array(BATCH);
  readonly #batchHeader = new Float64Array(BATCH);
  readonly #batchRoom = new Float64Array(BATCH);

  #receive: DeviceQueue | undefined;
  #transmit: DeviceQueue | undefined;
  #active = false;
  #broken = false;
  /** The receive queue had no chain; a kick tells when it has. */
  #starved = false;
  /** The transmit queue waits for room in `#resets`. */
  #paused = false;
  /** The listener may have more connections. */
  #accepting = false;
  /** Receive chains that may still be taken in this turn. */
  #budget = 0;
  #nextPort = 0;
  readonly #connections = new Set<Connection>();
  readonly #table = new ConnectionTable();
  /** Those with something for the guest. */
  readonly #service = new ServiceList();
  readonly #resets = new ResetList(MAX_RESETS);
  /** Goes on with what a turn had to leave. */
  readonly #again: Timer;
  /** Looks for deadlines. */
  readonly #sweep: Timer;
  #sweeping = false;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: VsockOptions,
  ) {
    const { kernel, loop } = context;
    this.#cidLow = options.cid % 2 ** 32;
    this.#cidHigh = Math.floor(options.cid / 2 ** 32);
    this.#pool = new BufferPool(kernel);
    this.#transmitVectors = new IovecArray(kernel, MAX_CHAIN);
    this.#receiveVectors = new IovecArray(kernel, MAX_CHAIN);
    this.#scratch = kernel.map({ length: 4096, shared: false });
    this.#scratchAddress = Number(this.#scratch.handle.address);
    this.#scratchBytes = new Uint8Array(this.#scratch.view(0, 4096));
    this.#again = loop.timer(() => this.#goOn());
    this.#sweep = loop.timer(() => this.#checkDeadlines());
  }

  activate({ queues }: Driver): void {
    this.#receive = queues[RECEIVE];
    this.#transmit = queues[TRANSMIT];
    queues[2]?.ring.suppressKicks();
    this.#active = true;
    this.#broken = false;
    this.#starved = false;
    this.#paused = false;
    // Edge-triggered: a listener that cannot be served, for want of descriptors, does not keep the worker busy.
    this.context.loop.watch(this.options.listener, EPOLL.IN | EPOLL.EDGE, () => this.#accept());
  }

  kick(queue: DeviceQueue): void {
    if (this.#broken) return;
    if (queue === this.#transmit) this.#fromGuest(queue);
    else if (queue === this.#receive) {
      this.#starved = false;
      queue.ring.suppressKicks();
    }
    this.#toGuest();
  }

  #goOn(): void {
    if (this.#accepting) this.#accept();
    if (this.#transmit !== undefined && !this.#broken) this.#fromGuest(this.#transmit);
    this.#toGuest();
  }

  #break(fault: string): void {
    if (this.#broken) return;
    this.#broken = true;
    this.context.needsReset(fault);
  }

  // From the guest

  #fromGuest(queue: DeviceQueue): void {
    const { ring } = queue;
    ring.suppressKicks();
    let left = BATCH;
    for (; left > 0; left--) {
      if (this.#resets.isFull) {
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
    const connection = toHost ? this.#table.find(packet.sourcePort, packet.targetPort) : undefined;
    if (connection === undefined) {
      if (packet.op === Op.reset) return;
      if (toHost && packet.op === Op.request) this.#connect(packet);
      else this.#resets.add(packet);
      return;
    }
    // The guest has not heard yet that it is gone.
    if (connection.state === State.Reset && packet.op !== Op.reset) return;
    if (packet.length > MAX_PACKET || packet.length > chain.readableBytes - HEADER_BYTES) {
      this.context.counters[VsockCounter.malformed]++;
      this.#reset(connection);
      return;
    }
    connection.learnCredit(packet.bufferSize, packet.forwarded);
    if (!this.#perform(connection, packet, chain)) this.#reset(connection);
    else if (connection.state === State.Open && (connection.control !== 0 || connection.readable))
      this.#service.add(connection);
  }

  /** @returns false when the packet has no place in the connection */
  #perform(connection: Connection, packet: PacketHeader, chain: Chain): boolean {
    if (packet.op === Op.reset) {
      if (connection.state === State.Requested) this.context.counters[VsockCounter.refused]++;
      this.#leave(connection);
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
    const vectors = this.#transmitVectors;
    const count = vectors.describe(0, chain, 0, HEADER_BYTES, length);
    if (!connection.receive(chain, HEADER_BYTES, length, vectors.address(0), count)) return false;
    if (connection.buffered > 0) this.#watch(connection, connection.watched | EPOLL.OUT);
    return true;
  }

  /** A connection from the guest. */
  #connect(packet: PacketHeader): void {
    const { kernel } = this.context;
    let fd = -1;
    try {
      if (this.#connections.size < MAX_CONNECTIONS)
        fd = kernel.connectUnix(`${this.options.socket}_${packet.targetPort}`);
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
    }
    const connection = fd < 0 ? undefined : this.#open(fd);
    if (connection === undefined) {
      this.context.counters[VsockCounter.refused]++;
      this.#resets.add(packet);
      return;
    }
    connection.guestPort = packet.sourcePort;
    connection.hostPort = packet.targetPort;
    connection.learnCredit(packet.bufferSize, packet.forwarded);
    connection.state = State.Open;
    connection.control = Control.response;
    this.#table.add(connection);
    this.#service.add(connection);
    this.context.counters[VsockCounter.opened]++;
  }

  /** The guest has accepted a connection from the host. */
  #answered(connection: Connection): boolean {
    connection.state = State.Open;
    connection.deadline = Infinity;
    const line = Buffer.from(`OK ${connection.hostPort}\n`);
    this.#scratchBytes.set(line);
    const { kernel } = this.context;
    // An empty socket takes it whole, or its other end is gone.
    if (kernel.writeRaw(connection.fd, this.#scratchAddress, line.length) !== line.length) return false;
    this.context.counters[VsockCounter.opened]++;
    this.#watch(connection, EPOLL.IN);
    return true;
  }

  /** The guest is done: 5.10.6.5 wants a RST once nothing of the connection is left. */
  #finish(connection: Connection): void {
    if (connection.buffered > 0) {
      this.#resets.add(this.#incoming);
      this.#leave(connection);
    } else this.#reset(connection);
  }

  // Connections

  /** @returns undefined when it cannot be watched, and is closed again */
  #open(fd: number): Connection | undefined {
    const connection = new Connection(this.context.kernel, this.#pool, fd);
    try {
      this.context.loop.watch(fd, EPOLL.IN, (ready) => this.#ready(connection, ready));
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      this.context.kernel.close(fd);
      return undefined;
    }
    connection.watched = EPOLL.IN;
    this.#connections.add(connection);
    return connection;
  }

  /** @param events none: only the socket's end is told, once */
  #watch(connection: Connection, events: number): void {
    const wanted = (events & (EPOLL.IN | EPOLL.OUT)) === 0 ? EPOLL.EDGE : events & (EPOLL.IN | EPOLL.OUT);
    if (connection.watched === wanted) return;
    connection.watched = wanted;
    this.context.loop.rewatch(connection.fd, wanted);
  }

  #closeSocket(connection: Connection): void {
    if (connection.watched === 0) return;
    connection.watched = 0;
    connection.releaseBuffer();
    this.context.loop.unwatch(connection.fd);
    this.context.kernel.close(connection.fd);
  }

  /** Forgets a connection. */
  #close(connection: Connection): void {
    this.#closeSocket(connection);
    connection.state = State.Closed;
    connection.control = 0;
    connection.readable = false;
    this.#table.remove(connection);
    this.#service.remove(connection);
    this.#connections.delete(connection);
    if (this.#accepting) this.#startSweep();
  }

  /** The guest is to hear that a connection is no more. */
  #reset(connection: Connection): void {
    // It has never heard of it.
    if (connection.state === State.Greeting || (connection.control & Control.request) !== 0) {
      this.#close(connection);
      return;
    }
    this.#closeSocket(connection);
    connection.state = State.Reset;
    connection.control = Control.reset;
    connection.readable = false;
    this.#service.add(connection);
  }

  /** The guest has forgotten a connection. What it sent before still goes to the host program. */
  #leave(connection: Connection): void {
    if (connection.state !== State.Open || connection.buffered === 0) {
      this.#close(connection);
      return;
    }
    this.#table.remove(connection);
    this.#service.remove(connection);
    connection.state = State.Lingering;
    connection.control = 0;
    connection.readable = false;
    connection.shutdown(Shutdown.both);
    this.#watch(connection, EPOLL.OUT);
    this.#expire(connection, LINGER_TIMEOUT);
  }

  /** The loop has something of a connection's socket. What it says may be old: only reads and writes are believed. */
  #ready(connection: Connection, ready: number): void {
    if (connection.buffered > 0) {
      connection.flush();
      if (connection.buffered === 0) this.#watch(connection, connection.watched & ~EPOLL.OUT);
    }
    switch (connection.state) {
      case State.Greeting:
        this.#greet(connection);
        break;
      case State.Requested:
        if (connection.probe()) this.#reset(connection);
        break;
      case State.Open:
        this.#readyOpen(connection, ready);
        return;
      case State.Lingering:
        if (connection.buffered === 0) this.#close(connection);
        break;
    }
    this.#toGuest();
  }

  #readyOpen(connection: Connection, ready: number): void {
    const silent = connection.ended || (connection.guestShutdown & Shutdown.receive) !== 0;
    if (silent) {
      connection.probe();
      this.#expectReset(connection);
    } else if ((ready & ~EPOLL.OUT) !== 0) connection.readable = true;
    if (connection.control !== 0 || connection.readable) this.#service.add(connection);
    this.#toGuest();
    // Bytes that wait for buffers or credit of the guest wait for its kicks and packets: the loop need not tell of them.
    if (silent || connection.readable) this.#watch(connection, connection.watched & ~EPOLL.IN);
  }

  // From the host

  #accept(): void {
    const { kernel } = this.context;
    this.#accepting = true;
    for (let count = 0; count < ACCEPTS; count++) {
      const fd = kernel.acceptUnix(this.options.listener);
      if (fd === -EAGAIN) {
        this.#accepting = false;
        return;
      }
      if (fd === -EINTR || fd === -ECONNABORTED) continue;
      if (fd < 0) {
        this.#startSweep();
        return;
      }
      if (this.#connections.size < MAX_CONNECTIONS) this.#open(fd);
      else {
        kernel.close(fd);
        this.context.counters[VsockCounter.refused]++;
      }
    }
    this.#again.start(0);
  }

  /** Reads the line with which a host program says where it wants to go. */
  #greet(connection: Connection): void {
    const { kernel } = this.context;
    while (!connection.line.endsWith('\n')) {
      const wanted = Math.max(LINE_LEAST - connection.line.length, 1);
      const count = kernel.readRaw(connection.fd, this.#scratchAddress, wanted);
      if (count === -EINTR) continue;
      if (count === -EAGAIN) return;
      if (count <= 0 || connection.line.length + count > LINE_LIMIT) {
        this.#close(connection);
        return;
      }
      connection.line += Buffer.from(this.#scratchBytes.subarray(0, count)).toString('latin1');
    }
    const port = Number(/^connect ([0-9]{1,10})\n$/i.exec(connection.line)?.[1]);
    if (!(port < 2 ** 32)) {
      this.context.counters[VsockCounter.refused]++;
      this.#close(connection);
      return;
    }
    connection.guestPort = port;
    do {
      connection.hostPort = FIRST_PORT + this.#nextPort;
      this.#nextPort = (this.#nextPort + 1) % FIRST_PORT;
    } while (this.#table.find(port, connection.hostPort) !== undefined);
    connection.state = State.Requested;
    connection.control = Control.request;
    this.#table.add(connection);
    this.#service.add(connection);
    this.#watch(connection, 0);
    this.#expire(connection, REQUEST_TIMEOUT);
  }

  // To the guest

  /** Sends what there is, as far as the guest has buffers. */
  #toGuest(): void {
    const queue = this.#receive;
    if (queue === undefined) return;
    this.#budget = BATCH;
    while (!this.#starved && !this.#broken && this.#budget > 0) {
      if (!this.#resets.isEmpty) this.#sendReset(queue);
      else {
        const connection = this.#service.first;
        if (connection === undefined) break;
        // To the end of the list, if it is to come back at all.
        this.#service.remove(connection);
        this.#serve(queue, connection);
        if (connection.control !== 0 || (connection.readable && connection.credit > 0)) this.#service.add(connection);
      }
    }
    queue.signal();
    if (this.#broken || this.#starved) return;
    if (this.#paused && !this.#resets.isFull) {
      this.#paused = false;
      this.#again.start(0);
    } else if (this.#budget <= 0 && (!this.#resets.isEmpty || !this.#service.isEmpty)) this.#again.start(0);
  }

  /** Takes a chain that a packet fits into. @returns false when there is none now */
  #take(queue: DeviceQueue): boolean {
    const { ring } = queue;
    while (this.#budget-- > 0) {
      const pop = ring.pop();
      if (pop === Pop.Taken) {
        const { chain } = ring;
        if (chain.readable === 0 && chain.writableBytes >= HEADER_BYTES) return true;
        this.context.counters[VsockCounter.malformed]++;
        ring.push(chain.id, 0);
      } else if (pop === Pop.Broken) {
        this.#break(ring.fault);
        return false;
      } else if (ring.resumeKicks()) ring.suppressKicks();
      else {
        this.#starved = true;
        return false;
      }
    }
    return false;
  }

  #sendReset(queue: DeviceQueue): void {
    const { ring } = queue;
    if (!this.#take(queue)) return;
    this.#resets.take(this.#outgoing, this.#cidLow, this.#cidHigh);
    ring.chain.write(0, this.#outgoing.bytes, 0, HEADER_BYTES);
    ring.push(ring.chain.id, HEADER_BYTES);
    this.context.counters[VsockCounter.resets]++;
  }

  #serve(queue: DeviceQueue, connection: Connection): void {
    const { ring } = queue;
    // A shutdown goes last: it may speak of an end that is found here.
    while ((connection.control & ~Control.shutdown) !== 0) {
      if (!this.#take(queue)) return;
      this.#sendControl(queue, connection);
      if (connection.state === State.Closed) return;
    }
    if (connection.state === State.Open && connection.readable) this.#sendData(queue, connection);
    if (connection.control === Control.shutdown) {
      if (!this.#take(queue)) return;
      connection.control = 0;
      this.#fill(connection, Op.shutdown, connection.ownShutdown, 0);
      ring.chain.write(0, this.#outgoing.bytes, 0, HEADER_BYTES);
      ring.push(ring.chain.id, HEADER_BYTES);
      this.#expectReset(connection);
    }
  }

  /** Sends one control packet with the chain that was taken. */
  #sendControl({ ring }: DeviceQueue, connection: Connection): void {
    const { control } = connection;
    let op: number = Op.creditRequest;
    let bit: number = Control.creditRequest;
    if ((control & Control.reset) !== 0) {
      op = Op.reset;
      bit = control;
      this.context.counters[VsockCounter.resets]++;
    } else if ((control & Control.request) !== 0) {
      op = Op.request;
      bit = Control.request;
    } else if ((control & Control.response) !== 0) {
      op = Op.response;
      bit = Control.response;
    } else if ((control & Control.creditUpdate) !== 0) {
      op = Op.creditUpdate;
      bit = Control.creditUpdate;
    }
    connection.control &= ~bit;
    this.#fill(connection, op, 0, 0);
    ring.chain.write(0, this.#outgoing.bytes, 0, HEADER_BYTES);
    ring.push(ring.chain.id, HEADER_BYTES);
    if (op === Op.reset) this.#close(connection);
  }

  #fill(connection: Connection, op: number, flags: number, length: number): void {
    const header = this.#outgoing;
    header.setSource(HOST_CID, 0, connection.hostPort);
    header.setTarget(this.#cidLow, this.#cidHigh, connection.guestPort);
    header.setBody(PacketType.stream, op, flags, length);
    header.setCredit(BUFFER_BYTES, connection.tellForwarded());
  }

  /** Reads a socket into the guest's buffers until one of them ends, or it is another's turn. */
  #sendData(queue: DeviceQueue, connection: Connection): void {
    let left = BURST;
    while (left > 0 && connection.readable) {
      if (connection.credit === 0) {
        connection.askCredit();
        return;
      }
      if (!this.#take(queue)) return;
      const { chain } = queue.ring;
      const room = chain.writableBytes - HEADER_BYTES;
      if (room === 0) {
        this.context.counters[VsockCounter.malformed]++;
        queue.ring.push(chain.id, 0);
        continue;
      }
      if (connection.bulk && room < SMALL_CHAIN) {
        queue.ring.unpop();
        left -= this.#readMany(queue, connection);
      } else left -= this.#readOne(queue, connection, Math.min(room, MAX_PACKET, connection.credit));
    }
  }

  /** Fills the chain that was taken. @returns bytes */
  #readOne({ ring }: DeviceQueue, connection: Connection, wanted: number): number {
    const { chain } = ring;
    const vectors = this.#receiveVectors;
    const count = vectors.describe(0, chain, 0, HEADER_BYTES, wanted);
    const result = this.#readSocket(connection.fd, vectors.address(0), count);
    if (result <= 0) {
      ring.unpop();
      this.#emptied(connection, result);
      return 0;
    }
    this.#fill(connection, Op.data, 0, result);
    chain.write(0, this.#outgoing.bytes, 0, HEADER_BYTES);
    ring.push(chain.id, HEADER_BYTES + result);
    connection.sent(result);
    this.context.counters[VsockCounter.toGuest]++;
    connection.bulk = result === wanted;
    // Fewer bytes than asked for: the loop will tell of more.
    if (result < wanted) this.#emptied(connection, -EAGAIN);
    return result;
  }

  /** Fills as many chains as the socket has bytes for, with one read. @returns bytes */
  #readMany(queue: DeviceQueue, connection: Connection): number {
    const { ring } = queue;
    connection.bulk = false;
    if (this.context.kernel.ioctlBufferRaw(connection.fd, FIONREAD, this.#availableBytes) < 0) return 0;
    const wanted = Math.min(this.#available[0], connection.credit, BURST);
    const vectors = this.#receiveVectors;
    let [chains, elements, bytes] = [0, 0, 0];
    while (bytes < wanted && chains < BATCH && this.#take(queue)) {
      const { chain } = ring;
      const room = Math.min(chain.writableBytes - HEADER_BYTES, MAX_PACKET, wanted - bytes);
      // One whose header is in pieces is for `#readOne`.
      if (chain.length[0] < HEADER_BYTES || room === 0 || elements + chain.count > MAX_CHAIN) {
        ring.unpop();
        break;
      }
      this.#batchId[chains] = chain.id;
      this.#batchHeader[chains] = chain.address[0];
      this.#batchRoom[chains++] = room;
      elements += vectors.describe(elements, chain, 0, HEADER_BYTES, room);
      bytes += room;
    }
    if (chains === 0) return 0;
    const done = this.#readWhole(connection.fd, elements, bytes);
    connection.bulk = done === bytes;
    let left = done;
    for (let index = 0; index < chains; index++) {
      const length = Math.min(left, this.#batchRoom[index]);
      if (length > 0) {
        this.#fill(connection, Op.data, 0, length);
        ring.chain.memory.copyIn(this.#batchHeader[index], this.#outgoing.bytes, 0, HEADER_BYTES);
        this.context.counters[VsockCounter.toGuest]++;
      } else this.context.counters[VsockCounter.unused]++;
      ring.push(this.#batchId[index], length > 0 ? HEADER_BYTES + length : 0);
      left -= length;
    }
    connection.sent(done);
    return done;
  }

  /** Reads what the socket said it has. @returns bytes: all of them, but for a socket that counts wrongly or fails */
  #readWhole(fd: number, elements: number, bytes: number): number {
    const vectors = this.#receiveVectors;
    let [first, done] = [0, 0];
    for (;;) {
      let result = this.#readSocket(fd, vectors.address(first), elements - first);
      if (result <= 0) return done;
      done += result;
      if (done === bytes) return done;
      // A read ends early where a program has sent descriptors along.
      for (; result >= vectors.length(first); first++) result -= vectors.length(first);
      vectors.set(first, vectors.host(first) + result, vectors.length(first) - result);
    }
  }

  #readSocket(fd: number, iovecs: number, count: number): number {
    for (;;) {
      const result = this.context.kernel.readvRaw(fd, iovecs, count);
      if (result !== -EINTR) return result;
    }
  }

  /** A read brought nothing. @param result 0 at the end, or the negated errno */
  #emptied(connection: Connection, result: number): void {
    connection.readable = false;
    connection.bulk = false;
    if (result === -EAGAIN) {
      this.#watch(connection, connection.watched | EPOLL.IN);
      return;
    }
    connection.ended = true;
    connection.control |= Control.shutdown;
    connection.probe();
    this.#watch(connection, connection.watched & ~EPOLL.IN);
  }

  // Deadlines

  /** 5.10.6.5: a guest that was told of the end of both directions resets the connection, or we do. */
  #expectReset(connection: Connection): void {
    if (connection.ownShutdown === Shutdown.both && connection.deadline === Infinity)
      this.#expire(connection, SHUTDOWN_TIMEOUT);
  }

  #expire(connection: Connection, milliseconds: number): void {
    connection.deadline = this.context.loop.now() + milliseconds;
    this.#startSweep();
  }

  #startSweep(): void {
    if (this.#sweeping || !this.#active) return;
    this.#sweeping = true;
    this.#sweep.start(SWEEP_INTERVAL);
  }

  #checkDeadlines(): void {
    this.#sweeping = false;
    if (this.#accepting) this.#accept();
    const now = this.context.loop.now();
    for (const connection of this.#connections) {
      if (connection.deadline === Infinity) continue;
      if (connection.deadline > now) this.#startSweep();
      else if (connection.state === State.Lingering) this.#close(connection);
      else if (connection.state !== State.Reset) this.#reset(connection);
    }
    this.#toGuest();
  }

  deactivate(): void {
    if (!this.#active) return;
    this.#active = false;
    this.#again.stop();
    this.#sweep.stop();
    this.#sweeping = false;
    this.#accepting = false;
    this.context.loop.unwatch(this.options.listener);
    for (const connection of this.#connections) this.#close(connection);
    this.#resets.clear();
    this.#receive = undefined;
    this.#transmit = undefined;
  }

  close(): void {
    this.deactivate();
    this.#pool.close();
    this.#transmitVectors.close();
    this.#receiveVectors.close();
    this.#scratch.unmap();
  }
}
