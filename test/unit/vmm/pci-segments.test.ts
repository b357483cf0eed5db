/** PCI functions that come and go, as each thread sees its own segments. */
import { expect, test } from '@jest/globals';
import { Bus } from '../../../src/devices/bus.js';
import type { VmSignals } from '../../../src/hypervisor/hypervisor.js';
import { IntxLines } from '../../../src/pci/intx.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { VirtioDescription } from '../../../src/virtio/device.js';
import { offeredFeatures, type VirtioPciHandle } from '../../../src/virtio/transport/pci-handle.js';
import { Common } from '../../../src/virtio/transport/pci-registers.js';
import { VirtioPciDevice } from '../../../src/virtio/transport/pci-transport.js';
import { transportLayout } from '../../../src/virtio/transport/transport-state.js';
import { type PciHandle, PciSegments, type PlatformEvent } from '../../../src/vmm/boards/platform-parts.js';

const kernel = new LinuxKernel();
const NOTHING = 0xffff_ffff;
const [DECODING, COMMAND] = [2, 4];
const SEGMENTS = [0, 1].map((index) => ({
  ecam: 0xe000_0000 + index * 0x10_0000,
  mmio32: { start: 0xc000_0000 + index * 0x100_0000, end: 0xc100_0000 + index * 0x100_0000 },
  mmio64: { start: 0x1_0000_0000 * (index + 1), end: 0x1_0000_0000 * (index + 2) },
}));
const signals = {
  addDoorbell: () => undefined,
  removeDoorbell: () => undefined,
  inputs: { setLevel: () => undefined },
} as unknown as VmSignals;

function machine() {
  const intx = IntxLines.powerOn([0, 1, 2, 3], signals);
  const handle: PciHandle = { vm: { fd: -1, routes: new SharedArrayBuffer(4) }, segments: SEGMENTS, virtio: [], intx };
  const events: PlatformEvent[] = [];
  const views = [0, 1].map(() => {
    const memory = new Bus();
    return { memory, segments: new PciSegments(handle, kernel, signals, memory, (event) => events.push(event)) };
  });
  /** @param queues by which the tests tell one device from another */
  const device = (id: string, segment: number, slot: number, bar: number, queues: number): VirtioPciHandle => {
    const description: VirtioDescription = {
      ...{ type: 42, classCode: 0xff0000, features: [], config: Uint8Array.of(1), counters: [], writable: [] },
      queueSizes: new Array<number>(queues).fill(16),
    };
    const made: VirtioPciHandle = {
      ...{ id, segment, slot, description, offered: offeredFeatures(description, false) },
      state: new StateBlock(transportLayout(description)).buffer,
      ...{ doorbells: [], workers: [], wideBar: bar >= 2 ** 32, interruptLine: 0, kernelInterrupts: [] },
    };
    VirtioPciDevice.powerOn(made, bar, kernel, signals, IntxLines.attach(intx, signals));
    return made;
  };
  return { views, device, events };
}
type View = ReturnType<typeof machine>['views'][number];

const config = (segment: number, slot: number, register: number) => SEGMENTS[segment].ecam + (slot << 15) + register;
const present = ({ memory }: View, segment: number, slot: number) =>
  memory.read(config(segment, slot, 0), 4) !== NOTHING;
const queuesAt = ({ memory }: View, bar: number) => memory.read(bar + Common.queueCount, 2);

test.each([
  ['below 4 GiB', 0xc0f0_0000, 0],
  ['above', 0x2_8000_0000, 1],
])('a function answers from when it comes until it goes: its BAR %s', (_where, bar, segment) => {
  const { views, device } = machine();
  const [one, other] = views;
  const plugged = device('first', segment, 7, bar, 1);
  one.segments.apply({ kind: 'plug', device: plugged });
  expect(views.map((view) => present(view, segment, 7))).toEqual([true, false]);
  other.segments.apply({ kind: 'plug', device: plugged });
  expect(queuesAt(one, bar)).toBe(0xffff);
  other.memory.write(config(segment, 7, COMMAND), 2, DECODING);
  expect(views.map((view) => queuesAt(view, bar))).toEqual([1, 1]);

  // The window has found it there before.
  one.segments.apply({ kind: 'unplug', device: 'first' });
  expect([present(one, segment, 7), queuesAt(one, bar)]).toEqual([false, 0xffff]);
  expect([present(other, segment, 7), queuesAt(other, bar)]).toEqual([true, 1]);
  one.memory.write(bar + Common.status, 1, 1);
  expect(other.memory.read(bar + Common.status, 1)).toBe(0);
  other.segments.apply({ kind: 'unplug', device: 'first' });
  expect(present(other, segment, 7)).toBe(false);

  const next = device('second', segment, 7, bar, 2);
  for (const view of views) view.segments.apply({ kind: 'plug', device: next });
  one.memory.write(config(segment, 7, COMMAND), 2, DECODING);
  expect(views.map((view) => queuesAt(view, bar))).toEqual([2, 2]);
});

test('one that goes leaves the others, wherever they are', () => {
  const { views, device } = machine();
  const [view] = views;
  const place = (index: number) => ({ slot: index + 1, bar: SEGMENTS[0].mmio32.end - (index + 1) * 0x1_0000 });
  for (let index = 0; index < 31; index++) {
    const { slot, bar } = place(index);
    view.segments.apply({ kind: 'plug', device: device(`${index}`, 0, slot, bar, index + 1) });
    view.memory.write(config(0, slot, COMMAND), 2, DECODING);
  }
  const gone = new Set<number>();
  for (const index of [30, 0, 15, 16, 14]) {
    view.segments.apply({ kind: 'unplug', device: `${index}` });
    gone.add(index);
    for (let other = 0; other < 31; other++) {
      const { slot, bar } = place(other);
      expect([present(view, 0, slot), queuesAt(view, bar)]).toEqual(
        gone.has(other) ? [false, 0xffff] : [true, other + 1],
      );
    }
  }
  expect(present(view, 0, 0)).toBe(true); // the host bridge
});

test("a device's driver is told of once, by the thread on which it does something first", () => {
  const { views, device, events } = machine();
  const bar = 0xc0f0_0000;
  const [one, other] = views;
  for (const id of ['first', 'second']) {
    const plugged = device(id, 0, 7, bar, 1);
    for (const view of views) view.segments.apply({ kind: 'plug', device: plugged });
    one.memory.write(config(0, 7, COMMAND), 2, DECODING);
    // It is found, and looked at.
    one.memory.read(config(0, 7, 0), 4);
    one.memory.read(bar + Common.status, 1);
    expect(events).toEqual([]);
    other.memory.write(bar + Common.status, 1, 0);
    // Nobody holds its queues, so the reset has ended.
    expect(one.memory.read(bar + Common.status, 1)).toBe(0);
    expect(events.splice(0)).toEqual([{ kind: 'driver-came', device: id }]);
    for (const { memory } of views) memory.write(bar + Common.status, 1, 0);
    expect(events).toEqual([]);
    for (const view of views) view.segments.apply({ kind: 'unplug', device: id });
  }
});

test('changes of memory are not theirs', () => {
  const { views } = machine();
  const part = { range: { address: 0, size: 4096 }, mapping: { address: 0n, length: 4096 }, kind: 'device' as const };
  for (const kind of ['add-memory', 'remove-memory'] as const) {
    expect(() => views[0].segments.apply({ kind, part })).not.toThrow();
  }
});
