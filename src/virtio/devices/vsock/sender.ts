/** The vsock device's receive queue: packets and bytes of host programs on their way to the guest. */
import type { DeviceContext, DeviceQueue } from '../../device.js';
import { EPOLL } from '../../../sys/host-kernel.js';
import { IovecArray } from '../../queue/iovec.js';
import { MAX_CHAIN, Pop } from '../../queue/queue.js';
import { BUFFER_BYTES, type Connection, Control, State } from './connection.js';
import type { Connections } from './connections.js';
import { VsockCounter } from './description.js';
import { HEADER_BYTES, HOST_CID, MAX_PACKET, Op, PacketHeader, PacketType, ResetList } from './packet.js';

/**
 * Answers to packets that have no connection, of a guest that sends many and offers no buffers for the answers. When so
 * many wait, its transmit queue does.
 */
export const MAX_RESETS = 256;
/** Chains taken from the queue before others of the worker get their turn. */
const BATCH = 256;
/** Bytes read from one socket before the next connection gets its turn, and at most with one system call. */
const BURST = 0x4_0000;
/** Chains with less room than this are worth filling several at a time. */
const SMALL_CHAIN = 0x4000;
const FIONREAD = 0x541b;
const EINTR = 4;
const EAGAIN = 11;

export class VsockSender {
  readonly resets = new ResetList(MAX_RESETS);
  readonly #cidLow: number;
  readonly #cidHigh: number;
  readonly #outgoing = new PacketHeader();
  readonly #vectors: IovecArray;
  readonly #available = new Uint32Array(1);
  readonly #availableBytes = new Uint8Array(this.#available.buffer);
  /** The chains of one read: what `push` wants, guest address of the header, bytes of data. */
  readonly #batchId = new Int32Array(BATCH);
  readonly #batchHeader = new Float64Array(BATCH);
  readonly #batchRoom = new Float64Array(BATCH);
  /** The queue had no chain; a kick tells when it has. */
  #starved = false;
  #broken = false;
  /** Chains that may still be taken in this turn. */
  #budget = 0;

  /**
   * @param cid the guest's
   * @param broken told why the queue is beyond repair
   */
  constructor(
    private readonly context: DeviceContext,
    private readonly connections: Connections,
    cid: number,
    private readonly broken: (fault: string) => void,
  ) {
    this.#cidLow = cid % 2 ** 32;
    this.#cidHigh = Math.floor(cid / 2 ** 32);
    this.#vectors = new IovecArray(context.kernel, MAX_CHAIN);
  }

  start(): void {
    this.#starved = false;
    this.#broken = false;
  }

  /** The driver has offered chains. */
  kick({ ring }: DeviceQueue): void {
    this.#starved = false;
    ring.suppressKicks();
  }

  /** Whether chains can be had. */
  get goesOn(): boolean {
    return !this.#starved && !this.#broken;
  }

  /** Sends what there is, as far as the guest has buffers. @returns whether there is more for another turn */
  send(queue: DeviceQueue): boolean {
    const { service } = this.connections;
    this.#budget = BATCH;
    while (this.goesOn && this.#budget > 0) {
      if (!this.resets.isEmpty) this.#sendReset(queue);
      else {
        const connection = service.first;
        if (connection === undefined) break;
        // To the end of the list, if it is to come back at all.
        service.remove(connection);
        this.#serve(queue, connection);
        if (connection.control !== 0 || (connection.readable && connection.credit > 0)) service.add(connection);
      }
    }
    queue.signal();
    return this.goesOn && this.#budget <= 0 && (!this.resets.isEmpty || !service.isEmpty);
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
        this.#broken = true;
        this.broken(ring.fault);
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
    this.resets.take(this.#outgoing, this.#cidLow, this.#cidHigh);
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
      this.connections.expectReset(connection);
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
    if (op === Op.reset) this.connections.close(connection);
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
    const vectors = this.#vectors;
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
    const vectors = this.#vectors;
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
    const vectors = this.#vectors;
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
      this.connections.watch(connection, connection.watched | EPOLL.IN);
      return;
    }
    connection.ended = true;
    connection.control |= Control.shutdown;
    connection.probe();
    this.connections.watch(connection, connection.watched & ~EPOLL.IN);
  }

  /** The device has lost its queues. */
  stop(): void {
    this.resets.clear();
  }

  end(): void {
    this.#vectors.close();
  }
}
