/**
 * The virtio block device (virtio 1.3, 5.2) on an I/O worker: requests. What they move is block-transfers.ts's.
 *
 * Modelled: reads, writes, flush, discard, write zeroes, identity, several queues, write-back and write-through, resize.
 * Not modelled: zoned devices, secure erase, lifetime reports, SCSI commands.
 *
 * A queue that has requests stays on a list until it is empty; whatever ends a turn before that (requests under way, a limit,
 * the turn's own bound) goes on with it. So nothing waits for a kick that the driver has no reason to send.
 */
import type { DeviceContext, DeviceQueue, Driver, Timer, VirtioDevice } from '../virtio/device.js';
import { type Chain, Pop } from '../virtio/queue/queue.js';
import type { Limiter } from '../virtio/rate-limiter.js';
import {
  BlockCounter,
  BlockFeature,
  BlockLatency,
  MAX_RANGE_SECTORS,
  MAX_RANGES,
  SECTOR,
  WRITEBACK,
} from './block-description.js';
import { BlockTransfers, type TransferOptions } from './block-transfers.js';

const HEADER_BYTES = 16;
const IDENTITY_BYTES = 20;
const RANGE_BYTES = 16;
const UNMAP = 1;

const Request = { in: 0, out: 1, flush: 4, identity: 8, discard: 11, writeZeroes: 13 } as const;
const Result = { ok: 0, ioError: 1, unsupported: 2 } as const;

/** Requests taken in one turn, and from one queue before the next one's: others want the worker too. */
const TURN = 256;
const SHARE = 64;

export interface BlockOptions extends TransferOptions {
  readonly readonly: boolean;
  /** At most 20 bytes are shown. */
  readonly serial: string;
  readonly limiter?: Limiter | undefined;
}

/** A request under way. Made once, used over and over. */
interface Slot {
  queue: DeviceQueue | undefined;
  id: number;
  /** It changes the disk, so without a write cache it is done when it is on stable storage. */
  changes: boolean;
  status: number;
  statusAddress: number;
  /** Written into the driver's buffers. */
  bytes: number;
  /** Of the device's latencies, if it counts; -1. */
  latency: number;
}

export class BlockDevice implements VirtioDevice {
  readonly holdsChains = true;
  readonly #transfers: BlockTransfers;
  readonly #slots: Slot[];
  readonly #free: number[] = [];
  /** When each slot's request was taken, milliseconds of the loop's clock: doubles in an object would be allocated. */
  readonly #taken: Float64Array;
  /** Requests that have been taken and wait for others under way, in their order. None is taken while there are some. */
  readonly #waiting: number[] = [];
  /** Queues that may have requests; kicks are suppressed. */
  readonly #ready: DeviceQueue[] = [];
  readonly #unsignalled: DeviceQueue[] = [];
  readonly #header = new Uint8Array(HEADER_BYTES);
  readonly #headerWords = new Uint32Array(this.#header.buffer);
  readonly #ranges = new Uint8Array(MAX_RANGES * RANGE_BYTES);
  readonly #config: DataView;
  readonly #again: Timer;
  /** Until the limiter has tokens. */
  readonly #refill: Timer;
  #limited = false;
  #driver?: Driver;
  #canFlush = false;
  #selectable = false;
  #broken = false;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: BlockOptions,
  ) {
    const { kernel, loop, config } = context;
    const { engine } = options;
    this.#transfers = new BlockTransfers(kernel, loop, options, {
      finished: (slot) => this.#finished(slot),
      failed: (slot, reason) => this.#fail(this.#slots[slot], reason),
      again: () => this.#run(),
    });
    this.#slots = Array.from({ length: engine.depth }, (_, index) => {
      this.#free.push(engine.depth - 1 - index);
      return { queue: undefined, id: 0, changes: false, status: 0, statusAddress: 0, bytes: 0, latency: -1 };
    });
    this.#taken = new Float64Array(engine.depth);
    this.#config = new DataView(config.buffer, config.byteOffset, config.byteLength);
    this.#again = loop.timer(() => this.#run());
    this.#refill = loop.timer(() => {
      this.#limited = false;
      this.#run();
    });
    if (engine.eventFd >= 0) {
      loop.watch(engine.eventFd, 1, () => {
        this.#transfers.reap();
        this.#run();
      });
    }
  }

  activate(driver: Driver): void {
    this.#driver = driver;
    this.#broken = false;
    this.#canFlush = driver.has(BlockFeature.flush);
    this.#selectable = driver.has(BlockFeature.configWce);
  }

  /**
   * 5.2.6.2: without the FLUSH feature, or with writeback 0, a write is done when it is on stable storage. Read at each
   * request, as the driver may write it at any time and every worker of the device has to see it.
   */
  get #writeThrough(): boolean {
    return !this.#canFlush || (this.#selectable && this.#config.getUint8(WRITEBACK) === 0);
  }

  kick(queue: DeviceQueue): void {
    if (this.#broken) return;
    if (!this.#ready.includes(queue)) {
      queue.ring.suppressKicks();
      this.#ready.push(queue);
    }
    this.#run();
  }

  /** A turn: takes requests, starts them, gives back what is done. */
  #run(): void {
    if (this.#driver === undefined) return;
    let left = TURN;
    do {
      left = this.#advance(left);
    } while (this.#transfers.submit() && left > 0);
    this.#signal();
    if (!this.#limited) this.options.limiter?.rest?.();
    if (left === 0) this.#again.start(0);
  }

  /** Goes on with what waits, then takes requests. @param most of them @returns how many more may be taken */
  #advance(most: number): number {
    let left = most;
    while (this.#waiting.length > 0) {
      if (!this.#transfers.proceed(this.#waiting[0])) return left;
      this.#waiting.shift();
    }
    while (this.#ready.length > 0 && !this.#limited) {
      const queue = this.#ready[0];
      for (let share = SHARE; share > 0; share--) {
        if (left === 0 || this.#free.length === 0 || this.#waiting.length > 0) return left;
        if (!this.#take(queue)) break;
        left--;
      }
      // It is the others' turn, unless it has left the list.
      if (this.#ready[0] === queue) this.#ready.push(this.#ready.shift()!);
    }
    return left;
  }

  /** Takes a request of the first queue. @returns false when it has none, or it may not go now */
  #take(queue: DeviceQueue): boolean {
    const { ring } = queue;
    let taken = ring.pop();
    if (taken === Pop.Empty && ring.resumeKicks()) {
      ring.suppressKicks();
      taken = ring.pop();
      // A driver that took its request back: it has to kick for the next.
      if (taken === Pop.Empty) ring.resumeKicks();
    }
    if (taken === Pop.Empty) this.#ready.shift();
    if (taken === Pop.Broken) {
      this.#broken = true;
      this.#ready.length = 0;
      this.context.needsReset(ring.fault);
    }
    if (taken !== Pop.Taken) return false;
    const { limiter } = this.options;
    const bytes = Math.max(ring.chain.readableBytes + ring.chain.writableBytes - HEADER_BYTES - 1, 0);
    if (limiter !== undefined && !limiter.take(bytes)) {
      ring.unpop();
      this.context.counters[BlockCounter.limited]++;
      this.#limited = true;
      this.#refill.start(Math.max(limiter.delay(bytes), 1));
      return false;
    }
    this.#request(queue, ring.chain);
    return true;
  }

  #request(queue: DeviceQueue, chain: Chain): void {
    const last = chain.count - 1;
    // 5.2.6: a header to read and a status byte to write, however the driver cut them up.
    if (chain.writableBytes === 0 || !this.#readHeader(chain)) {
      this.context.counters[BlockCounter.errors]++;
      this.#giveBack(queue, chain.id, 0);
      return;
    }
    const index = this.#free.pop()!;
    const slot = this.#slots[index];
    slot.queue = queue;
    slot.id = chain.id;
    slot.changes = false;
    slot.status = Result.ok;
    slot.statusAddress = chain.address[last] + chain.length[last] - 1;
    slot.bytes = 0;
    slot.latency = -1;
    if (!this.#begin(index, slot, chain)) this.#answer(index);
    else if (!this.#transfers.proceed(index)) this.#waiting.push(index);
  }

  /** Reads the words that matter: most headers lie together. @returns false when there is no whole one */
  #readHeader(chain: Chain): boolean {
    if (chain.readable === 0 || chain.length[0] < HEADER_BYTES) {
      return chain.read(0, this.#header, 0, HEADER_BYTES) === HEADER_BYTES;
    }
    const { memory } = chain;
    const address = chain.address[0];
    this.#headerWords[0] = memory.u32(address);
    this.#headerWords[2] = memory.u32(address + 8);
    this.#headerWords[3] = memory.u32(address + 12);
    return true;
  }

  /** @returns false when it is done already: nothing is to be moved */
  #begin(index: number, slot: Slot, chain: Chain): boolean {
    const { counters } = this.context;
    const header = this.#headerWords;
    const type = header[0];
    const sector = header[2] + header[3] * 2 ** 32;
    switch (type) {
      case Request.in: {
        const bytes = chain.writableBytes - 1;
        if (!this.#inside(sector, bytes)) break;
        counters[BlockCounter.read_ops]++;
        counters[BlockCounter.read_bytes] += bytes;
        slot.bytes = bytes;
        slot.latency = BlockLatency.read_latency;
        this.#taken[index] = this.context.loop.now();
        this.#transfers.beginData(index, false, sector * SECTOR, bytes, chain, chain.readable, 0);
        return true;
      }
      case Request.out: {
        const bytes = chain.readableBytes - HEADER_BYTES;
        if (this.options.readonly || !this.#inside(sector, bytes)) break;
        counters[BlockCounter.write_ops]++;
        counters[BlockCounter.write_bytes] += bytes;
        slot.changes = true;
        slot.latency = BlockLatency.write_latency;
        this.#taken[index] = this.context.loop.now();
        this.#transfers.beginData(index, true, sector * SECTOR, bytes, chain, 0, HEADER_BYTES);
        return true;
      }
      case Request.flush:
        counters[BlockCounter.flushes]++;
        this.#transfers.beginSync(index);
        return true;
      case Request.identity: {
        const bytes = new Uint8Array(IDENTITY_BYTES);
        bytes.set(Buffer.from(this.options.serial).subarray(0, IDENTITY_BYTES));
        slot.bytes = Math.min(chain.writableBytes - 1, IDENTITY_BYTES);
        chain.write(0, bytes, 0, slot.bytes);
        return false;
      }
      case Request.discard:
      case Request.writeZeroes:
        slot.changes = true;
        slot.status = this.#readRanges(index, chain, type);
        if (slot.status === Result.ioError) break;
        return slot.status === Result.ok;
      default:
        slot.status = Result.unsupported;
        return false;
    }
    this.#fail(slot);
    return false;
  }

  /** The capacity is in the configuration, which all workers of the device share. */
  #inside(sector: number, bytes: number): boolean {
    return bytes > 0 && bytes % SECTOR === 0 && sector + bytes / SECTOR <= this.#capacity;
  }

  /** Sectors. */
  get #capacity(): number {
    return this.#config.getUint32(0, true) + this.#config.getUint32(4, true) * 2 ** 32;
  }

  /** 5.2.6: ranges of sector, count and flags, 16 bytes each. @returns the request's status, if it is not ok */
  #readRanges(index: number, chain: Chain, type: number): number {
    const bytes = chain.readableBytes - HEADER_BYTES;
    if (this.options.readonly || bytes === 0 || bytes % RANGE_BYTES !== 0 || bytes > this.#ranges.length) {
      return Result.ioError;
    }
    chain.read(HEADER_BYTES, this.#ranges, 0, bytes);
    const view = new DataView(this.#ranges.buffer);
    const zeroes = type === Request.writeZeroes;
    this.#transfers.beginRanges(index, zeroes);
    for (let at = 0; at < bytes; at += RANGE_BYTES) {
      const sector = view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
      const count = view.getUint32(at + 8, true);
      const flags = view.getUint32(at + 12, true);
      if ((flags & ~(zeroes ? UNMAP : 0)) !== 0) return Result.unsupported;
      if (count > MAX_RANGE_SECTORS || !this.#inside(sector, count * SECTOR)) return Result.ioError;
      this.#transfers.addRange(index, sector * SECTOR, count * SECTOR, (flags & UNMAP) !== 0);
    }
    return Result.ok;
  }

  #finished(index: number): void {
    const slot = this.#slots[index];
    if (!slot.changes || slot.status !== Result.ok || !this.#writeThrough) {
      this.#answer(index);
      return;
    }
    slot.changes = false;
    this.#transfers.beginSync(index);
    if (!this.#transfers.proceed(index)) this.#waiting.push(index);
  }

  #answer(index: number): void {
    const slot = this.#slots[index];
    const { queue, id, status, statusAddress, bytes, latency } = slot;
    this.#driver!.memory.setU8(statusAddress, status);
    if (latency >= 0 && status === Result.ok) {
      this.context.latencies[latency].add(this.context.loop.now() - this.#taken[index]);
    }
    slot.queue = undefined;
    this.#free.push(index);
    this.#giveBack(queue!, id, (status === Result.ok ? bytes : 0) + 1);
  }

  #fail(slot: Slot, reason?: string): void {
    slot.status = Result.ioError;
    this.context.counters[BlockCounter.errors]++;
    // Without a reason it is the driver's own mistake.
    if (reason !== undefined) this.context.log('warn', reason);
  }

  #giveBack(queue: DeviceQueue, id: number, written: number): void {
    queue.ring.push(id, written);
    if (!this.#unsignalled.includes(queue)) this.#unsignalled.push(queue);
  }

  #signal(): void {
    for (let queue = this.#unsignalled.pop(); queue !== undefined; queue = this.#unsignalled.pop()) queue.signal();
  }

  /** All that was taken goes back: the driver may only have stopped the device, and takes up where it was. */
  deactivate(): void {
    this.#again.stop();
    this.#refill.stop();
    this.#limited = false;
    this.options.limiter?.rest?.();
    this.#ready.length = 0;
    do {
      this.#transfers.drain();
      while (this.#waiting.length > 0 && this.#transfers.proceed(this.#waiting[0])) this.#waiting.shift();
    } while (this.#transfers.underWay > 0 || this.#waiting.length > 0);
    this.#unsignalled.length = 0;
    this.#driver = undefined;
  }

  sync(): void {
    if (!this.options.readonly) this.options.image.settle();
  }

  /** Each worker of the device is told of a new size; the first of them tells the driver. */
  control(message: unknown): void {
    const { size } = message as { size: number };
    try {
      // An image does not grow while clusters are on their way into new places.
      this.#transfers.drain();
      this.options.image.resize(size);
      const sectors = size / SECTOR;
      if (sectors !== this.#capacity) this.context.changeConfig(() => this.#setCapacity(sectors));
      this.context.emit({ kind: 'resized', size });
    } catch (error) {
      this.context.emit({ kind: 'resize-failed', reason: error instanceof Error ? error.message : String(error) });
    }
    this.#run();
  }

  #setCapacity(sectors: number): void {
    // Other workers may read between the halves: no less than what there is.
    this.#config.setUint32(4, Math.max(Math.floor(sectors / 2 ** 32), this.#config.getUint32(4, true)), true);
    this.#config.setUint32(0, sectors % 2 ** 32, true);
    this.#config.setUint32(4, Math.floor(sectors / 2 ** 32), true);
  }

  close(): void {
    const { engine, image, limiter } = this.options;
    limiter?.close?.();
    if (engine.eventFd >= 0) this.context.loop.unwatch(engine.eventFd);
    engine.close();
    image.close();
    this.#transfers.close();
  }
}
