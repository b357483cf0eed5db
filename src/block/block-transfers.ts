/**
 * What the requests of a block device move: each is cut into pieces that lie together on the host, and an I/O engine moves them.
 *
 * A request may have to wait for one that is under way: for a free transfer, for room to describe its pieces, for a cluster
 * that is being written. `proceed` says so, and is called again when a transfer has ended. What the engine could not do, or
 * not whole, goes on from there.
 */
import type { EventLoop, Timer } from '../virtio/device.js';
import { errnoText, type HostKernel, type HostMapping } from '../sys/host-kernel.js';
import { IovecArray } from '../virtio/queue/iovec.js';
import { type Chain, MAX_CHAIN } from '../virtio/queue/queue.js';
import { MAX_RANGES, SECTOR } from './block-description.js';
import { type DiskImage, type Extent, ExtentKind } from './formats/disk-image.js';
import type { IoEngine } from './engines/io-engine.js';

const EINTR = 4;
const EAGAIN = 11;
const EINVAL = 22;
const EOPNOTSUPP = 95;
/** linux/falloc.h */
const KEEP_SIZE = 1;
const PUNCH_HOLE = 2;
const ZERO_RANGE = 0x10;
/** Milliseconds after which the host is asked again for what it was too busy for. */
const RETRY = 1;
/** How often it is asked before a driver that takes its queues back is let wait no longer. */
const DRAIN_TRIES = 100;
/** Elements for each request: its buffers, and behind them copies for pieces that end within a buffer. */
const JOB_IOVECS = 2 * MAX_CHAIN;
/** Bytes of the buffer for data that is not aligned as the host needs it, and of the one for what is not read from a file. */
const BOUNCE = 2 ** 18;
const COPY_FAILED = 'Copying what is to be written failed';
/** Bytes that all elements for writing zeros point to, and how many there are. */
const ZERO_BYTES = 2 ** 16;
const ZERO_IOVECS = MAX_CHAIN;

export const JobKind = { Read: 0, Write: 1, Sync: 2, Discard: 3, Zeroes: 4 } as const;
type JobKind = (typeof JobKind)[keyof typeof JobKind];

/** What a request asks of the disk. Made once, used over and over. */
interface Job {
  kind: JobKind;
  offset: number;
  bytes: number;
  /** Bytes that need nothing more than that their transfers end. */
  at: number;
  /** The elements of its buffers that are left, and how many of those for copies are in use. */
  element: number;
  end: number;
  copies: number;
  /** Offset, bytes, and whether space is given back, of each range of a discard or of zeroes; the next of them. */
  readonly ranges: Float64Array;
  rangeCount: number;
  range: number;
  /** Transfers under way. */
  pending: number;
  /** All of them are. */
  started: boolean;
  failed: boolean;
}

const Kind = { Read: 0, Write: 1, Sync: 2, Allocate: 3, Zeroes: 4 } as const;

/** Elements that describe a piece. */
interface Piece {
  iovec: number;
  count: number;
}

/** A transfer under way: a stretch of a request that lies in one piece on the host. */
interface Transfer extends Piece {
  kind: number;
  job: number;
  fd: number;
  /** What is left to move, bytes. */
  offset: number;
  length: number;
  /** FALLOC_FL_ bits */
  mode: number;
  /** For `written` of the image, or -1. */
  allocation: number;
  /** Through the bounce buffer: the guest's elements and all of the bytes; 0 elements: not so. */
  guestIovec: number;
  guestCount: number;
  whole: number;
}

export interface TransferOptions {
  readonly image: DiskImage;
  readonly engine: IoEngine;
  /** The file's bytes are the guest's: its end is an error, and syncing it is all that a flush has to do. */
  readonly raw: boolean;
  /** With O_DIRECT: the image's file once more, through the page cache. Its opener closes it. */
  readonly buffered?: number | undefined;
  /** Space may be given back to the host. */
  readonly sparse?: boolean;
}

export interface TransferEvents {
  /** All of a request is done. */
  finished(job: number): void;
  /** The host failed it, which comes before `finished`. @param reason one line */
  failed(job: number, reason: string): void;
  /** Something of the engine's can go on: `reap` and `proceed` are to be called. */
  again(): void;
}

export class BlockTransfers {
  readonly #jobs: Job[];
  readonly #transfers: Transfer[];
  readonly #free: number[] = [];
  readonly #iovecs: IovecArray;
  /** The element of the bounce buffer, and the first of those for zeros. */
  readonly #bounceIovec: number;
  readonly #zeroIovec: number;
  readonly #zeroes: HostMapping;
  /** Where nothing has been written reads as this: /dev/zero. */
  readonly #nothing: number;
  /** A file in memory: system calls copy between it and the guest's buffers. Bounced data, then what was compressed. */
  readonly #memory: number;
  readonly #bounce: HostMapping;
  #bouncing = false;
  /** Bits that addresses, offsets and lengths of the image's own file must not have. */
  readonly #mask: number;
  readonly #file: number;
  /** The host's file takes these. */
  #holes: boolean;
  #zeroRanges = true;
  /** Refused for now; started again by the timer. */
  readonly #refused: number[] = [];
  readonly #retry: Timer;
  #queued = false;
  #told = 0;
  /** What is refused now has failed. */
  #impatient = false;
  readonly #complete = (token: number, result: number) => this.#completed(token, result);

  constructor(
    private readonly kernel: HostKernel,
    loop: EventLoop,
    private readonly options: TransferOptions,
    private readonly events: TransferEvents,
  ) {
    const { image, engine } = options;
    const { depth } = engine;
    this.#jobs = Array.from({ length: depth }, () => ({
      ...{ kind: JobKind.Read, offset: 0, bytes: 0, at: 0, element: 0, end: 0, copies: 0 },
      ...{
        ranges: new Float64Array(3 * MAX_RANGES),
        rangeCount: 0,
        range: 0,
        pending: 0,
        started: false,
        failed: false,
      },
    }));
    this.#transfers = Array.from({ length: depth }, (_, index) => {
      this.#free.push(depth - 1 - index);
      return {
        ...{ kind: 0, job: 0, fd: 0, iovec: 0, count: 0, offset: 0, length: 0, mode: 0, allocation: -1 },
        ...{ guestIovec: 0, guestCount: 0, whole: 0 },
      };
    });
    this.#bounceIovec = depth * JOB_IOVECS;
    this.#zeroIovec = this.#bounceIovec + 1;
    this.#iovecs = new IovecArray(kernel, this.#zeroIovec + ZERO_IOVECS + ZERO_BYTES / SECTOR);
    this.#zeroes = kernel.map({ length: ZERO_BYTES, shared: false });
    this.#describeZeroes();
    this.#nothing = kernel.open('/dev/zero', { readonly: true });
    this.#memory = kernel.memfd('vmm-bounce', { size: 2 * BOUNCE });
    this.#bounce = kernel.map({ length: BOUNCE, fd: this.#memory, shared: true });
    this.#mask = image.alignment - 1;
    this.#file = image.extent.fd;
    this.#holes = options.sparse ?? true;
    this.#retry = loop.timer(() => {
      this.#startRefused();
      events.again();
    });
  }

  /** Whole ones, then one of each number of sectors. */
  #describeZeroes(): void {
    const host = Number(this.#zeroes.handle.address);
    for (let index = 0; index < ZERO_IOVECS; index++) this.#iovecs.set(this.#zeroIovec + index, host, ZERO_BYTES);
    for (let sectors = 0; sectors < ZERO_BYTES / SECTOR; sectors++) {
      this.#iovecs.set(this.#zeroIovec + ZERO_IOVECS + sectors, host, sectors * SECTOR);
    }
  }

  /** @param from first buffer of the chain's data @param skip bytes of it that are none */
  beginData(
    index: number,
    write: boolean,
    offset: number,
    bytes: number,
    chain: Chain,
    from: number,
    skip: number,
  ): void {
    const job = this.#begin(index, write ? JobKind.Write : JobKind.Read);
    job.offset = offset;
    job.bytes = bytes;
    job.element = index * JOB_IOVECS;
    job.end = job.element + this.#iovecs.describe(job.element, chain, from, skip, bytes);
  }

  beginSync(index: number): void {
    this.#begin(index, JobKind.Sync);
  }

  /** Followed by `addRange`. */
  beginRanges(index: number, zeroes: boolean): void {
    this.#begin(index, zeroes ? JobKind.Zeroes : JobKind.Discard);
  }

  addRange(index: number, offset: number, bytes: number, unmap: boolean): void {
    const job = this.#jobs[index];
    job.ranges.set([offset, bytes, unmap ? 1 : 0], 3 * job.rangeCount++);
  }

  #begin(index: number, kind: JobKind): Job {
    const job = this.#jobs[index];
    job.kind = kind;
    job.at = 0;
    job.copies = 0;
    job.rangeCount = 0;
    job.range = 0;
    job.started = false;
    job.failed = false;
    return job;
  }

  /** Starts what can be started of a request. @returns false: it has to wait for a transfer under way */
  proceed(index: number): boolean {
    const job = this.#jobs[index];
    try {
      if (!this.#start(index, job)) return false;
    } catch (error) {
      // What an image throws for a broken table, or a host that failed it.
      this.#fail(index, error instanceof Error ? error.message : String(error));
    }
    job.started = true;
    if (job.pending === 0) this.events.finished(index);
    return true;
  }

  #start(index: number, job: Job): boolean {
    switch (job.kind) {
      case JobKind.Read:
      case JobKind.Write:
        while (job.at < job.bytes && !job.failed) if (!this.#piece(index, job)) return false;
        return true;
      case JobKind.Sync:
        if (!this.options.raw) this.options.image.flush();
        else if (this.#free.length === 0) return false;
        else this.#issue(this.#take(index, Kind.Sync, this.#file, 0, 0));
        return true;
      default:
        while (job.range < job.rangeCount && !job.failed) {
          const at = 3 * job.range;
          const [offset, length, unmap] = job.ranges.subarray(at, at + 3);
          if (!this.#range(index, job.kind, offset, length, unmap !== 0)) return false;
          job.range++;
        }
        return true;
    }
  }

  /** The next stretch that lies together on the host. @returns false: it has to wait */
  #piece(index: number, job: Job): boolean {
    const { image } = this.options;
    const { extent } = image;
    if (job.pending === 0) job.copies = 0;
    if (this.#free.length === 0 || job.copies + job.end - job.element > MAX_CHAIN) return false;
    let wanted = job.bytes - job.at;
    // Copied like what is not aligned: the guest's own bytes could be others once they have been looked at.
    const guarded = job.kind === JobKind.Write && (image.guards?.(job.offset + job.at, wanted) ?? false);
    const bounced = guarded || (this.#mask !== 0 && !this.#iovecs.aligned(job.element, wanted, this.#mask));
    if (bounced && this.#bouncing) return false;
    if (bounced) wanted = Math.min(wanted, BOUNCE);
    if (job.kind === JobKind.Write) image.mapWrite(job.offset + job.at, wanted);
    else image.mapRead(job.offset + job.at, wanted);
    if (extent.kind === ExtentKind.Busy) return false;
    const { length } = extent;
    if (extent.kind !== ExtentKind.File) this.#fill(index, job, extent);
    else if (this.#mask !== 0 && ((extent.hostOffset | length) & this.#mask) !== 0) {
      if (this.underWay > 0) {
        this.#written(index, extent.allocation, false);
        return false;
      }
      this.#moveNow(index, job, extent, guarded);
    } else {
      const { fd, hostOffset, allocation } = extent;
      const token = this.#take(index, job.kind, fd, hostOffset, length);
      const transfer = this.#transfers[token];
      transfer.allocation = allocation;
      this.#cut(index, job, length, transfer);
      let reason: string | undefined;
      if (bounced && !this.#useBounce(transfer)) reason = COPY_FAILED;
      else if (guarded) reason = this.#refusal(job, length);
      if (reason === undefined) this.#issue(token);
      else {
        this.#fail(index, reason);
        this.#end(token, false);
      }
    }
    job.at += length;
    return true;
  }

  /** Transfers that have not ended. */
  get underWay(): number {
    return this.#transfers.length - this.#free.length;
  }

  /** Describes the next bytes of a job's buffers in `into`. */
  #cut(index: number, job: Job, bytes: number, into: Piece): void {
    const iovecs = this.#iovecs;
    const { element } = job;
    let left = bytes;
    let at = element;
    while (left > 0 && left >= iovecs.length(at)) left -= iovecs.length(at++);
    into.iovec = element;
    into.count = at - element;
    job.element = at;
    if (left === 0) return;
    // It ends within a buffer, whose rest is the next piece's.
    into.iovec = index * JOB_IOVECS + MAX_CHAIN + job.copies;
    into.count++;
    for (let copy = 0; copy < into.count; copy++) {
      iovecs.set(into.iovec + copy, iovecs.host(element + copy), iovecs.length(element + copy));
    }
    iovecs.set(into.iovec + into.count - 1, iovecs.host(at), left);
    iovecs.skip(at, left);
    job.copies += into.count;
  }

  #take(job: number, kind: number, fd: number, offset: number, length: number): number {
    const token = this.#free.pop()!;
    const transfer = this.#transfers[token];
    transfer.kind = kind;
    transfer.job = job;
    transfer.fd = fd;
    transfer.offset = offset;
    transfer.length = length;
    transfer.allocation = -1;
    transfer.guestCount = 0;
    this.#jobs[job].pending++;
    return token;
  }

  #issue(token: number): void {
    const { engine } = this.options;
    const transfer = this.#transfers[token];
    const { kind, fd, iovec, count, offset, length, mode } = transfer;
    this.#queued = true;
    if (kind === Kind.Read) engine.read(fd, this.#iovecs.address(iovec), count, offset, token);
    else if (kind === Kind.Write) engine.write(fd, this.#iovecs.address(iovec), count, offset, token);
    else if (kind === Kind.Sync) engine.sync(fd, token);
    else if (kind === Kind.Allocate) engine.allocate(fd, mode, offset, length, token);
    else {
      const zeros = this.#zeroPiece(length);
      engine.write(fd, this.#iovecs.address(zeros.iovec), zeros.count, offset, token);
    }
  }

  /** Zeros, or what was compressed, into the guest's buffers. */
  #fill(index: number, job: Job, { kind, bytes, bytesOffset, length }: Extent): void {
    const piece = { iovec: 0, count: 0 };
    const { copies } = job;
    const compressed = kind === ExtentKind.Bytes;
    const chunk = compressed ? BOUNCE : length;
    for (let at = 0; at < length; at += chunk) {
      const part = Math.min(chunk, length - at);
      job.copies = copies;
      this.#cut(index, job, part, piece);
      // Behind what may be bounced just now.
      if (compressed)
        this.kernel.writeAt(this.#memory, bytes.subarray(bytesOffset + at, bytesOffset + at + part), BOUNCE);
      const result = this.#copy(false, compressed ? this.#memory : this.#nothing, piece, BOUNCE, part);
      if (result < part) this.#fail(index, errorText(false, part, job.offset, result));
    }
    job.copies = copies;
  }

  /**
   * Moves a stretch with plain system calls. @param write from the guest's buffers @param piece what is left of them afterwards
   * @returns bytes moved, fewer where the file ends, or a negated errno
   */
  #copy(write: boolean, fd: number, piece: Piece, offset: number, length: number): number {
    for (let done = 0; done < length;) {
      const address = this.#iovecs.address(piece.iovec);
      const result = write
        ? this.kernel.writevAtRaw(fd, address, piece.count, offset + done)
        : this.kernel.readvAtRaw(fd, address, piece.count, offset + done);
      if (result === -EINTR) continue;
      if (result < 0) return result;
      if (result === 0) return done;
      done += result;
      this.#skip(piece, result);
    }
    return length;
  }

  #skip(piece: Piece, bytes: number): void {
    const iovec = this.#iovecs.skip(piece.iovec, bytes);
    piece.count -= iovec - piece.iovec;
    piece.iovec = iovec;
  }

  /**
   * Moves what does not begin and end at the blocks of the host through the page cache, while nothing else is under way: the
   * blocks that it shares could otherwise be written from two sides.
   */
  #moveNow(index: number, job: Job, { fd, hostOffset, length, allocation }: Extent, guarded: boolean): void {
    const piece = { iovec: 0, count: 0 };
    const write = job.kind === JobKind.Write;
    this.#cut(index, job, length, piece);
    if (guarded) {
      const copied = this.#copy(true, this.#memory, piece, 0, length) === length;
      const reason = copied ? this.#refusal(job, length) : COPY_FAILED;
      if (reason !== undefined) {
        this.#fail(index, reason);
        this.#written(index, allocation, false);
        return;
      }
      this.#describeBounce(length);
      piece.iovec = this.#bounceIovec;
      piece.count = 1;
    }
    const result = this.#copy(write, this.#throughCache(fd), piece, hostOffset, length);
    let ok = result === length;
    if (result < 0) this.#fail(index, errorText(write, length, hostOffset, result));
    else if (!ok) ok = this.#pastEnd(index, write, piece, hostOffset + result, length - result);
    this.#written(index, allocation, ok);
  }

  /** Of what has been copied into the bounce buffer. */
  #refusal(job: Job, length: number): string | undefined {
    const offset = job.offset + job.at;
    return this.options.image.refusal?.(offset, length, (at) => {
      const sector = new Uint8Array(SECTOR);
      this.kernel.readAt(this.#memory, sector, at - offset);
      return sector;
    });
  }

  #throughCache(fd: number): number {
    return fd === this.#file ? this.options.buffered! : fd;
  }

  /** The host's file has ended. An image that grows has not written its last cluster to its end: that reads as zeros. */
  #pastEnd(index: number, write: boolean, piece: Piece, offset: number, length: number): boolean {
    if (!write && !this.options.raw) return this.#copy(false, this.#nothing, piece, 0, length) === length;
    this.#fail(index, `The host's file ends at ${offset}`);
    return false;
  }

  /** A range of a discard or of zeroes. @returns false: it has to wait */
  #range(index: number, kind: JobKind, offset: number, length: number, unmap: boolean): boolean {
    const { image, raw } = this.options;
    const discard = kind === JobKind.Discard;
    if (!raw) return discard ? image.discard(offset, length) : image.writeZeroes(offset, length, unmap);
    const aligned = ((offset | length) & this.#mask) === 0;
    // A discard is a hint (5.2.6).
    if (discard && (!this.#holes || !aligned)) return true;
    if (this.#free.length === 0 || (!aligned && this.underWay > 0)) return false;
    if (aligned) this.#allocate(this.#take(index, Kind.Allocate, this.#file, offset, length), discard || unmap);
    else this.#zeroNow(index, offset, length);
    return true;
  }

  /** Makes a stretch of a raw file zeros by the best way that is known to work. */
  #allocate(token: number, unmap: boolean): void {
    const transfer = this.#transfers[token];
    if (unmap && this.#holes) transfer.mode = PUNCH_HOLE | KEEP_SIZE;
    else if (this.#zeroRanges) transfer.mode = ZERO_RANGE | KEEP_SIZE;
    else transfer.kind = Kind.Zeroes;
    this.#issue(token);
  }

  /** The elements that write so many bytes of zeros, or the first of them. */
  #zeroPiece(length: number): Piece {
    const count = Math.min(Math.floor(length / ZERO_BYTES), ZERO_IOVECS);
    if (count > 0) return { iovec: this.#zeroIovec, count };
    return { iovec: this.#zeroIovec + ZERO_IOVECS + length / SECTOR, count: 1 };
  }

  #zeroNow(index: number, offset: number, length: number): void {
    for (let at = 0; at < length;) {
      const { iovec, count } = this.#zeroPiece(length - at);
      const address = this.#iovecs.address(iovec);
      const result = this.kernel.writevAtRaw(this.#throughCache(this.#file), address, count, offset + at);
      if (result === -EINTR) continue;
      if (result < SECTOR) {
        this.#fail(index, errorText(true, length, offset, result));
        return;
      }
      at += Math.floor(result / SECTOR) * SECTOR;
    }
  }

  /** Moves the bytes by the bounce buffer. @returns false when it cannot be filled */
  #useBounce(transfer: Transfer): boolean {
    const { iovec, count, length } = transfer;
    this.#bouncing = true;
    transfer.guestIovec = iovec;
    transfer.guestCount = count;
    transfer.whole = length;
    transfer.iovec = this.#bounceIovec;
    transfer.count = 1;
    this.#describeBounce(length);
    return transfer.kind === Kind.Read || this.#copy(true, this.#memory, { iovec, count }, 0, length) === length;
  }

  #describeBounce(length: number): void {
    this.#iovecs.set(this.#bounceIovec, Number(this.#bounce.handle.address), length);
  }

  #completed(token: number, result: number): void {
    const transfer = this.#transfers[token];
    this.#told++;
    if ((result === -EAGAIN || result === -EINTR) && !this.#impatient) {
      this.#refused.push(token);
      this.#retry.start(RETRY);
    } else if (transfer.kind === Kind.Allocate) this.#allocated(token, transfer, result);
    else if (transfer.kind === Kind.Sync) {
      if (result < 0) this.#fail(transfer.job, `Syncing: ${errnoText(-result)}`);
      this.#end(token, result >= 0);
    } else this.#moved(token, transfer, result);
  }

  #moved(token: number, transfer: Transfer, result: number): void {
    const { kind, job, offset, length } = transfer;
    const write = kind !== Kind.Read;
    // Zeros are written again from the start of a sector that was cut.
    const moved = kind === Kind.Zeroes ? Math.floor(result / SECTOR) * SECTOR : result;
    if (result < 0) this.#fail(job, errorText(write, length, offset, result));
    else if (moved > 0 && moved < length) {
      if (kind !== Kind.Zeroes) this.#skip(transfer, moved);
      transfer.offset += moved;
      transfer.length -= moved;
      this.#issue(token);
      return;
    }
    let ok = moved === length;
    if (moved === 0) ok = this.#pastEnd(job, write, transfer, offset, length);
    this.#end(token, ok);
  }

  #allocated(token: number, transfer: Transfer, result: number): void {
    const { job, mode, offset, length } = transfer;
    const unmap = (mode & PUNCH_HOLE) !== 0;
    if (result === -EOPNOTSUPP) {
      if (unmap) this.#holes = false;
      else this.#zeroRanges = false;
    }
    const unable = result === -EOPNOTSUPP || result === -EINVAL;
    if (unable && this.#jobs[job].kind === JobKind.Zeroes) {
      // -EINVAL: a device whose blocks are larger than this range's.
      if (result === -EINVAL) {
        transfer.kind = Kind.Zeroes;
        this.#issue(token);
      } else this.#allocate(token, false);
      return;
    }
    // What a discard cannot give back stays as it is.
    const ok = result >= 0 || unable;
    if (!ok) this.#fail(job, `Zeroing ${length} bytes at ${offset}: ${errnoText(-result)}`);
    this.#end(token, ok);
  }

  /** @param ok all of it is where it belongs */
  #end(token: number, ok: boolean): void {
    const transfer = this.#transfers[token];
    const index = transfer.job;
    const job = this.#jobs[index];
    if (transfer.guestCount > 0) {
      this.#bouncing = false;
      const piece = { iovec: transfer.guestIovec, count: transfer.guestCount };
      const read = transfer.kind === Kind.Read && ok;
      if (read && this.#copy(false, this.#memory, piece, 0, transfer.whole) < transfer.whole) {
        this.#fail(index, 'Copying what was read failed');
      }
    }
    this.#free.push(token);
    job.pending--;
    this.#written(index, transfer.allocation, ok);
    if (job.pending === 0 && job.started) this.events.finished(index);
  }

  #written(index: number, allocation: number, ok: boolean): void {
    if (allocation < 0 || this.options.image.written(allocation, ok) || !ok) return;
    this.#fail(index, 'The image could not take in what was written');
  }

  #fail(index: number, reason: string): void {
    this.#jobs[index].failed = true;
    this.events.failed(index, reason);
  }

  #startRefused(): void {
    for (const token of this.#refused) this.#issue(token);
    this.#refused.length = 0;
  }

  /** Starts what is queued, and tells what is done already. @returns whether anything was */
  submit(): boolean {
    if (!this.#queued) return false;
    this.#queued = false;
    if (!this.options.engine.submit()) {
      this.#queued = true;
      this.#retry.start(RETRY);
    }
    return this.reap();
  }

  /** Tells what is done. @returns whether anything was */
  reap(): boolean {
    const told = this.#told;
    this.options.engine.reap(this.#complete);
    return this.#told !== told;
  }

  /** Waits until nothing is under way. What the host goes on refusing fails. */
  drain(): void {
    this.#retry.stop();
    for (let tries = 0; this.underWay > 0; tries++) {
      this.#impatient = tries >= DRAIN_TRIES;
      this.#startRefused();
      this.options.engine.drain(this.#complete);
    }
    this.#retry.stop();
    this.#impatient = false;
    this.#queued = false;
  }

  /** After `drain`. The engine and the image are their openers' to close. */
  close(): void {
    this.#bounce.unmap();
    this.#zeroes.unmap();
    this.#iovecs.close();
    this.kernel.close(this.#memory);
    this.kernel.close(this.#nothing);
  }
}

function errorText(write: boolean, length: number, offset: number, result: number): string {
  return `${write ? 'Writing' : 'Reading'} ${length} bytes at ${offset}: ${errnoText(-result)}`;
}
