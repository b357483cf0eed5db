/**
 * The memory device (virtio 1.3, 5.15): a region of guest addresses in blocks, which the driver plugs and unplugs until as many
 * are plugged as it was asked for.
 *
 * The host has the whole region mapped from the start, and gives its pages when they are touched: plugging allows what could be
 * done all along. So the bound of what a guest can take of the host is the region's size, whatever is plugged. Access to unplugged
 * blocks is refused neither to vCPUs nor to devices: they read as zeros, and what is written there is lost when the block is
 * next unplugged. UNPLUGGED_INACCESSIBLE (the driver may not even read them) is therefore no protection. It is offered where
 * reading takes pages of the host, which is so for shared memory and huge pages, and spares those that a dump would take.
 *
 * The usable region is always all of it. ACPI_PXM is offered where the machine has NUMA nodes.
 */
import { StateBlock, stateLayout } from '../../state/state-block.js';
import {
  type DeviceContext,
  type DeviceQueue,
  type Driver,
  type RestoredDevice,
  type Timer,
  type VirtioDescription,
  type VirtioDevice,
  VirtioType,
} from '../device.js';
import type { Chain, VirtQueue } from '../queue/queue.js';
import { serveQueue } from '../queue/serve.js';

const MemFeature = { acpiPxm: 0, unpluggedInaccessible: 1 } as const;
/** 5.15.4: offsets of the configuration. The node's number means nothing without ACPI_PXM. */
const CONFIG = {
  blockSize: 0,
  node: 8,
  address: 16,
  regionSize: 24,
  usableSize: 32,
  pluggedSize: 40,
  requestedSize: 48,
  bytes: 56,
} as const;

/** 5.15.6: struct virtio_mem_req and struct virtio_mem_resp. */
const REQUEST = { type: 0, address: 8, blocks: 16, bytes: 24 } as const;
const RESPONSE = { type: 0, state: 8, bytes: 10 } as const;
export const MemRequest = { plug: 0, unplug: 1, unplugAll: 2, state: 3 } as const;
export const MemResponse = { ack: 0, nack: 1, busy: 2, error: 3 } as const;
export const BlockState = { plugged: 0, unplugged: 1, mixed: 2 } as const;

/** Requests served in one turn. */
const BATCH = 32;

/** Blocks; chains that are no request; requests that name what they may not, or ask for too much; those that the host refused. */
export const MemCounter = { plugged: 0, unplugged: 1, malformed: 2, refused: 3, failed: 4 } as const;

export interface MemSetup {
  /** Guest physical address and bytes, multiples of the block size. */
  readonly start: number;
  readonly size: number;
  /** Bytes, a power of two. */
  readonly blockSize: number;
  /** Bytes that the driver should plug at the start, a multiple of the block size. */
  readonly requested: number;
  /** Reading unplugged blocks takes pages of the host. */
  readonly readsCost: boolean;
  /** Its NUMA node in the guest, as ACPI's tables have it; left out: the machine has none. */
  readonly node?: number | undefined;
}

export function memDescription({ start, size, blockSize, requested, readsCost, node }: MemSetup): VirtioDescription {
  const config = new Uint8Array(CONFIG.bytes);
  const view = new DataView(config.buffer);
  const set = (at: number, value: number) => view.setBigUint64(at, BigInt(value), true);
  set(CONFIG.blockSize, blockSize);
  set(CONFIG.address, start);
  set(CONFIG.regionSize, size);
  set(CONFIG.usableSize, size);
  set(CONFIG.requestedSize, requested);
  if (node !== undefined) view.setUint16(CONFIG.node, node, true);
  return {
    type: VirtioType.Mem,
    // RAM, as a memory controller has it.
    classCode: 0x050000,
    features: [
      ...(node === undefined ? [] : [MemFeature.acpiPxm]),
      ...(readsCost ? [MemFeature.unpluggedInaccessible] : []),
    ],
    queueSizes: [128],
    config,
    writable: [],
    counters: Object.keys(MemCounter),
  };
}

/** Where the bits of {@link pluggedBlocks} begin. Bytes. */
const BITS_AT = 4;

/** A bit for each block, and all are clear: 64 KiB for 1 TiB in blocks of 2 MiB. */
export function pluggedBlocks({ size, blockSize }: Pick<MemSetup, 'size' | 'blockSize'>): StateBlock {
  return new StateBlock(stateLayout('virtio-mem-plugged', 1, { blocks: Math.ceil(size / blockSize / 32) }));
}

/** What the device makes of its state that was loaded. @param plugged as it was loaded, too */
export function memRestored({ size, blockSize }: MemSetup, plugged: StateBlock): (device: RestoredDevice) => void {
  return ({ config }) => {
    const count = countBits(new Uint8Array(plugged.buffer, BITS_AT), 0, size / blockSize);
    const view = new DataView(config.buffer, config.byteOffset);
    view.setBigUint64(CONFIG.pluggedSize, BigInt(count * blockSize), true);
  };
}

function countBits(bits: Uint8Array, first: number, count: number): number {
  let sum = 0;
  for (let bit = first; bit < first + count; bit++) sum += (bits[bit >>> 3] >>> (bit & 7)) & 1;
  return sum;
}

export interface MemOptions {
  /** Of {@link pluggedBlocks}. A reset of the device changes nothing in it (5.15.5.2). */
  readonly plugged: SharedArrayBuffer;
  /** Guest physical address and bytes, whole blocks. @throws Error where the host refuses */
  readonly discard: (address: number, length: number) => void;
  /** Has the pages of blocks there before the guest touches them; left out: they come then. @throws Error as above */
  readonly populate?: ((address: number, length: number) => void) | undefined;
}

export class MemDevice implements VirtioDevice {
  #queue: DeviceQueue | undefined;
  #broken = false;
  readonly #answerChain = ({ chain }: VirtQueue) => this.#take(chain);
  readonly #again: Timer;
  readonly #config: DataView;
  readonly #plugged: Uint8Array;
  readonly #start: number;
  readonly #size: number;
  readonly #blockSize: number;
  readonly #request = new Uint8Array(REQUEST.bytes);
  readonly #requestView = new DataView(this.#request.buffer);
  readonly #response = new Uint8Array(RESPONSE.bytes);
  readonly #responseView = new DataView(this.#response.buffer);

  constructor(
    private readonly context: DeviceContext,
    private readonly options: MemOptions,
  ) {
    const { buffer, byteOffset } = context.config;
    this.#config = new DataView(buffer, byteOffset, CONFIG.bytes);
    this.#plugged = new Uint8Array(options.plugged, BITS_AT);
    this.#start = this.#read(CONFIG.address);
    this.#size = this.#read(CONFIG.regionSize);
    this.#blockSize = this.#read(CONFIG.blockSize);
    this.#again = context.loop.timer(() => {
      if (this.#queue !== undefined) this.kick(this.#queue);
    });
    // In a machine that was restored nobody has heard of it.
    if (this.#read(CONFIG.pluggedSize) > 0) this.#tell();
  }

  #read(at: number): number {
    return Number(this.#config.getBigUint64(at, true));
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
  #take(chain: Chain): number {
    const { counters } = this.context;
    const whole = chain.read(0, this.#request, 0, REQUEST.bytes) === REQUEST.bytes;
    // Without room for the answer nothing is done: its driver could not know.
    if (chain.writableBytes < RESPONSE.bytes) {
      counters[MemCounter.malformed]++;
      return 0;
    }
    this.#responseView.setUint16(RESPONSE.state, 0, true);
    let type: number = MemResponse.error;
    if (whole) type = this.#answer();
    else counters[MemCounter.malformed]++;
    this.#responseView.setUint16(RESPONSE.type, type, true);
    return chain.write(0, this.#response, 0, RESPONSE.bytes);
  }

  #answer(): number {
    const view = this.#requestView;
    const type = view.getUint16(REQUEST.type, true);
    if (type === MemRequest.unplugAll) return this.#unplugAll();
    // Exact below 2^53, and what is above is outside the region in any case.
    const address = view.getUint32(REQUEST.address, true) + view.getUint32(REQUEST.address + 4, true) * 2 ** 32;
    const first = (address - this.#start) / this.#blockSize;
    const count = view.getUint16(REQUEST.blocks, true);
    const there = Number.isInteger(first) && first >= 0 && count > 0 && first + count <= this.#size / this.#blockSize;
    if (!there) return this.#refuse(MemResponse.error);
    switch (type) {
      case MemRequest.plug:
        return this.#plug(first, count);
      case MemRequest.unplug:
        return this.#unplug(first, count);
      case MemRequest.state: {
        const plugged = this.#count(first, count);
        const { unplugged, mixed } = BlockState;
        const state = plugged === count ? BlockState.plugged : plugged === 0 ? unplugged : mixed;
        this.#responseView.setUint16(RESPONSE.state, state, true);
        return MemResponse.ack;
      }
      default:
        return this.#refuse(MemResponse.error);
    }
  }

  #refuse(response: number): number {
    this.context.counters[MemCounter.refused]++;
    return response;
  }

  /** Blocks of a range that are plugged. */
  #count(first: number, count: number): number {
    return countBits(this.#plugged, first, count);
  }

  /** 5.15.6.1 */
  #plug(first: number, count: number): number {
    if (this.#count(first, count) > 0) return this.#refuse(MemResponse.error);
    const length = count * this.#blockSize;
    if (this.#read(CONFIG.pluggedSize) + length > this.#read(CONFIG.requestedSize)) {
      return this.#refuse(MemResponse.nack);
    }
    const address = this.#start + first * this.#blockSize;
    const { discard, populate } = this.options;
    if (populate !== undefined && !this.#host('plug', () => populate(address, length))) {
      // Some of it may be there. That it cannot be had is said already.
      this.#host('give back', () => discard(address, length));
      return MemResponse.busy;
    }
    this.#mark(first, count, true);
    this.context.counters[MemCounter.plugged] += count;
    return MemResponse.ack;
  }

  /** 5.15.6.2 */
  #unplug(first: number, count: number): number {
    if (this.#count(first, count) < count) return this.#refuse(MemResponse.error);
    const address = this.#start + first * this.#blockSize;
    const length = count * this.#blockSize;
    if (!this.#host('unplug', () => this.options.discard(address, length))) return MemResponse.busy;
    this.#mark(first, count, false);
    this.context.counters[MemCounter.unplugged] += count;
    return MemResponse.ack;
  }

  /** 5.15.6.3 */
  #unplugAll(): number {
    // Also of blocks that are not plugged: something may have been written there.
    if (!this.#host('unplug', () => this.options.discard(this.#start, this.#size))) return MemResponse.busy;
    this.context.counters[MemCounter.unplugged] += this.#read(CONFIG.pluggedSize) / this.#blockSize;
    this.#plugged.fill(0);
    this.#setPlugged(0);
    return MemResponse.ack;
  }

  #mark(first: number, count: number, plugged: boolean): void {
    for (let block = first; block < first + count; block++) {
      const bit = 1 << (block & 7);
      if (plugged) this.#plugged[block >>> 3] |= bit;
      else this.#plugged[block >>> 3] &= ~bit;
    }
    const change = count * this.#blockSize;
    this.#setPlugged(this.#read(CONFIG.pluggedSize) + (plugged ? change : -change));
  }

  /** Without a notification: the driver knows what it has done (5.15.4.2). */
  #setPlugged(size: number): void {
    this.context.changeConfig(() => this.#config.setBigUint64(CONFIG.pluggedSize, BigInt(size), true), 'untold');
    this.#tell();
  }

  #tell(): void {
    const size = this.#read(CONFIG.pluggedSize);
    this.context.emit({ kind: 'memory-plugged', size, reached: size === this.#read(CONFIG.requestedSize) });
  }

  /** Asks the host for something. @returns whether it did it */
  #host(what: string, call: () => void): boolean {
    try {
      call();
      return true;
    } catch (error) {
      if (this.context.counters[MemCounter.failed]++ === 0)
        this.context.log('warn', `Cannot ${what} memory: ${String(error)}`);
      return false;
    }
  }

  /** `{ kind: 'resize', size }`: bytes that the driver should have plugged, a multiple of the block size within the region. */
  control(message: unknown): void {
    const { kind, size } = message as { kind?: unknown; size?: unknown };
    if (kind !== 'resize' || typeof size !== 'number') return;
    this.context.changeConfig(() => this.#config.setBigUint64(CONFIG.requestedSize, BigInt(size), true));
    this.#tell();
  }

  deactivate(): void {
    this.#queue = undefined;
    this.#again.stop();
  }

  close(): void {
    this.deactivate();
  }
}
