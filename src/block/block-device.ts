/**
 * The virtio block device (virtio 1.3, 5.2) on an I/O worker.
 *
 * Modelled: reads, writes, flush, discard, write zeroes, identity, several queues, write-back and write-through, resize.
 * Not modelled: zoned devices, secure erase, lifetime reports, SCSI commands.
 */
import type { DeviceContext, DeviceQueue, Driver, Timer, VirtioDescription, VirtioDevice } from '../virtio/device.js';
import { VirtioType } from '../virtio/device.js';
import { errnoText } from '../sys/host-kernel.js';
import { IovecArray } from '../virtio/iovec.js';
import { type Chain, MAX_CHAIN, Pop } from '../virtio/queue.js';
import type { RateLimiter } from '../virtio/rate-limiter.js';
import { type DiskImage, ExtentKind } from './disk-image.js';
import type { IoEngine } from './io-engine.js';

const SECTOR = 512;
const HEADER_BYTES = 16;
const IDENTITY_BYTES = 20;
const RANGE_BYTES = 16;
/** Ranges in one discard or write-zeroes request; also told to the driver. */
const MAX_RANGES = 32;
/** 256 MiB, so that one request does not keep the worker for long. */
const MAX_RANGE_SECTORS = 0x8_0000;

const Feature = {
  segMax: 2,
  readOnly: 5,
  blockSize: 6,
  flush: 9,
  topology: 10,
  configWce: 11,
  multiQueue: 12,
  discard: 13,
  writeZeroes: 14,
} as const;
const Request = { in: 0, out: 1, flush: 4, identity: 8, discard: 11, writeZeroes: 13 } as const;
const Result = { ok: 0, ioError: 1, unsupported: 2 } as const;
const UNMAP = 1;
/** Offset of writeback in the configuration space. */
const WRITEBACK = 32;

/** Words of `DeviceContext.counters`. */
const Counter = {
  read_ops: 0,
  write_ops: 1,
  read_bytes: 2,
  write_bytes: 3,
  flushes: 4,
  errors: 5,
  limited: 6,
} as const;

export interface BlockOptions {
  readonly readonly: boolean;
  /** At most 20 bytes are shown. */
  readonly serial: string;
  readonly image: DiskImage;
  readonly engine: IoEngine;
  /** The file's bytes are the guest's: its end is an error, and syncing it is all that a flush has to do. */
  readonly raw: boolean;
  readonly limiter?: RateLimiter;
}

/** @param size bytes @param blockSize physical block of the host's file, bytes, a power of two from 512 on */
export function blockDescription(
  size: number,
  queues: number,
  queueSize: number,
  readonly: boolean,
  blockSize: number,
): VirtioDescription {
  const config = new Uint8Array(60);
  const view = new DataView(config.buffer);
  view.setBigUint64(0, BigInt(size / SECTOR), true);
  view.setUint32(12, Math.max(queueSize - 2, 1), true);
  view.setUint32(20, SECTOR, true);
  config[24] = Math.log2(blockSize / SECTOR);
  view.setUint16(26, blockSize / SECTOR, true);
  config[WRITEBACK] = 1;
  view.setUint16(34, queues, true);
  view.setUint32(36, MAX_RANGE_SECTORS, true);
  view.setUint32(40, MAX_RANGES, true);
  view.setUint32(44, blockSize / SECTOR, true);
  view.setUint32(48, MAX_RANGE_SECTORS, true);
  view.setUint32(52, MAX_RANGES, true);
  config[56] = 1;
  const { segMax, blockSize: blockSizeFeature, flush, topology, configWce, multiQueue } = Feature;
  const common = [segMax, blockSizeFeature, flush, topology, configWce, multiQueue];
  return {
    type: VirtioType.Block,
    classCode: 0x018000,
    features: [...common, ...(readonly ? [Feature.readOnly] : [Feature.discard, Feature.writeZeroes])],
    queueSizes: Array.from({ length: queues }, () => queueSize),
    config,
    writable: [[WRITEBACK, WRITEBACK + 1]],
    counters: Object.keys(Counter),
  };
}

/** A request under way. Made once, used over and over. */
interface Slot {
  queue: DeviceQueue | undefined;
  id: number;
  write: boolean;
  /** Transfers that are not done. */
  pending: number;
  status: number;
  statusAddress: number;
  bytes: number;
}

/** A transfer under way: a stretch of a request that lies in one piece on the host. */
interface Transfer {
  slot: number;
  fd: number;
  iovec: number;
  count: number;
  offset: number;
  length: number;
  syncing: boolean;
}

/** Elements for each request: its buffers, and one more for each piece that its image breaks it into. */
const SLOT_IOVECS = 2 * MAX_CHAIN;

export class BlockDevice implements VirtioDevice {
  readonly #slots: Slot[];
  readonly #freeSlots: number[] = [];
  readonly #transfers: Transfer[];
  readonly #freeTransfers: number[] = [];
  readonly #iovecs: IovecArray;
  /** For what is finished synchronously. */
  readonly #scratch: IovecArray;
  readonly #header = new Uint8Array(HEADER_BYTES);
  readonly #headerView = new DataView(this.#header.buffer);
  readonly #one = new Uint8Array(1);
  readonly #retry: Timer;
  readonly #complete = (token: number, result: number) => this.#transferred(token, result);
  #driver?: Driver;
  #writeThrough = false;
  /** Queues whose next request waits: for a slot, or for its tokens. */
  readonly #waiting = new Set<DeviceQueue>();
  readonly #unsignalled: DeviceQueue[] = [];
  #broken = false;
  /** /dev/zero */
  readonly #zeros: number;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: BlockOptions,
  ) {
    const { depth, eventFd } = options.engine;
    this.#slots = Array.from({ length: depth }, (_, index) => {
      this.#freeSlots.push(depth - 1 - index);
      return { queue: undefined, id: 0, write: false, pending: 0, status: 0, statusAddress: 0, bytes: 0 };
    });
    this.#transfers = Array.from({ length: depth }, (_, index) => {
      this.#freeTransfers.push(depth - 1 - index);
      return { slot: 0, fd: 0, iovec: 0, count: 0, offset: 0, length: 0, syncing: false };
    });
    this.#iovecs = new IovecArray(context.kernel, depth * SLOT_IOVECS);
    this.#scratch = new IovecArray(context.kernel, SLOT_IOVECS);
    this.#zeros = context.kernel.open('/dev/zero', { readonly: true });
    this.#retry = context.loop.timer(() => this.#resume());
    if (eventFd >= 0) context.loop.watch(eventFd, 1, () => this.#completed());
  }

  activate(driver: Driver): void {
    this.#driver = driver;
    this.#broken = false;
    this.configWritten();
  }

  /** 5.2.6.2: without the FLUSH feature, or with writeback 0, a write is done when it is on stable storage. */
  configWritten(): void {
    const driver = this.#driver;
    if (driver === undefined) return;
    const selectable = driver.has(Feature.configWce);
    this.#writeThrough = !driver.has(Feature.flush) || (selectable && this.context.config[WRITEBACK] === 0);
  }

  kick(queue: DeviceQueue): void {
    const { ring } = queue;
    if (this.#broken) return;
    ring.suppressKicks();
    do {
      const more = this.#take(queue);
      this.#start();
      this.#flushSignals();
      if (!more) return;
    } while (ring.resumeKicks());
  }

  /** Takes what it can. @returns false when the queue waits for something other than a kick */
  #take(queue: DeviceQueue): boolean {
    const { ring } = queue;
    for (;;) {
      if (this.#freeSlots.length === 0 || this.#freeTransfers.length === 0) {
        this.#waiting.add(queue);
        return false;
      }
      const taken = ring.pop();
      if (taken === Pop.Empty) return true;
      if (taken === Pop.Broken) {
        this.#broken = true;
        this.context.needsReset(ring.fault);
        return false;
      }
      const bytes = Math.max(ring.chain.readableBytes + ring.chain.writableBytes - HEADER_BYTES - 1, 0);
      const { limiter } = this.options;
      if (limiter !== undefined && !limiter.take(bytes)) {
        ring.unpop();
        this.context.counters[Counter.limited]++;
        this.#waiting.add(queue);
        this.#retry.start(limiter.delay(bytes));
        return false;
      }
      this.#request(queue, ring.chain);
    }
  }

  #request(queue: DeviceQueue, chain: Chain): void {
    const last = chain.count - 1;
    // 5.2.6: a header to read and a status byte to write, however the driver cut them up.
    if (chain.writableBytes === 0 || chain.read(0, this.#header, 0, HEADER_BYTES) < HEADER_BYTES) {
      this.context.counters[Counter.errors]++;
      this.#giveBack(queue, chain.id, 0);
      return;
    }
    const index = this.#freeSlots.pop()!;
    const slot = this.#slots[index];
    slot.queue = queue;
    slot.id = chain.id;
    slot.pending = 1; // this method's own, until all transfers are started
    slot.status = Result.ok;
    slot.statusAddress = chain.address[last] + chain.length[last] - 1;
    slot.write = false;
    slot.bytes = 0;
    const type = this.#headerView.getUint32(0, true);
    const sector = this.#headerView.getUint32(8, true) + this.#headerView.getUint32(12, true) * 2 ** 32;
    try {
      this.#dispatch(index, slot, chain, type, sector);
    } catch (error) {
      // What an image throws for a broken table, or a host that failed it.
      this.#fail(slot, error instanceof Error ? error.message : String(error));
    }
    this.#done(index);
  }

  #dispatch(index: number, slot: Slot, chain: Chain, type: number, sector: number): void {
    const { counters } = this.context;
    switch (type) {
      case Request.in: {
        const bytes = chain.writableBytes - 1;
        if (!this.#inside(sector, bytes)) {
          this.#fail(slot);
          return;
        }
        counters[Counter.read_ops]++;
        counters[Counter.read_bytes] += bytes;
        slot.bytes = bytes;
        this.#transfer(index, chain, chain.readable, 0, sector * SECTOR, bytes);
        return;
      }
      case Request.out: {
        const bytes = chain.readableBytes - HEADER_BYTES;
        if (this.options.readonly || !this.#inside(sector, bytes)) {
          this.#fail(slot);
          return;
        }
        counters[Counter.write_ops]++;
        counters[Counter.write_bytes] += bytes;
        slot.write = true;
        this.#transfer(index, chain, 0, HEADER_BYTES, sector * SECTOR, bytes);
        return;
      }
      case Request.flush:
        counters[Counter.flushes]++;
        this.#flush(index);
        return;
      case Request.identity: {
        const bytes = new Uint8Array(IDENTITY_BYTES);
        bytes.set(Buffer.from(this.options.serial).subarray(0, IDENTITY_BYTES));
        slot.bytes = Math.min(chain.writableBytes - 1, IDENTITY_BYTES);
        chain.write(0, bytes, 0, slot.bytes);
        return;
      }
      case Request.discard:
      case Request.writeZeroes:
        slot.status = this.#ranges(chain, type);
        if (slot.status === Result.ioError) counters[Counter.errors]++;
        return;
      default:
        slot.status = Result.unsupported;
    }
  }

  #inside(sector: number, bytes: number): boolean {
    return bytes > 0 && bytes % SECTOR === 0 && (sector + bytes / SECTOR) * SECTOR <= this.options.image.size;
  }

  /** Starts the transfers of a request, one for each piece that lies together on the host. */
  #transfer(index: number, chain: Chain, from: number, skip: number, offset: number, bytes: number): void {
    const { image, engine } = this.options;
    const slot = this.#slots[index];
    const { extent } = image;
    const base = index * SLOT_IOVECS;
    let used = 0;
    for (let at = 0; at < bytes; at += extent.length) {
      if (slot.write) image.mapWrite(offset + at, bytes - at);
      else image.mapRead(offset + at, bytes - at);
      const { length } = extent;
      if (extent.kind !== ExtentKind.File) {
        this.#answer(chain, skip + at, length);
        continue;
      }
      // Too many pieces for what is set aside: this one at once, on the spot.
      const direct = this.#freeTransfers.length === 0 || used + MAX_CHAIN > SLOT_IOVECS;
      const iovecs = direct ? this.#scratch : this.#iovecs;
      const first = direct ? 0 : base + used;
      const count = iovecs.describe(first, chain, from, skip + at, length);
      if (direct) {
        this.#transferNow(slot, extent.fd, iovecs, 0, count, extent.hostOffset, length);
        continue;
      }
      used += count;
      const token = this.#freeTransfers.pop()!;
      const transfer = this.#transfers[token];
      transfer.slot = index;
      transfer.fd = extent.fd;
      transfer.iovec = first;
      transfer.count = count;
      transfer.offset = extent.hostOffset;
      transfer.length = length;
      transfer.syncing = false;
      slot.pending++;
      if (slot.write) engine.write(extent.fd, iovecs.address(first), count, extent.hostOffset, token);
      else engine.read(extent.fd, iovecs.address(first), count, extent.hostOffset, token);
    }
  }

  /** Zeros, or what was compressed. @param at bytes into the writable part */
  #answer(chain: Chain, at: number, length: number): void {
    const { extent } = this.options.image;
    if (extent.kind === ExtentKind.Bytes) {
      chain.write(at, extent.bytes, extent.bytesOffset, length);
      return;
    }
    for (let done = 0; done < length; done += ZEROS.length) {
      chain.write(at + done, ZEROS, 0, Math.min(ZEROS.length, length - done));
    }
  }

  /** Moves a stretch with plain system calls, to its end. */
  #transferNow(
    slot: Slot,
    fd: number,
    iovecs: IovecArray,
    iovec: number,
    count: number,
    offset: number,
    length: number,
  ): void {
    const { kernel } = this.context;
    let first = iovec;
    let done = 0;
    while (done < length) {
      const address = iovecs.address(first);
      const left = iovec + count - first;
      const result = slot.write
        ? kernel.writevAtRaw(fd, address, left, offset + done)
        : kernel.readvAtRaw(fd, address, left, offset + done);
      if (result < 0) {
        this.#fail(slot, errorText(slot.write, length, offset, result));
        return;
      }
      if (result === 0) {
        // The end of the host's file.
        if (slot.write || this.options.raw) {
          this.#fail(slot, `The host's file ends at ${offset + done}`);
          return;
        }
        // An image that grows has not written its last cluster to its end.
        kernel.readvRaw(this.#zeros, iovecs.address(first), left);
        return;
      }
      done += result;
      first = skipIovecs(iovecs, first, result);
    }
  }

  #flush(index: number): void {
    const { image, raw } = this.options;
    // A format has metadata of its own.
    if (raw && this.#freeTransfers.length > 0) this.#startSync(index, this.#freeTransfers.pop()!);
    else image.flush();
  }

  #startSync(index: number, token: number): void {
    const transfer = this.#transfers[token];
    transfer.slot = index;
    transfer.syncing = true;
    this.#slots[index].pending++;
    this.options.engine.sync(this.options.image.extent.fd, token);
  }

  /** 5.2.6: ranges of sector, count and flags, 16 bytes each. */
  #ranges(chain: Chain, type: number): number {
    const { image, readonly } = this.options;
    const bytes = chain.readableBytes - HEADER_BYTES;
    if (readonly || bytes === 0 || bytes % RANGE_BYTES !== 0 || bytes > MAX_RANGES * RANGE_BYTES) return Result.ioError;
    const list = new Uint8Array(bytes);
    chain.read(HEADER_BYTES, list, 0, bytes);
    const view = new DataView(list.buffer);
    for (let at = 0; at < bytes; at += RANGE_BYTES) {
      const sector = view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
      const count = view.getUint32(at + 8, true);
      const flags = view.getUint32(at + 12, true);
      const allowed = type === Request.writeZeroes ? UNMAP : 0;
      if ((flags & ~allowed) !== 0) return Result.unsupported;
      if (count > MAX_RANGE_SECTORS || !this.#inside(sector, count * SECTOR)) return Result.ioError;
      if (type === Request.discard) image.discard(sector * SECTOR, count * SECTOR);
      else image.writeZeroes(sector * SECTOR, count * SECTOR, (flags & UNMAP) !== 0);
    }
    if (this.#writeThrough) image.flush();
    return Result.ok;
  }

  #transferred(token: number, result: number): void {
    const transfer = this.#transfers[token];
    const slot = this.#slots[transfer.slot];
    if (transfer.syncing) {
      if (result < 0) this.#fail(slot, `Syncing: ${errnoText(-result)}`);
    } else if (result < 0) {
      this.#fail(slot, errorText(slot.write, transfer.length, transfer.offset, result));
    } else if (result < transfer.length) {
      const first = skipIovecs(this.#iovecs, transfer.iovec, result);
      const left = transfer.iovec + transfer.count - first;
      const { fd, offset, length } = transfer;
      this.#transferNow(slot, fd, this.#iovecs, first, left, offset + result, length - result);
    }
    this.#freeTransfers.push(token);
    this.#done(transfer.slot);
  }

  /** One of the request's parts is done; with the last one it goes back to the driver. */
  #done(index: number): void {
    const slot = this.#slots[index];
    if (--slot.pending > 0) return;
    if (slot.write && this.#writeThrough && slot.status === Result.ok) {
      slot.write = false;
      if (this.options.raw && this.#freeTransfers.length > 0) {
        this.#startSync(index, this.#freeTransfers.pop()!);
        return;
      }
      this.#flushNow(slot);
    }
    const { queue, id, status, statusAddress, bytes } = slot;
    this.#one[0] = status;
    this.#driver!.memory.copyIn(statusAddress, this.#one, 0, 1);
    slot.queue = undefined;
    this.#freeSlots.push(index);
    this.#giveBack(queue!, id, (status === Result.ok ? bytes : 0) + 1);
  }

  #flushNow(slot: Slot): void {
    try {
      this.options.image.flush();
    } catch (error) {
      this.#fail(slot, error instanceof Error ? error.message : String(error));
    }
  }

  #fail(slot: Slot, reason?: string): void {
    slot.status = Result.ioError;
    this.context.counters[Counter.errors]++;
    // Without a reason it is the driver's own mistake.
    if (reason !== undefined) this.context.log('warn', reason);
  }

  #giveBack(queue: DeviceQueue, id: number, written: number): void {
    queue.ring.push(id, written);
    if (!this.#unsignalled.includes(queue)) this.#unsignalled.push(queue);
  }

  #start(): void {
    const { engine } = this.options;
    engine.submit();
    engine.reap(this.#complete);
    // A write-through write asks for its sync as it completes.
    engine.submit();
  }

  #completed(): void {
    this.options.engine.reap(this.#complete);
    this.options.engine.submit();
    this.#flushSignals();
    this.#resume();
  }

  #flushSignals(): void {
    for (const queue of this.#unsignalled) queue.signal();
    this.#unsignalled.length = 0;
  }

  /** Goes on with the queues that wait. */
  #resume(): void {
    if (this.#waiting.size === 0) return;
    const queues = [...this.#waiting];
    this.#waiting.clear();
    for (const queue of queues) this.kick(queue);
  }

  deactivate(): void {
    this.#waiting.clear();
    this.#retry.stop();
    this.options.engine.drain(this.#complete);
    this.#unsignalled.length = 0;
    this.#driver = undefined;
  }

  control(message: unknown): void {
    const { size } = message as { size: number };
    try {
      this.options.image.resize(size);
      const { buffer, byteOffset } = this.context.config;
      this.context.changeConfig(() => new DataView(buffer, byteOffset).setBigUint64(0, BigInt(size / SECTOR), true));
      this.context.emit({ kind: 'resized', size });
    } catch (error) {
      this.context.emit({ kind: 'resize-failed', reason: error instanceof Error ? error.message : String(error) });
    }
  }

  close(): void {
    const { engine, image } = this.options;
    if (engine.eventFd >= 0) this.context.loop.unwatch(engine.eventFd);
    engine.close();
    image.close();
    this.context.kernel.close(this.#zeros);
    this.#iovecs.close();
    this.#scratch.close();
  }
}

const ZEROS = new Uint8Array(65536);

function errorText(write: boolean, length: number, offset: number, result: number): string {
  return `${write ? 'Writing' : 'Reading'} ${length} bytes at ${offset}: ${errnoText(-result)}`;
}

/** Takes `bytes` off the front. @returns the element at which it goes on */
function skipIovecs(iovecs: IovecArray, first: number, bytes: number): number {
  let left = bytes;
  let at = first;
  while (left > 0 && left >= iovecs.length(at)) left -= iovecs.length(at++);
  if (left > 0) iovecs.set(at, iovecs.host(at) + left, iovecs.length(at) - left);
  return at;
}
