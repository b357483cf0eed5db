/** A KVM VM while it runs: its clocks stand still and go on, its memory and routes come and go. The requests are recorded. */
import { describe, expect, test } from '@jest/globals';
import * as arm from '../../../src/hypervisor/kvm/aarch64/abi.js';
import { openKvmArm64 } from '../../../src/hypervisor/kvm/aarch64/kvm.js';
import * as abi from '../../../src/hypervisor/kvm/abi.js';
import { openKvm } from '../../../src/hypervisor/kvm/kvm.js';
import { IOAPIC_PINS, MAX_ROUTES } from '../../../src/hypervisor/kvm/routes.js';
import { type HostKernel, type MapOptions, SystemError } from '../../../src/sys/host-kernel.js';

const CLOCK_FLAGS_AND_TSC = abi.KVM_CLOCK_HOST_TSC;
const EINVAL = 22;
const IA32_TSC = 0x10;

/** A host whose KVM keeps a clock and a counter for each vCPU, as a test turns them. */
class ClockKernel {
  /** Of kvmclock, and of the host. */
  clock = 1_000_000_000n;
  tsc = 2n ** 63n;
  /** Whether the clock tells the counter. */
  tells = true;
  hasOffsets = true;
  usesClock = true;
  /** By the vCPU's descriptor. */
  readonly offsets = new Map<number, bigint>();
  readonly excused: number[] = [];
  readonly clocksSet: bigint[] = [];
  /** On Arm. */
  counter = 500n;
  readonly regions: { slot: number; flags: number; address: bigint; size: bigint; host: bigint }[] = [];
  /** The log of each slot, as KVM's words; it is forgotten when it is told. */
  readonly written = new Map<number, bigint[]>();
  /** Entries of the table of routes as it was given last. */
  routes = 0;
  readonly #memory = new Map<bigint, ArrayBuffer>();
  #fd = 10;

  readonly open = () => ++this.#fd;
  readonly eventfd = () => ++this.#fd;
  readonly close = () => undefined;
  readonly ioctlBufferRaw = () => 0;

  ioctl(_fd: number, request: number): number {
    switch (request) {
      case abi.KVM_GET_API_VERSION:
        return abi.KVM_API_VERSION;
      case abi.KVM_CHECK_EXTENSION:
        return 44;
      case abi.KVM_GET_VCPU_MMAP_SIZE:
        return 4096;
      case abi.KVM_CREATE_VCPU:
        this.offsets.set(++this.#fd, -7n * BigInt(this.offsets.size));
        return this.#fd;
      default:
        return ++this.#fd;
    }
  }

  ioctlRaw(fd: number, request: number): number {
    if (request === abi.KVM_GET_TSC_KHZ) return 3_000_000;
    expect(request).toBe(abi.KVM_KVMCLOCK_CTRL);
    this.excused.push(fd);
    return this.usesClock ? 0 : -EINVAL;
  }

  ioctlBuffer(fd: number, request: number, argument: Uint8Array): number {
    const view = new DataView(argument.buffer, argument.byteOffset, argument.byteLength);
    const u64 = (at: number) => view.getBigUint64(at, true);
    switch (request) {
      case abi.KVM_GET_CLOCK:
        view.setBigUint64(abi.CLOCK.clock, this.clock, true);
        if (!this.tells) break;
        view.setUint32(abi.CLOCK.flags, CLOCK_FLAGS_AND_TSC, true);
        view.setBigUint64(abi.CLOCK.hostTsc, this.tsc, true);
        break;
      case abi.KVM_SET_CLOCK:
        // With flags it would be set by the host's own clock.
        expect(view.getUint32(abi.CLOCK.flags, true)).toBe(0);
        this.clocksSet.push((this.clock = u64(abi.CLOCK.clock)));
        break;
      case abi.KVM_GET_DEVICE_ATTR:
      case abi.KVM_SET_DEVICE_ATTR:
        this.#attribute(fd, request, view);
        break;
      case abi.KVM_GET_MSRS:
        expect(view.getUint32(abi.MSRS_HEADER_SIZE, true)).toBe(IA32_TSC);
        view.setBigUint64(abi.MSRS_HEADER_SIZE + 8, this.tsc + this.offsets.get(fd)!, true);
        return 1;
      case abi.KVM_SET_USER_MEMORY_REGION:
        this.regions.push({
          ...{ slot: view.getUint32(0, true), flags: view.getUint32(4, true) },
          ...{ address: u64(8), size: u64(16), host: u64(24) },
        });
        break;
      case abi.KVM_GET_DIRTY_LOG: {
        const slot = view.getUint32(0, true);
        const log = this.written.get(slot);
        if (log === undefined) throw new SystemError('ENOENT', 2, 'ioctl', 'no such file or directory');
        expect([argument.length, view.getUint32(4, true)]).toEqual([abi.DIRTY_LOG_SIZE, 0]);
        const bitmap = this.#memory.get(u64(8))!;
        expect(bitmap.byteLength).toBe(log.length * 8);
        new BigUint64Array(bitmap).set(log);
        this.written.set(slot, new Array<bigint>(log.length).fill(0n));
        break;
      }
      case abi.KVM_SET_GSI_ROUTING:
        this.routes = view.getUint32(0, true);
        break;
      case arm.KVM_GET_ONE_REG:
      case arm.KVM_SET_ONE_REG:
        this.#register(request, view);
        break;
    }
    return 0;
  }

  #register(request: number, view: DataView): void {
    if (view.getBigUint64(0, true) !== arm.REG_TIMER_CNT) return;
    const value = new DataView(this.#memory.get(view.getBigUint64(8, true))!);
    if (request === arm.KVM_GET_ONE_REG) value.setBigUint64(0, this.counter, true);
    else this.counter = value.getBigUint64(0, true);
  }

  #attribute(fd: number, request: number, view: DataView): void {
    if (!this.offsets.has(fd)) return; // another device's
    expect([view.getUint32(4, true), view.getBigUint64(8, true)]).toEqual([abi.KVM_VCPU_TSC_CTRL, 0n]);
    if (!this.hasOffsets) throw new SystemError('ENXIO', 6, 'ioctl', 'no such device or address');
    const value = new DataView(this.#memory.get(view.getBigUint64(16, true))!);
    if (request === abi.KVM_GET_DEVICE_ATTR) value.setBigInt64(0, this.offsets.get(fd)!, true);
    else this.offsets.set(fd, value.getBigInt64(0, true));
  }

  map({ length }: MapOptions) {
    const address = BigInt(++this.#fd) << 12n;
    const buffer = new ArrayBuffer(length);
    this.#memory.set(address, buffer);
    return { handle: { address, length }, view: () => buffer, unmap: () => void this.#memory.delete(address) };
  }

  get mapped(): number {
    return this.#memory.size;
  }
}

function x86(vcpus = 3) {
  const host = new ClockKernel();
  const hypervisor = openKvm(host as unknown as HostKernel);
  const vm = hypervisor.createVm({ tssAddress: 0, identityMapAddress: 0 });
  for (let id = 0; id < vcpus; id++) vm.createVcpu(id);
  /** Time passes. */
  const pass = (nanoseconds: bigint) => {
    host.clock += nanoseconds;
    host.tsc += nanoseconds * 3n;
  };
  return { host, vm, pass };
}

describe('the clocks of x86 guests', () => {
  test('are let go at first as KVM has them', () => {
    const { host, vm } = x86();
    vm.startTime();
    expect([host.clocksSet, [...host.offsets.values()], host.excused]).toEqual([[], [0n, -7n, -14n], []]);
  });

  test('go on where they were, and the counters of all vCPUs by the same number', () => {
    const { host, vm, pass } = x86();
    vm.startTime();
    const mapped = host.mapped;
    let back = 0n;
    for (const pause of [1_000_000n, 86_400_000_000_000n]) {
      pass(5_000n);
      const { clock } = host;
      vm.stopTime();
      pass(pause);
      vm.startTime();
      back += pause * 3n;
      expect(host.clocksSet.splice(0)).toEqual([clock]);
      expect([...host.offsets.values()]).toEqual([-back, -7n - back, -14n - back]);
      expect(host.excused.splice(0)).toEqual([...host.offsets.keys()]);
    }
    vm.startTime();
    expect(host.clocksSet).toEqual([]);
    expect(host.mapped).toBe(mapped);
  });

  test('are set ahead together', () => {
    const { host, vm, pass } = x86();
    vm.startTime();
    const { clock } = host;
    vm.stopTime();
    pass(1_000_000n);
    vm.startTime(5_000_000_001n);
    const ticks = 3n * (5_000_000_001n - 1_000_000n);
    expect([host.clocksSet, [...host.offsets.values()]]).toEqual([
      [clock + 5_000_000_001n],
      [ticks, ticks - 7n, ticks - 14n],
    ]);
  });

  test('on a kernel that has no offsets: kvmclock alone', () => {
    const { host, vm, pass } = x86();
    host.hasOffsets = false;
    const { clock } = host;
    vm.stopTime();
    pass(1_000n);
    vm.startTime(7n);
    expect([host.clocksSet, [...host.offsets.values()]]).toEqual([[clock + 7n], [0n, -7n, -14n]]);
  });

  test('where the clock does not tell the counter, too', () => {
    const { host, vm, pass } = x86();
    host.tells = false;
    vm.stopTime();
    pass(1_000n);
    vm.startTime();
    expect([...host.offsets.values()]).toEqual([-3_000n, -3_007n, -3_014n]);
  });

  test('of a guest that does not use kvmclock, too', () => {
    const { host, vm, pass } = x86(1);
    host.usesClock = false;
    vm.stopTime();
    pass(1_000n);
    vm.startTime();
    expect([...host.offsets.values()]).toEqual([-3_000n]);
  });
});

test('the counter of Arm guests goes on where it was', () => {
  const { host, vm } = arm64();
  for (const id of [0, 1]) vm.createVcpu(id, id > 0);
  vm.startTime();
  expect(host.counter).toBe(500n);
  vm.stopTime();
  host.counter += 1_000n;
  vm.startTime();
  expect(host.counter).toBe(500n);
  host.counter += 20n;
  vm.startTime();
  expect(host.counter).toBe(520n);
});

function arm64() {
  const host = new ClockKernel();
  const gic = { distributor: 0x0800_0000, its: 0x0808_0000, redistributors: 0x080a_0000, spis: 96 };
  return { host, vm: openKvmArm64(host as unknown as HostKernel).createVm({ ipaBits: 40, gic }) };
}

test('memory that is gone is a slot of no bytes', () => {
  const { host, vm } = x86(0);
  vm.addMemory({ slot: 3, guestAddress: 0x1_0000_0000, mapping: { address: 0x7000_0000n, length: 0x20_0000 } });
  vm.removeMemory(3);
  expect(host.regions).toEqual([
    { slot: 3, flags: 0, address: 0x1_0000_0000n, size: 0x20_0000n, host: 0x7000_0000n },
    { slot: 3, flags: 0, address: 0n, size: 0n, host: 0n },
  ]);
});

describe.each([
  ['x86_64', () => x86(0)],
  ['aarch64', arm64],
])('pages that a guest writes on %s', (_name, machine) => {
  const slotOf = (pages: number) => ({
    ...{ slot: 2, guestAddress: 0x1_0000_0000 },
    mapping: { address: 0x7000_0000n, length: pages * 0x1000 },
  });

  test('are logged by a flag of their slot', () => {
    const { host, vm } = machine();
    const slot = slotOf(512);
    vm.addMemory(slot);
    vm.trackWrites(slot, true);
    vm.trackWrites(slot, false);
    const region = { slot: 2, address: 0x1_0000_0000n, size: 0x20_0000n, host: 0x7000_0000n };
    expect(host.regions).toEqual([0, 1, 0].map((flags) => ({ ...region, flags })));
  });

  test.each([1, 63, 64, 65])('are told of a slot of %d pages', (pages) => {
    const { host, vm } = machine();
    const slot = slotOf(pages);
    const last = 1n << BigInt((pages - 1) % 64);
    const log = new Array<bigint>(Math.ceil(pages / 64)).fill(0n);
    log[0] |= 1n;
    log[log.length - 1] |= last;
    host.written.set(2, log);
    const mapped = host.mapped;
    // More words than are needed, with what was there before.
    const into = new Uint32Array(6).fill(0xffff_ffff);
    vm.takeWritten(slot, into);
    const bits = [...into].flatMap((word, at) =>
      Array.from({ length: 32 }, (_, bit) => bit).flatMap((bit) => ((word >>> bit) & 1 ? [at * 32 + bit] : [])),
    );
    expect(bits).toEqual([...new Set([0, pages - 1])]);
    vm.takeWritten(slot, into);
    expect([...into]).toEqual([0, 0, 0, 0, 0, 0]);
    expect(host.mapped).toBe(mapped);
  });

  test('are not told into too few words', () => {
    const { host, vm } = machine();
    host.written.set(2, [0n, 0n]);
    expect(() => vm.takeWritten(slotOf(65), new Uint32Array(2))).toThrow(RangeError);
  });

  test('are not told of a slot that is not tracked', () => {
    const { vm } = machine();
    expect(() => vm.takeWritten(slotOf(1), new Uint32Array(2))).toThrow(SystemError);
  });
});

test('a route that is given back is the next that is taken, and sends nothing meanwhile', () => {
  const { host, vm } = x86(0);
  const pins = host.routes;
  const routes = [vm.allocateMsiRoute(), vm.allocateMsiRoute()];
  expect(routes).toEqual([IOAPIC_PINS, IOAPIC_PINS + 1]);
  for (const route of routes) vm.signals.setMsiRoute(route, 0xfee0_0000, 0, route, 0);
  expect(host.routes).toBe(pins + 2);
  vm.freeMsiRoute(routes[0]);
  expect(host.routes).toBe(pins + 1);
  expect(vm.allocateMsiRoute()).toBe(routes[0]);
  for (let route = IOAPIC_PINS + 2; route < MAX_ROUTES; route++) expect(vm.allocateMsiRoute()).toBe(route);
  expect(() => vm.allocateMsiRoute()).toThrow(/interrupt routes/);
  // One that was never set is given back as well.
  vm.freeMsiRoute(routes[0]);
  expect(vm.allocateMsiRoute()).toBe(routes[0]);
});
