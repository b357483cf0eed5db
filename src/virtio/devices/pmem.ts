/**
 * The persistent memory device (virtio 1.3, 5.19): a file mapped into the guest's address space, of which only flushes
 * come through here.
 *
 * Not offered: SHMEM_REGION; the range is in the configuration.
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
import type { VirtQueue } from '../queue/queue.js';
import { serveQueue } from '../queue/serve.js';

const REQUEST_BYTES = 4;
const RESPONSE_BYTES = 4;
const TYPE_FLUSH = 0;
const RESPONSE_OK = 0;
const RESPONSE_EIO = 1;
/** Flushes in one turn: each may take the disk's time. */
const BATCH = 16;

export const PmemCounter = { flushes: 0, malformed: 1, failed: 2 } as const;

export interface PmemSetup {
  /** Guest physical address and bytes. */
  readonly start: number;
  readonly size: number;
}

export function pmemDescription({ start, size }: PmemSetup): VirtioDescription {
  const config = new Uint8Array(16);
  const view = new DataView(config.buffer);
  view.setBigUint64(0, BigInt(start), true);
  view.setBigUint64(8, BigInt(size), true);
  // RAM, as a memory controller has it.
  const classCode = 0x050000;
  const counters = Object.keys(PmemCounter);
  return { type: VirtioType.Pmem, classCode, features: [], queueSizes: [256], config, writable: [], counters };
}

export interface PmemOptions {
  /** The file; undefined where writes are to be discarded. Its opener closes it, after this device. */
  readonly fd: number | undefined;
}

export class PmemDevice implements VirtioDevice {
  #queue: DeviceQueue | undefined;
  #broken = false;
  readonly #answerChain = (ring: VirtQueue) => this.#answer(ring);
  readonly #again: Timer;
  readonly #bytes = new Uint8Array(4);
  readonly #view = new DataView(this.#bytes.buffer);

  constructor(
    private readonly context: DeviceContext,
    private readonly options: PmemOptions,
  ) {
    this.#again = context.loop.timer(() => {
      if (this.#queue !== undefined) this.kick(this.#queue);
    });
  }

  activate(driver: Driver): void {
    this.#queue = driver.queues[0];
    this.#broken = false;
  }

  kick(queue: DeviceQueue): void {
    if (queue !== this.#queue || this.#broken) return;
    const { ring } = queue;
    const more = serveQueue(queue, BATCH, this.#answerChain);
    this.#broken = ring.fault !== '';
    if (this.#broken) this.context.needsReset(ring.fault);
    else if (more) this.#again.start(0);
  }

  /** @returns bytes written */
  #answer({ chain }: VirtQueue): number {
    const { counters } = this.context;
    if (chain.writableBytes < RESPONSE_BYTES) {
      counters[PmemCounter.malformed]++;
      return 0;
    }
    const known = chain.read(0, this.#bytes, 0, REQUEST_BYTES) === REQUEST_BYTES;
    let response: number = RESPONSE_EIO;
    if (known && this.#view.getUint32(0, true) === TYPE_FLUSH) response = this.#flush();
    else counters[PmemCounter.malformed]++;
    this.#view.setUint32(0, response, true);
    return chain.write(0, this.#bytes, 0, RESPONSE_BYTES);
  }

  #flush(): number {
    const { counters, kernel } = this.context;
    const { fd } = this.options;
    counters[PmemCounter.flushes]++;
    const result = fd === undefined ? 0 : kernel.dataSyncRaw(fd);
    if (result >= 0) return RESPONSE_OK;
    if (counters[PmemCounter.failed]++ === 0)
      this.context.log('warn', `Flushing persistent memory failed with errno ${-result}`);
    return RESPONSE_EIO;
  }

  deactivate(): void {
    this.#queue = undefined;
    this.#again.stop();
  }

  close(): void {
    this.deactivate();
  }
}
