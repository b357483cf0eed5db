/**
 * Virtio over PCI, the driver's view (virtio 1.3, 4.1): the function's capabilities and the registers behind BAR 0.
 *
 * Modern devices only. It runs on the vCPU thread that took the exit, over the device's state block. What an I/O worker has
 * to know (the driver is ready, or resets the device) it finds in the block when its wake-up event is signalled.
 */
import { type AccessSize, filler } from '../devices/bus.js';
import type { VmSignals } from '../hypervisor/hypervisor.js';
import { type BarDescription, type FunctionDescription, type FunctionDevice, PciFunction } from '../pci/function.js';
import { MSIX_ENTRY_BYTES, Msix, NO_VECTOR, type VectorListener } from '../pci/msix.js';
import { StateBlock } from '../state/state-block.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { Feature, featureWords, type VirtioDescription } from './device.js';
import { PACKED_START } from './packed-queue.js';
import { QUEUE_WORDS, QueueWord } from './queue.js';
import {
  configBytes,
  msixPlace,
  Status,
  type TransportLayout,
  transportLayout,
  vectorCount,
} from './transport-state.js';

const VIRTIO_VENDOR = 0x1af4;
/** 4.1.2.1: 0x1040 plus the device type. */
const MODERN_DEVICE = 0x1040;
/** A modern device's revision is 1 or more (4.1.2.1). */
const REVISION = 1;

/** Regions of BAR 0. A page each, so that one could be mapped apart from the others. */
const BAR = 0;
const COMMON_AT = 0x0000;
const ISR_AT = 0x1000;
const DEVICE_AT = 0x2000;
const NOTIFY_AT = 0x3000;
const MSIX_TABLE_AT = 0x8000;
const MSIX_PENDING_AT = 0xc000;
const BAR_SIZE = 0x1_0000;
const REGION_SIZE = 0x1000;
/** Room for 1024 queues, and for as many vectors: more than the configuration allows. */
const NOTIFY_BYTES = 4;
const COMMON_BYTES = 0x40;

/** 4.1.4: cfg_type. */
const CAP_COMMON = 1;
const CAP_NOTIFY = 2;
const CAP_ISR = 3;
const CAP_DEVICE = 4;
const CAP_PCI = 5;
const CAP_VENDOR = 0x09;
const CAP_MSIX = 0x11;

/** Places in configuration space. */
const MSIX_CAP_AT = 0x40;
const PCI_CAP_AT = 0x94;

const ISR_CONFIG = 2;

/** Offsets of common configuration: 4.1.4.3. */
const Common = {
  deviceFeatureSelect: 0x00,
  deviceFeature: 0x04,
  driverFeatureSelect: 0x08,
  driverFeature: 0x0c,
  configVector: 0x10,
  queueCount: 0x12,
  status: 0x14,
  generation: 0x15,
  queueSelect: 0x16,
  queueSize: 0x18,
  queueVector: 0x1a,
  queueEnable: 0x1c,
  queueNotifyOffset: 0x1e,
  queueDescriptors: 0x20,
  queueDriver: 0x28,
  queueDevice: 0x30,
} as const;

/** What a thread needs to build its view of a device. Structured-cloneable. */
export interface VirtioPciHandle {
  readonly id: string;
  readonly segment: number;
  readonly slot: number;
  readonly description: VirtioDescription;
  /** Feature words offered, those of the transport included. */
  readonly offered: readonly [number, number];
  readonly state: SharedArrayBuffer;
  /** An eventfd for each queue. */
  readonly doorbells: readonly number[];
  /** Wake-up events of the workers that serve its queues. */
  readonly workers: readonly number[];
  readonly wideBar: boolean;
  /** For queues whose interrupts the host's kernel raises. */
  readonly kernelInterrupts: readonly KernelInterrupt[];
}

/** An event of the host's kernel that raises a queue's vector, through a route of the hypervisor. */
export interface KernelInterrupt {
  readonly queue: number;
  readonly route: number;
  readonly eventfd: number;
}

/**
 * Feature words that the transport offers along with a device's own.
 *
 * @param limit what those who serve the queues elsewhere can do; none: everything
 */
export function offeredFeatures(
  description: VirtioDescription,
  accessPlatform: boolean,
  limit?: readonly [number, number],
): [number, number] {
  const { indirect, eventIndex, version1, packed } = Feature;
  const all = [indirect, eventIndex, version1, packed, ...(accessPlatform ? [Feature.accessPlatform] : [])];
  const [low, high] = featureWords([...description.features, ...all]);
  if (limit === undefined) return [low, high];
  const transport = featureWords([...all]);
  // Of the transport's features only those of the limit; the device's own are not its business.
  return [low & (~transport[0] | limit[0]), high & (~transport[1] | limit[1])];
}

export function virtioBar(wide: boolean): BarDescription {
  return { index: BAR, size: BAR_SIZE, wide };
}

function capabilities(queues: number, deviceBytes: number): Uint8Array {
  const list = new Uint8Array(0xc0);
  const view = new DataView(list.buffer);
  const at = (address: number) => address - MSIX_CAP_AT;
  list[at(MSIX_CAP_AT)] = CAP_MSIX;
  list[at(MSIX_CAP_AT) + 1] = 0x4c;
  view.setUint16(at(MSIX_CAP_AT) + 2, vectorCount(queues) - 1, true);
  view.setUint32(at(MSIX_CAP_AT) + 4, MSIX_TABLE_AT | BAR, true);
  view.setUint32(at(MSIX_CAP_AT) + 8, MSIX_PENDING_AT | BAR, true);
  const vendor = (address: number, next: number, length: number, type: number, offset: number, bytes: number) => {
    const start = at(address);
    list.set([CAP_VENDOR, next, length, type, BAR], start);
    view.setUint32(start + 8, offset, true);
    view.setUint32(start + 12, bytes, true);
  };
  vendor(0x4c, 0x5c, 16, CAP_COMMON, COMMON_AT, COMMON_BYTES);
  vendor(0x5c, 0x70, 20, CAP_NOTIFY, NOTIFY_AT, Math.max(queues, 1) * NOTIFY_BYTES);
  view.setUint32(at(0x5c) + 16, NOTIFY_BYTES, true); // notify_off_multiplier
  vendor(0x70, 0x80, 16, CAP_ISR, ISR_AT, 1);
  vendor(0x80, PCI_CAP_AT, 16, CAP_DEVICE, DEVICE_AT, Math.max(deviceBytes, 4));
  vendor(PCI_CAP_AT, 0, 20, CAP_PCI, 0, 0);
  return list;
}

export class VirtioPciDevice implements FunctionDevice {
  readonly pci: PciFunction;
  readonly msix: Msix;
  readonly #state: StateBlock;
  readonly #words: Int32Array;
  readonly #at: TransportLayout['at'];
  readonly #config: Uint8Array;
  readonly #bar: BarDescription;
  readonly #queues: number;
  readonly #kernelVectors?: KernelVectors;

  constructor(
    readonly handle: VirtioPciHandle,
    private readonly kernel: HostKernel,
    private readonly signals: VmSignals,
  ) {
    const { description } = handle;
    this.#queues = description.queueSizes.length;
    const layout = transportLayout(handle.id, this.#queues, description.config.length);
    this.#state = new StateBlock(layout, handle.state);
    this.#words = this.#state.words;
    this.#at = layout.at;
    this.#config = configBytes(this.#state, description.config.length);
    this.#bar = virtioBar(handle.wideBar);
    this.msix = new Msix(this.#state, msixPlace(layout, this.#queues), signals, requester(handle));
    if (handle.kernelInterrupts.length > 0) {
      this.#kernelVectors = new KernelVectors(handle, this.#words, this.#at, this.msix, signals);
      this.msix.listener = this.#kernelVectors;
    }
    const header: FunctionDescription = {
      vendor: VIRTIO_VENDOR,
      device: MODERN_DEVICE + description.type,
      subsystemVendor: VIRTIO_VENDOR,
      subsystem: MODERN_DEVICE + description.type,
      revision: REVISION,
      classCode: description.classCode,
      bars: [this.#bar],
      capabilities: capabilities(this.#queues, description.config.length),
    };
    this.pci = new PciFunction(this.#state, this.#at.function, header, this);
  }

  /** Power-on: what is not zero. @param barAddress where BAR 0 is to be found at first */
  static powerOn(handle: VirtioPciHandle, barAddress: number, kernel: HostKernel, signals: VmSignals): void {
    const device = new VirtioPciDevice(handle, kernel, signals);
    PciFunction.placeBar(device.#words, device.#at.function, device.#bar, barAddress);
    device.msix.powerOn();
    device.#config.set(handle.description.config);
    resetTransport(device.#words, device.#at, handle.description);
  }

  /** Another address, or none: the doorbells follow. Under the block's lock. */
  decodingChanged(): void {
    const { doorbells } = this.handle;
    const address = this.pci.decoding ? this.pci.barAddress(this.#bar) + NOTIFY_AT : 0;
    const place = this.#at.doorbells;
    const before = (this.#words[place] >>> 0) + (this.#words[place + 1] >>> 0) * 2 ** 32;
    if (address === before) return;
    doorbells.forEach((eventfd, queue) => {
      try {
        if (before !== 0) this.signals.removeDoorbell(before + queue * NOTIFY_BYTES, eventfd);
        if (address !== 0) this.signals.addDoorbell(address + queue * NOTIFY_BYTES, eventfd);
      } catch {
        // Two BARs at one address: the guest's own doing. Its kicks then come as exits.
      }
    });
    this.#words[place] = address % 2 ** 32;
    this.#words[place + 1] = Math.floor(address / 2 ** 32);
  }

  readCapability(register: number): number | undefined {
    if (register === MSIX_CAP_AT) return ((this.msix.readControl() << 16) | (0x4c << 8) | CAP_MSIX) >>> 0;
    const access = this.#at.configAccess;
    switch (register - PCI_CAP_AT) {
      case 4:
        return this.#words[access] & 0xff;
      case 8:
        return this.#words[access + 1] >>> 0;
      case 12:
        return this.#words[access + 2] >>> 0;
      case 16: {
        const size = this.#accessSize();
        return size === undefined ? 0 : this.readBar(BAR, this.#words[access + 1] >>> 0, size);
      }
      default:
        return undefined;
    }
  }

  writeCapability(register: number, value: number, mask: number): void {
    if (register === MSIX_CAP_AT) {
      const control = (this.msix.readControl() << 16) >>> 0;
      this.msix.writeControl(((control & ~mask) | (value & mask)) >>> 16);
      return;
    }
    const access = this.#at.configAccess;
    const set = (word: number) => {
      this.#words[word] = (this.#words[word] & ~mask) | (value & mask);
    };
    switch (register - PCI_CAP_AT) {
      case 4: {
        set(access);
        return;
      }
      case 8: {
        set(access + 1);
        return;
      }
      case 12: {
        set(access + 2);
        return;
      }
      case 16: {
        const size = this.#accessSize();
        if (size !== undefined) this.#write(this.#words[access + 1] >>> 0, size, (value & filler(size)) >>> 0);
      }
    }
  }

  /** 4.1.4.9.1: the access is of cap.length bytes at a multiple of it, in a BAR that exists. */
  #accessSize(): AccessSize | undefined {
    const access = this.#at.configAccess;
    const [bar, offset, length] = [this.#words[access] & 0xff, this.#words[access + 1] >>> 0, this.#words[access + 2]];
    if (bar !== BAR || (length !== 1 && length !== 2 && length !== 4)) return undefined;
    return offset % length === 0 && offset + length <= BAR_SIZE ? length : undefined;
  }

  readBar(_bar: number, offset: number, size: AccessSize): number {
    const within = offset % REGION_SIZE;
    switch (offset - within) {
      case COMMON_AT:
        return this.#readCommon(within, size);
      case ISR_AT:
        return within === 0 ? Atomics.exchange(this.#words, this.#at.isr, 0) & filler(size) : 0;
      case DEVICE_AT:
        return this.#readDevice(within, size);
      case NOTIFY_AT:
        return 0;
    }
    if (offset >= MSIX_PENDING_AT) return this.msix.readPending(offset - MSIX_PENDING_AT, size);
    if (offset >= MSIX_TABLE_AT) return this.msix.readTable(offset - MSIX_TABLE_AT, size);
    return filler(size);
  }

  writeBar(_bar: number, offset: number, size: AccessSize, value: number): void {
    // Kicks that found no doorbell; no lock, as they change nothing here.
    if (offset >= NOTIFY_AT && offset < NOTIFY_AT + REGION_SIZE) {
      this.#kick(Math.floor((offset - NOTIFY_AT) / NOTIFY_BYTES));
      return;
    }
    this.#state.lock();
    try {
      this.#write(offset, size, value);
    } finally {
      this.#state.unlock();
    }
  }

  /** Under the block's lock. */
  #write(offset: number, size: AccessSize, value: number): void {
    const within = offset % REGION_SIZE;
    if (offset < REGION_SIZE) this.#writeCommon(within, size, value);
    else if (offset - within === DEVICE_AT) this.#writeDevice(within, size, value);
    else if (offset - within === NOTIFY_AT) this.#kick(Math.floor(within / NOTIFY_BYTES));
    else if (offset >= MSIX_TABLE_AT && offset < MSIX_TABLE_AT + vectorCount(this.#queues) * MSIX_ENTRY_BYTES) {
      this.msix.writeTable(offset - MSIX_TABLE_AT, size, value);
    }
  }

  #kick(queue: number): void {
    if (queue >= this.#queues) return;
    Atomics.add(this.#words, this.#at.queues + queue * QUEUE_WORDS + QueueWord.kickExits, 1);
    this.kernel.signal(this.handle.doorbells[queue]);
  }

  /** The selected queue's words; -1: there is no such queue. */
  #selected(): number {
    const queue = this.#words[this.#at.queueSelect];
    return queue < this.#queues ? this.#at.queues + queue * QUEUE_WORDS : -1;
  }

  #readCommon(offset: number, size: AccessSize): number {
    const words = this.#words;
    const at = this.#at;
    const queue = this.#selected();
    const ofQueue = (word: number) => (queue < 0 ? 0 : words[queue + word] >>> 0);
    switch (offset) {
      case Common.deviceFeatureSelect:
        return words[at.featureSelect] >>> 0;
      case Common.deviceFeature:
        return (this.handle.offered[words[at.featureSelect]] ?? 0) >>> 0;
      case Common.driverFeatureSelect:
        return words[at.driverFeatureSelect] >>> 0;
      case Common.driverFeature: {
        const select = words[at.driverFeatureSelect];
        return select === 0 || select === 1 ? words[at.driverFeatures + select] >>> 0 : 0;
      }
      case Common.configVector:
        return words[at.configVector];
      case Common.queueCount:
        return this.#queues;
      case Common.status:
        return Atomics.load(words, at.status) & filler(size);
      case Common.generation:
        return words[at.generation] & 0xff;
      case Common.queueSelect:
        return words[at.queueSelect];
      case Common.queueSize:
        return ofQueue(QueueWord.size);
      case Common.queueVector:
        return queue < 0 ? NO_VECTOR : words[queue + QueueWord.vector];
      case Common.queueEnable:
        return ofQueue(QueueWord.enabled);
      case Common.queueNotifyOffset:
        return queue < 0 ? 0 : words[at.queueSelect];
    }
    if (offset >= Common.queueDescriptors && offset < Common.queueDevice + 8 && size === 4) {
      return ofQueue(QueueWord.descriptorLow + ((offset - Common.queueDescriptors) >> 2));
    }
    return offset < COMMON_BYTES ? 0 : filler(size);
  }

  #writeCommon(offset: number, size: AccessSize, value: number): void {
    const words = this.#words;
    const at = this.#at;
    const queue = this.#selected();
    // 3.1.1: features before FEATURES_OK, queues before they are enabled.
    const negotiating = (words[at.status] & Status.featuresOk) === 0;
    const configurable = queue >= 0 && words[queue + QueueWord.enabled] === 0;
    switch (offset) {
      case Common.deviceFeatureSelect:
        words[at.featureSelect] = value;
        return;
      case Common.driverFeatureSelect:
        words[at.driverFeatureSelect] = value;
        return;
      case Common.driverFeature: {
        const select = words[at.driverFeatureSelect];
        if (negotiating && (select === 0 || select === 1)) words[at.driverFeatures + select] = value;
        return;
      }
      case Common.configVector:
        words[at.configVector] = this.#vector(value);
        return;
      case Common.status:
        this.#writeStatus(value & 0xff);
        return;
      case Common.queueSelect:
        words[at.queueSelect] = value & 0xffff;
        return;
      case Common.queueSize:
        if (configurable && value > 0 && value <= this.handle.description.queueSizes[words[at.queueSelect]]) {
          words[queue + QueueWord.size] = value;
        }
        return;
      case Common.queueVector:
        if (queue >= 0) words[queue + QueueWord.vector] = this.#vector(value);
        this.#kernelVectors?.queueChanged();
        return;
      case Common.queueEnable:
        if (configurable && value === 1) words[queue + QueueWord.enabled] = 1;
        return;
    }
    if (offset >= Common.queueDescriptors && offset < Common.queueDevice + 8 && size === 4 && configurable) {
      words[queue + QueueWord.descriptorLow + ((offset - Common.queueDescriptors) >> 2)] = value;
    }
  }

  /** 4.1.5.1.2.1: a vector that cannot be had reads back as none. */
  #vector(value: number): number {
    return value < vectorCount(this.#queues) ? value : NO_VECTOR;
  }

  #writeStatus(value: number): void {
    const words = this.#words;
    const { status, driverFeatures } = this.#at;
    if (words[this.#at.resetting] !== 0) return;
    if (value === 0) {
      this.#reset();
      return;
    }
    let next = value & (Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk | Status.failed);
    next |= words[status] & Status.needsReset;
    if ((next & Status.featuresOk) !== 0 && (words[status] & Status.featuresOk) === 0) {
      const [low, high] = this.handle.offered;
      const [wantedLow, wantedHigh] = [words[driverFeatures], words[driverFeatures + 1]];
      const version1 = (wantedHigh & (1 << (Feature.version1 - 32))) !== 0;
      // 2.2.2: a set that the device cannot do leaves the bit clear.
      if ((wantedLow & ~low) !== 0 || (wantedHigh & ~high) !== 0 || !version1) next &= ~Status.featuresOk;
    }
    // 3.1.1: no DRIVER_OK without FEATURES_OK.
    if ((next & Status.featuresOk) === 0) next &= ~Status.driverOk;
    const starts = (next & Status.driverOk) !== 0 && (words[status] & Status.driverOk) === 0;
    if (starts) this.#startQueues();
    Atomics.store(words, status, next);
    if (starts) this.#wake();
  }

  #startQueues(): void {
    const words = this.#words;
    const packed = (words[this.#at.driverFeatures + 1] & (1 << (Feature.packed - 32))) !== 0;
    for (let queue = 0; queue < this.#queues; queue++) {
      const at = this.#at.queues + queue * QUEUE_WORDS;
      words[at + QueueWord.available] = packed ? PACKED_START : 0;
      words[at + QueueWord.used] = packed ? PACKED_START : 0;
      words[at + QueueWord.unsignalled] = 0;
    }
  }

  /** 2.4.1: the driver reads 0 from the status once the device has let go of its queues. */
  #reset(): void {
    const words = this.#words;
    const active = (words[this.#at.status] & Status.driverOk) !== 0 && this.handle.workers.length > 0;
    if (!active) {
      resetTransport(words, this.#at, this.handle.description);
      this.#kernelVectors?.queueChanged();
      return;
    }
    Atomics.store(words, this.#at.resetting, this.handle.workers.length);
    Atomics.add(words, this.#at.resets, 1);
    this.#wake();
  }

  #wake(): void {
    for (const worker of this.handle.workers) this.kernel.signal(worker);
  }

  #readDevice(offset: number, size: AccessSize): number {
    let value = 0;
    for (let byte = size - 1; byte >= 0; byte--) value = value * 256 + (this.#config[offset + byte] ?? 0);
    return value;
  }

  #writeDevice(offset: number, size: AccessSize, value: number): void {
    let written = false;
    for (let byte = 0; byte < size; byte++) {
      const at = offset + byte;
      if (!this.handle.description.writable.some(([from, end]) => at >= from && at < end)) continue;
      this.#config[at] = value >>> (byte * 8);
      written = true;
    }
    if (!written) return;
    Atomics.add(this.#words, this.#at.configWrites, 1);
    this.#wake();
  }
}

/** The device as a reset leaves it (2.4); the PCI function and its vectors stay as they are. */
export function resetTransport(words: Int32Array, at: TransportLayout['at'], description: VirtioDescription): void {
  words[at.featureSelect] = 0;
  words[at.driverFeatureSelect] = 0;
  words[at.driverFeatures] = 0;
  words[at.driverFeatures + 1] = 0;
  words[at.configVector] = NO_VECTOR;
  words[at.queueSelect] = 0;
  words[at.isr] = 0;
  description.queueSizes.forEach((size, queue) => {
    const first = at.queues + queue * QUEUE_WORDS;
    // The counters that follow are not the driver's.
    words.fill(0, first, first + QueueWord.requests);
    words[first + QueueWord.size] = size;
    words[first + QueueWord.vector] = NO_VECTOR;
  });
  Atomics.store(words, at.status, 0);
}

/** Tells the driver that the configuration changed (4.1.5.4). Any thread. */
export function announceConfig(words: Int32Array, at: TransportLayout['at'], msix: Msix): void {
  Atomics.add(words, at.generation, 1);
  if (!msix.enabled) Atomics.or(words, at.isr, ISR_CONFIG);
  msix.raise(words[at.configVector]);
}

export function requester({ segment, slot }: VirtioPciHandle): number {
  return (segment << 16) | (slot << 3);
}

/** Keeps the kernel's own interrupts in step with what the guest makes of their vectors. Under the block's lock. */
class KernelVectors implements VectorListener {
  constructor(
    private readonly handle: VirtioPciHandle,
    private readonly words: Int32Array,
    private readonly at: TransportLayout['at'],
    private readonly msix: Msix,
    private readonly signals: VmSignals,
  ) {}

  vectorChanged(vector: number): void {
    for (const interrupt of this.handle.kernelInterrupts) {
      if (this.words[this.#queue(interrupt) + QueueWord.vector] === vector) this.#refresh(interrupt);
    }
  }

  /** The queue has another vector. */
  queueChanged(): void {
    for (const interrupt of this.handle.kernelInterrupts) this.#refresh(interrupt);
  }

  #queue({ queue }: KernelInterrupt): number {
    return this.at.queues + queue * QUEUE_WORDS;
  }

  #refresh(interrupt: KernelInterrupt): void {
    const { route, eventfd, queue } = interrupt;
    const message = this.msix.message(this.words[this.#queue(interrupt) + QueueWord.vector]);
    const word = this.at.connected + (queue >> 5);
    const bit = 1 << (queue & 31);
    const connected = (this.words[word] & bit) !== 0;
    if (message !== undefined) {
      this.signals.setMsiRoute(route, message.low, message.high, message.data, requester(this.handle));
    }
    if (connected === (message !== undefined)) return;
    // An eventfd that nothing is connected to keeps its count: that is the vector's pending bit.
    if (message === undefined) this.signals.disconnectMsi(route, eventfd);
    else this.signals.connectMsi(route, eventfd);
    this.words[word] ^= bit;
  }
}
