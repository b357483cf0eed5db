/** A virtio function as one machine has it: main's view, a vCPU thread's and its worker's, over a hypervisor that notes what it is told. */
import type { VmSignals } from '../../src/hypervisor/hypervisor.js';
import { intxLayout, IntxLines } from '../../src/pci/intx.js';
import { type SavedState, StateBlock } from '../../src/state/state-block.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import type { DeviceContext, RestoredDevice, VirtioDescription, VirtioDevice } from '../../src/virtio/device.js';
import { EpollLoop } from '../../src/virtio/transport/epoll-loop.js';
import { offeredFeatures, type VirtioPciHandle } from '../../src/virtio/transport/pci-handle.js';
import { Common } from '../../src/virtio/transport/pci-registers.js';
import { VirtioPciDevice } from '../../src/virtio/transport/pci-transport.js';
import { VirtioRunner } from '../../src/virtio/transport/runner.js';
import { transportLayout } from '../../src/virtio/transport/transport-state.js';
import type { TestGuest, TestQueue } from './virtio-driver.js';

const kernel = new LinuxKernel();
export const BAR = 0x4000_0000;
export const PINS = [5, 9, 10, 11];

export interface HostOptions {
  readonly guest: TestGuest;
  readonly description: VirtioDescription;
  readonly build: (context: DeviceContext) => VirtioDevice;
  /** Queues that the host's kernel serves, as vhost does. */
  readonly kernelServed?: readonly number[];
}

export class VirtioHost {
  readonly handle: VirtioPciHandle;
  /** By address, and by route: eventfds. */
  readonly doorbells = new Map<number, number>();
  readonly connected = new Map<number, number>();
  readonly levels = new Map<number, boolean>();
  /** The data of each message. */
  readonly messages: number[] = [];
  readonly lines: string[] = [];
  readonly events: unknown[] = [];
  readonly loop = new EpollLoop(kernel);
  readonly main: VirtioPciDevice;
  readonly pci: VirtioPciDevice;
  readonly runner: VirtioRunner;
  readonly intx: IntxLines;

  constructor({ guest, description, build, kernelServed = [] }: HostOptions) {
    const queues = description.queueSizes.map((_, queue) => queue);
    this.handle = {
      ...{ id: '_test0', segment: 0, slot: 3, description, offered: offeredFeatures(description, false) },
      state: new StateBlock(transportLayout(description)).buffer,
      doorbells: queues.map(() => kernel.eventfd()),
      workers: [kernel.eventfd()],
      ...{ wideBar: true, interruptLine: PINS[3] },
      kernelInterrupts: kernelServed.map((queue) => ({ queue, route: 24 + queue, eventfd: kernel.eventfd() })),
    };
    const signals: VmSignals = {
      signalMsi: (_low, _high, data) => void this.messages.push(data),
      addDoorbell: (address, eventfd) => {
        if (this.doorbells.has(address)) throw new Error('EEXIST');
        this.doorbells.set(address, eventfd);
      },
      removeDoorbell: (address) => void this.doorbells.delete(address),
      connectMsi: (route, eventfd) => void this.connected.set(route, eventfd),
      disconnectMsi: (route) => void this.connected.delete(route),
      setMsiRoute: () => undefined,
      clearMsiRoute: () => undefined,
    };
    const lines = new StateBlock(intxLayout);
    const intx = () => new IntxLines(lines, PINS, { setLevel: (pin, high) => void this.levels.set(pin, high) });
    this.intx = intx();
    this.main = VirtioPciDevice.powerOn(this.handle, BAR, kernel, signals, this.intx);
    this.pci = new VirtioPciDevice(this.handle, kernel, signals, intx());
    const services = {
      ...{ kernel, loop: this.loop, wake: this.handle.workers[0], memory: guest.memory, signals, intx: intx() },
      log: (_level: string, line: string) => void this.lines.push(line),
      emit: (_id: string, message: unknown) => void this.events.push(message),
    };
    this.runner = new VirtioRunner(this.handle, queues, services, build);
    this.loop.watch(services.wake, 1, () => {
      kernel.drainEvent(services.wake);
      this.runner.update();
    });
  }

  write(offset: number, size: 1 | 2 | 4, value: number): void {
    this.pci.writeBar(0, offset, size, value);
  }

  read(offset: number, size: 1 | 2 | 4): number {
    return this.pci.readBar(0, offset, size);
  }

  /** A driver takes the device: queue 0 and those behind it. @param features bits beside VERSION_1 */
  drive(queues: readonly TestQueue[], features: readonly number[] = []): void {
    for (const status of [0, 1, 3]) this.write(Common.status, 1, status);
    for (const select of [0, 1]) {
      this.write(Common.driverFeatureSelect, 4, select);
      const bits = [32, ...features].filter((bit) => bit >> 5 === select);
      this.write(Common.driverFeature, 4, bits.reduce((word, bit) => word | (1 << (bit & 31)), 0) >>> 0);
    }
    this.write(Common.status, 1, 11);
    queues.forEach(({ size, descriptors, driverArea, deviceArea }, index) => {
      this.write(Common.queueSelect, 2, index);
      this.write(Common.queueSize, 2, size);
      this.write(Common.queueVector, 2, index + 1);
      [descriptors, driverArea, deviceArea].forEach((address, area) => {
        this.write(Common.queueDescriptors + area * 8, 4, address % 2 ** 32);
        this.write(Common.queueDescriptors + area * 8 + 4, 4, Math.floor(address / 2 ** 32));
      });
      this.write(Common.queueEnable, 2, 1);
    });
    this.write(Common.status, 1, 15);
    this.turn();
  }

  /** The worker serves what there is. */
  turn(): void {
    while (this.loop.turn(0));
  }

  /** What is saved of it. It serves nothing any more. */
  save(): SavedState {
    this.runner.pause();
    this.main.paused();
    return JSON.parse(JSON.stringify(this.main.state.save())) as SavedState;
  }

  /** Becomes what was saved of another. @throws StateError */
  restore(saved: SavedState, adapt?: (device: RestoredDevice) => void): void {
    this.main.state.load(saved);
    this.main.restored(adapt);
    this.intx.restored();
  }

  close(): void {
    this.runner.close();
    this.loop.close();
    const calls = this.handle.kernelInterrupts.map(({ eventfd }) => eventfd);
    for (const fd of [...this.handle.workers, ...this.handle.doorbells, ...calls]) kernel.close(fd);
  }
}
