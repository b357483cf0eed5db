/**
 * The memory balloon (virtio 1.3, 5.5): pages that the guest gives up go back to the host, and so does free memory that
 * it reports.
 *
 * Not offered: statistics, free page hints, page poison, MUST_TELL_HOST. Deflating therefore needs no work: a page comes
 * back, zeroed, when the guest touches it.
 */
import {
  type DeviceContext,
  type DeviceQueue,
  type Driver,
  type Timer,
  type VirtioDescription,
  type VirtioDevice,
  VirtioType,
} from '../device.js';
import { type Chain, Pop, type VirtQueue } from '../queue/queue.js';

/** 5.5.6: a page of the balloon, whatever the host's pages are. */
const PAGE = 4096;
const QUEUE = { inflate: 0, deflate: 1, reporting: 2 } as const;
/** 32-bit words of the configuration. */
const CONFIG = { pages: 0, actual: 1 } as const;
export const BalloonFeature = { deflateOnOom: 2, reporting: 5 } as const;

/** Bytes of page numbers taken from one chain: a list may be all of RAM, and others want the worker too. Linux: 1 KiB. */
export const LIST_LIMIT = 0x4000;
/** Chains served in one turn, for the same reason. */
const BATCH = 32;

/** Pages by queue; malformed chains; pages outside RAM or beyond a limit; discards that the host refused. */
export const BalloonCounter = { inflated: 0, deflated: 1, reported: 2, malformed: 3, ignored: 4, failed: 5 } as const;

function pagesOf(bytes: number): number {
  return Math.min(Math.max(Math.floor(bytes / PAGE), 0), 0xffff_ffff);
}

export interface BalloonSetup {
  /** Bytes that the balloon should hold at the start. */
  readonly size: number;
  readonly deflateOnOom: boolean;
  readonly freePageReporting: boolean;
}

export function balloonDescription({ size, deflateOnOom, freePageReporting }: BalloonSetup): VirtioDescription {
  const features: number[] = [];
  if (deflateOnOom) features.push(BalloonFeature.deflateOnOom);
  if (freePageReporting) features.push(BalloonFeature.reporting);
  return {
    type: VirtioType.Balloon,
    classCode: 0xff0000,
    features,
    // 5.5.2: queues whose features are not offered have no number, so reporting is the third one.
    queueSizes: freePageReporting ? [128, 128, 32] : [128, 128],
    config: new Uint8Array(Uint32Array.of(pagesOf(size), 0).buffer),
    writable: [[4, 8]],
    counters: Object.keys(BalloonCounter),
  };
}

export interface BalloonOptions {
  /** Gives the host's pages behind whole guest pages back. Guest physical address and bytes, all of it RAM. */
  readonly discard: (address: number, length: number) => void;
}

export class BalloonDevice implements VirtioDevice {
  #driver: Driver | undefined;
  #broken = false;
  readonly #config: Uint32Array;
  readonly #list = new Uint32Array(LIST_LIMIT / 4);
  readonly #listBytes = new Uint8Array(this.#list.buffer);
  /** Pages in a row that are to be discarded: guest addresses. */
  #runStart = 0;
  #runEnd = 0;
  readonly #again: Timer;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: BalloonOptions,
  ) {
    this.#config = new Uint32Array(context.config.buffer, context.config.byteOffset, 2);
    this.#again = context.loop.timer(() => {
      for (const queue of this.#driver?.queues ?? []) if (queue !== undefined) this.kick(queue);
    });
  }

  activate(driver: Driver): void {
    this.#driver = driver;
    this.#broken = false;
    // In a machine that was restored nobody has heard of it.
    if (this.#config[CONFIG.actual] !== 0) this.configWritten();
  }

  kick(queue: DeviceQueue): void {
    const driver = this.#driver;
    if (driver === undefined || this.#broken) return;
    const { ring, index } = queue;
    ring.suppressKicks();
    let left = BATCH;
    for (; left > 0; left--) {
      const pop = ring.pop();
      if (pop === Pop.Taken) this.#take(driver, ring, index);
      else if (pop === Pop.Broken || !ring.resumeKicks()) break;
      else ring.suppressKicks();
    }
    queue.signal();
    this.#broken = ring.fault !== '';
    if (this.#broken) this.context.needsReset(ring.fault);
    else if (left === 0) this.#again.start(0);
  }

  #take(driver: Driver, ring: VirtQueue, index: number): void {
    const { chain } = ring;
    const { counters } = this.context;
    const reporting = index === QUEUE.reporting;
    // Lists of page numbers are read; reported memory is offered as if to be written (5.5.6.7).
    const wanted = reporting ? 0 : chain.count;
    if (chain.readable !== wanted || chain.readableBytes % 4 !== 0) counters[BalloonCounter.malformed]++;
    else if (reporting) this.#report(driver, chain);
    else if (index === QUEUE.inflate) this.#inflate(driver, chain);
    else counters[BalloonCounter.deflated] += Math.min(chain.readableBytes, LIST_LIMIT) / 4;
    // The guest may use the pages again once the chain is back.
    this.#discardRun();
    ring.push(chain.id, 0);
  }

  #inflate({ memory }: Driver, chain: Chain): void {
    const { counters } = this.context;
    const count = chain.read(0, this.#listBytes, 0, LIST_LIMIT) / 4;
    counters[BalloonCounter.ignored] += chain.readableBytes / 4 - count;
    for (let at = 0; at < count; at++) {
      const address = this.#list[at] * PAGE;
      if (memory.isRam(address, PAGE)) {
        this.#add(address, address + PAGE);
        counters[BalloonCounter.inflated]++;
      } else counters[BalloonCounter.ignored]++;
    }
  }

  /** Buffers may overlap, so that a chain names more than there is: all of RAM is the limit of its work. */
  #report({ memory }: Driver, chain: Chain): void {
    const { counters } = this.context;
    let left = memory.size;
    for (let index = 0; index < chain.count; index++) {
      // Only whole pages: what lies beside them is in use.
      const start = Math.ceil(chain.address[index] / PAGE) * PAGE;
      const end = Math.floor((chain.address[index] + chain.length[index]) / PAGE) * PAGE;
      left -= chain.length[index];
      if (left >= 0 && start < end) {
        this.#add(start, end);
        counters[BalloonCounter.reported] += (end - start) / PAGE;
      } else counters[BalloonCounter.ignored]++;
    }
  }

  /** Linux takes its pages in rising or falling order. */
  #add(start: number, end: number): void {
    if (start === this.#runEnd) this.#runEnd = end;
    else if (end === this.#runStart) this.#runStart = start;
    else this.#discardRun(start, end);
  }

  /** Discards the run, and begins another. */
  #discardRun(nextStart = 0, nextEnd = 0): void {
    const start = this.#runStart;
    const length = this.#runEnd - start;
    this.#runStart = nextStart;
    this.#runEnd = nextEnd;
    if (length === 0) return;
    try {
      this.options.discard(start, length);
    } catch (error) {
      if (this.context.counters[BalloonCounter.failed]++ === 0)
        this.context.log('warn', `Cannot give memory back to the host: ${String(error)}`);
    }
  }

  configWritten(): void {
    if (this.#driver === undefined) return;
    const { pages, actual } = CONFIG;
    const size = this.#config[actual] * PAGE;
    const reached = this.#config[actual] === this.#config[pages];
    // The driver can write any number; a balloon larger than RAM would upset who subtracts it.
    this.context.emit({ kind: 'balloon-actual', size: Math.min(size, this.#driver.memory.size), reached });
  }

  /** `{ kind: 'resize', size }`: bytes that the balloon should hold. */
  control(message: unknown): void {
    const { kind, size } = message as { kind?: unknown; size?: unknown };
    if (kind !== 'resize' || typeof size !== 'number') return;
    this.context.changeConfig(() => (this.#config[CONFIG.pages] = pagesOf(size)));
  }

  deactivate(): void {
    this.#driver = undefined;
    this.#again.stop();
  }

  close(): void {
    this.deactivate();
  }
}
