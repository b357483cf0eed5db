/**
 * Virtio over PCI, the driver's view (virtio 1.3, 4.1): the function's capabilities and the registers behind BAR 0.
 *
 * Modern devices only. It runs on the vCPU thread that took the exit, over the device's state block. What an I/O worker has
 * to know (the driver is ready, or resets the device) it finds in the block when its wake-up event is signalled.
 */
import { type AccessSize, filler } from '../../devices/bus.js';
import type { VmSignals } from '../../hypervisor/hypervisor.js';
import { type BarDescription, type FunctionDescription, type FunctionDevice, PciFunction } from '../../pci/function.js';
import type { IntxLines } from '../../pci/intx.js';
import { MSIX_ENTRY_BYTES, type Msix } from '../../pci/msix.js';
import { StateBlock } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { RestoredDevice } from '../device.js';
import { CommonConfig } from './common-config.js';
import { Interrupts } from './interrupts.js';
import type { VirtioPciHandle } from './pci-handle.js';
import {
  BAR,
  BAR_SIZE,
  CAP_MSIX,
  capabilities,
  COMMON_AT,
  DEVICE_AT,
  ISR_AT,
  MSIX_CAP_AT,
  MSIX_PENDING_AT,
  MSIX_TABLE_AT,
  NOTIFY_AT,
  NOTIFY_BYTES,
  PCI_CAP_AT,
  REGION_SIZE,
  virtioBar,
} from './pci-registers.js';
import { QUEUE_WORDS, QueueCounter, queueCounters } from '../queue/queue.js';
import { Mastering, ResetProtocol } from './reset-protocol.js';
import { checkRestored, renewConfig } from './restored.js';
import { configBytes, resetTransport, type TransportLayout, transportLayout, vectorCount } from './transport-state.js';

const VIRTIO_VENDOR = 0x1af4;
/** 4.1.2.1: 0x1040 plus the device type. */
const MODERN_DEVICE = 0x1040;
/** A modern device's revision is 1 or more (4.1.2.1). */
const REVISION = 1;

/**
 * Milliseconds that a register write waits for the workers to let go of an earlier driver's queues, which takes as long as what
 * is in flight. Then the write is dropped, and those after it until they have: the driver has not waited for the end of its reset
 * (2.4.2), and sees that its features are not agreed. So long does a vCPU not hear of the machine's end, either.
 */
const PATIENCE = 2000;

export class VirtioPciDevice implements FunctionDevice {
  readonly pci: PciFunction;
  readonly msix: Msix;
  readonly #state: StateBlock<keyof TransportLayout['at']>;
  readonly #words: Int32Array;
  readonly #at: TransportLayout['at'];
  readonly #config: Uint8Array;
  readonly #bar: BarDescription;
  readonly #queues: number;
  readonly #common: CommonConfig;
  readonly #interrupts: Interrupts;
  readonly #protocol: ResetProtocol;
  /** By queue. */
  readonly #counters: readonly Float64Array[];

  /** @param driverCame called once, on the thread on which a driver does the first thing for which workers are woken */
  constructor(
    readonly handle: VirtioPciHandle,
    private readonly kernel: HostKernel,
    private readonly signals: VmSignals,
    lines: IntxLines,
    private readonly driverCame: () => void = () => undefined,
  ) {
    const { description } = handle;
    this.#queues = description.queueSizes.length;
    const layout = transportLayout(description);
    this.#state = new StateBlock(layout, handle.state);
    this.#words = this.#state.words;
    this.#at = layout.at;
    this.#config = configBytes(this.#state, description.config.length);
    this.#bar = virtioBar(handle.wideBar);
    this.#interrupts = new Interrupts(handle, this.#state, layout, kernel, signals, lines);
    this.msix = this.#interrupts.msix;
    this.#counters = description.queueSizes.map((_, queue) =>
      queueCounters(this.#words, this.#at.queues + queue * QUEUE_WORDS),
    );
    this.#protocol = new ResetProtocol(this.#words, this.#at, handle.workers.length, () => {
      resetTransport(this.#words, this.#at, description);
      this.#interrupts.reset();
    });
    this.#common = new CommonConfig(handle, this.#interrupts, this.#protocol, this.#words, this.#at);
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
  static powerOn(
    handle: VirtioPciHandle,
    barAddress: number,
    kernel: HostKernel,
    signals: VmSignals,
    lines: IntxLines,
  ): VirtioPciDevice {
    const device = new VirtioPciDevice(handle, kernel, signals, lines);
    PciFunction.placeBar(device.#words, device.#at.function, device.#bar, barAddress);
    PciFunction.setInterruptLine(device.#words, device.#at.function, handle.interruptLine);
    device.msix.powerOn();
    device.#config.set(handle.description.config);
    resetTransport(device.#words, device.#at, handle.description);
    return device;
  }

  /** The function is gone, and no worker has its queues: nothing of it is left at the hypervisor. */
  powerOff(): void {
    this.#state.lock();
    resetTransport(this.#words, this.#at, this.handle.description);
    this.#interrupts.reset();
    this.pci.powerOff();
    this.#placeDoorbells();
    this.#state.unlock();
  }

  /** The machine is paused: its state is complete now, and stays so. */
  paused(): void {
    this.#state.lock();
    this.#interrupts.collectPending();
    this.#state.unlock();
  }

  /** What is saved of it. After `paused`. */
  get state(): StateBlock {
    return this.#state;
  }

  /**
   * Its state has been loaded into a machine that has not been started: everything outside the block becomes what the driver's writes
   * would have made it. After the records of vCPUs and VM have been set, as interrupts may be raised.
   *
   * @param adapt what the device changes of itself
   * @throws StateError when the driver has agreed to what this machine's device is not
   */
  restored(adapt?: (device: RestoredDevice) => void): void {
    const { doorbells, kernelInterrupts } = this.handle;
    checkRestored(this.#state, this.handle);
    this.#state.lock();
    this.pci.restored();
    const changed = renewConfig(this.#state, this.handle, adapt);
    this.#protocol.restored();
    this.#placeDoorbells();
    this.#interrupts.restored();
    const works = (this.#words[this.#at.session] & 1) !== 0;
    this.#state.unlock();
    if (changed) this.#interrupts.config();
    if (!works) return;
    // What either side had told the other is told again: once too often does no harm.
    for (const { queue, eventfd } of kernelInterrupts) {
      this.kernel.signal(doorbells[queue]);
      this.kernel.signal(eventfd);
    }
    this.#wake();
  }

  get interruptStatus(): boolean {
    return this.#interrupts.intx.pending;
  }

  /** Under the block's lock. */
  interruptMaskChanged(): void {
    this.#interrupts.intx.update();
  }

  /** Under the block's lock. */
  decodingChanged(): void {
    this.#placeDoorbells();
  }

  /**
   * The doorbells are where BAR 0 is. While the driver has stopped the device they are nowhere, so that its first kick after that
   * is an exit. Under the block's lock.
   */
  #placeDoorbells(): void {
    const { doorbells } = this.handle;
    const { doorbells: place, heard, mastering } = this.#at;
    const words = this.#words;
    const bar = this.pci.barAddress(this.#bar);
    // Where a driver sizes the BAR with decoding on, it is at the end of the address space: no processor reaches it.
    const reachable =
      this.pci.decoding && words[mastering] === Mastering.on && bar + BAR_SIZE <= Number.MAX_SAFE_INTEGER;
    const address = reachable ? bar + NOTIFY_AT : 0;
    const before = (words[place] >>> 0) + (words[place + 1] >>> 0) * 2 ** 32;
    if (address === before) return;
    doorbells.forEach((eventfd, queue) => {
      const word = heard + (queue >> 5);
      const bit = 1 << (queue & 31);
      if ((words[word] & bit) !== 0) this.signals.removeDoorbell(before + queue * NOTIFY_BYTES, eventfd);
      words[word] &= ~bit;
      if (address === 0) return;
      try {
        this.signals.addDoorbell(address + queue * NOTIFY_BYTES, eventfd);
        words[word] |= bit;
      } catch {
        // Two BARs at one address: the guest's own doing. Its kicks then come as exits.
      }
    });
    words[place] = address % 2 ** 32;
    words[place + 1] = Math.floor(address / 2 ** 32);
  }

  /** Under the block's lock. */
  masteringChanged(on: boolean): void {
    // Whoever starts anew has disabled MSI-X, as every operating system does when it finds a function.
    this.#change(() => this.#protocol.setMastering(on, this.msix.enabled));
  }

  /** A step of the protocol that may start or stop the device: vectors, doorbells and workers follow. Under the block's lock. */
  #change(step: () => void): void {
    const { mastering, session, resets } = this.#at;
    const words = this.#words;
    const [wasMastering, wasSession, wasReset] = [words[mastering], words[session], words[resets]];
    step();
    if (words[mastering] !== wasMastering) {
      this.msix.allChanged();
      this.#placeDoorbells();
    }
    if (words[session] !== wasSession || words[resets] !== wasReset) this.#wake();
  }

  #wake(): void {
    for (const worker of this.handle.workers) this.kernel.signal(worker);
    if (Atomics.exchange(this.#words, this.#at.known, 1) === 0) this.driverCame();
  }

  /** Bus mastering is off when the workers touch guest memory no more. */
  commandWritten(): void {
    if (this.#words[this.#at.mastering] !== Mastering.off) return;
    this.#state.lock();
    this.#settle();
    this.#state.unlock();
  }

  /**
   * Waits for the workers to let go of queues that are no longer theirs. Under the block's lock, which is given away meanwhile.
   *
   * @returns false when they have not in time
   */
  #settle(): boolean {
    const end = performance.now() + PATIENCE;
    for (let holder = this.#protocol.awaited(); holder >= 0; holder = this.#protocol.awaited()) {
      const left = end - performance.now();
      if (this.#protocol.impatient || left <= 0) {
        this.#protocol.waitedInVain();
        return false;
      }
      const held = this.#words[holder];
      this.#state.unlock();
      this.park(holder, held, left);
      this.#state.lock();
    }
    return true;
  }

  /** Sleeps until a word is no longer what it was. */
  protected park(word: number, value: number, milliseconds: number): void {
    Atomics.wait(this.#words, word, value, milliseconds);
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
      const before = this.msix.enabled;
      this.msix.writeControl(((control & ~mask) | (value & mask)) >>> 16);
      if (this.msix.enabled === before) return;
      this.#interrupts.intx.update();
      // Interrupts that the host's kernel raises go another way now.
      this.#wake();
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
        return this.#common.read(within, size);
      case ISR_AT:
        return within === 0 ? this.#interrupts.intx.acknowledge() : 0;
      case DEVICE_AT:
        return this.#readDevice(within, size);
      case NOTIFY_AT:
        return 0;
    }
    if (offset >= MSIX_PENDING_AT) {
      this.#state.lock();
      const pending = this.msix.readPending(offset - MSIX_PENDING_AT, size);
      this.#state.unlock();
      return pending;
    }
    if (offset >= MSIX_TABLE_AT) return this.msix.readTable(offset - MSIX_TABLE_AT, size);
    return filler(size);
  }

  writeBar(_bar: number, offset: number, size: AccessSize, value: number): void {
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
    if (offset < REGION_SIZE) {
      if (this.#common.waits(within, value) && !this.#settle()) return;
      this.#change(() => this.#common.write(within, size, value));
    } else if (offset - within === DEVICE_AT) this.#writeDevice(within, size, value);
    else if (offset - within === NOTIFY_AT) this.#kick(Math.floor(within / NOTIFY_BYTES));
    else if (offset >= MSIX_TABLE_AT && offset < MSIX_TABLE_AT + vectorCount(this.#queues) * MSIX_ENTRY_BYTES) {
      this.msix.writeTable(offset - MSIX_TABLE_AT, size, value);
    }
  }

  /** A kick that found no doorbell. */
  #kick(queue: number): void {
    if (queue >= this.#queues) return;
    this.#counters[queue][QueueCounter.kickExits]++;
    if (this.#words[this.#at.mastering] === Mastering.silent) this.#change(() => this.#protocol.kicked());
    this.kernel.signal(this.handle.doorbells[queue]);
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
