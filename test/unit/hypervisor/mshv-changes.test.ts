/** A VM of the Microsoft hypervisor while it runs: what is asked of the driver as memory, routes and time come and go. */
import { describe, expect, test } from '@jest/globals';
import { HypervisorError } from '../../../src/hypervisor/hypervisor.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { openMshv } from '../../../src/hypervisor/mshv/mshv.js';
import { type HostKernel, type MapOptions, SystemError } from '../../../src/sys/host-kernel.js';

const { WRITABLE, EXECUTABLE, UNMAP } = abi.MSHV_SET_MEM_BIT;
const PAGE = BigInt(abi.MSHV_HV_PAGE_SIZE);

/** A driver that takes everything, but for memory at an address that it is told. */
class Driver {
  readonly regions: { pfn: bigint; size: bigint; host: bigint; flags: number }[] = [];
  readonly freezes: bigint[] = [];
  /** Settings of GPA_PAGE_ACCESS_TRACKING, and structures of requests for pages' states, with the bitmap's address taken out. */
  readonly tracking: (bigint | string)[] = [];
  /** Bits, as a partition has them: page by page from address 0 on. */
  dirty = new Set<number>();
  refusesStates = false;
  refused: bigint | undefined;
  readonly #memory: { readonly address: bigint; readonly buffer: ArrayBuffer }[] = [];
  #next = 10;

  readonly open = () => ++this.#next;
  readonly ioctl = () => 0;
  readonly close = () => undefined;
  readonly attach = (options: MapOptions) => this.map(options);

  map({ length }: MapOptions) {
    const address = BigInt(++this.#next) << 20n;
    const buffer = new ArrayBuffer(length);
    this.#memory.push({ address, buffer });
    const view = (offset: number, bytes: number) => {
      // Part of a mapping is never asked for but in pages that others share.
      expect(offset + bytes).toBeLessThanOrEqual(length);
      return offset === 0 && bytes === length ? buffer : this.#part(address + BigInt(offset), bytes);
    };
    return { handle: { address, length }, view, unmap: () => undefined };
  }

  #part(address: bigint, length: number): ArrayBuffer {
    const buffer = new ArrayBuffer(length);
    this.#memory.push({ address, buffer });
    return buffer;
  }

  ioctlBuffer(_fd: number, request: number, argument: Uint8Array): number {
    const view = new DataView(argument.buffer);
    if (request === abi.MSHV_GET_GPAP_ACCESS_BITMAP) return this.#states(argument, view);
    if (request !== abi.MSHV_SET_GUEST_MEMORY) return ++this.#next;
    const region = {
      pfn: view.getBigUint64(abi.MEM_REGION.guestPfn, true),
      size: view.getBigUint64(abi.MEM_REGION.size, true),
      host: view.getBigUint64(abi.MEM_REGION.userspaceAddress, true),
      flags: argument[abi.MEM_REGION.flags],
    };
    if (region.pfn === this.refused) throw new SystemError('EEXIST', 17, 'ioctl', 'exists already');
    this.regions.push(region);
    return 0;
  }

  ioctlBufferRaw(_fd: number, request: number, argument: Uint8Array): number {
    if (request !== abi.MSHV_ROOT_HVCALL) return 0;
    const view = new DataView(argument.buffer);
    if (view.getUint16(abi.ROOT_HVCALL.code, true) !== abi.HVCALL.SET_PARTITION_PROPERTY) return 0;
    const address = view.getBigUint64(abi.ROOT_HVCALL.inPointer, true);
    const input = new DataView(this.#at(address));
    const code = input.getUint32(abi.PARTITION_PROPERTY.code, true);
    const value = input.getBigUint64(abi.PARTITION_PROPERTY.value, true);
    if (code === abi.HV_PARTITION_PROPERTY.TIME_FREEZE) this.freezes.push(value);
    if (code === abi.HV_PARTITION_PROPERTY.GPA_PAGE_ACCESS_TRACKING) this.tracking.push(value);
    return 0;
  }

  #at(address: bigint): ArrayBuffer {
    return this.#memory.findLast((memory) => memory.address === address)!.buffer;
  }

  /** As the driver does: whole bytes are written, and what is no request to clear sets. */
  #states(argument: Uint8Array, view: DataView): number {
    if (this.refusesStates) throw new SystemError('EIO', 5, 'ioctl', 'input/output error');
    const bitmap = new Uint8Array(this.#at(view.getBigUint64(abi.GPAP_BITMAP.bitmap, true)));
    const [count, first] = [abi.GPAP_BITMAP.pageCount, abi.GPAP_BITMAP.gpapBase].map((at) =>
      Number(view.getBigUint64(at, true)),
    );
    bitmap.fill(0, 0, Math.ceil(count / 8));
    for (let page = 0; page < count; page++) {
      if (this.dirty.has(first + page)) bitmap[page >> 3] |= 1 << (page & 7);
      if (argument[abi.GPAP_BITMAP.operation] === abi.MSHV_GPAP_ACCESS_OP.CLEAR) this.dirty.delete(first + page);
      else this.dirty.add(first + page);
    }
    this.tracking.push(Buffer.from(argument.subarray(0, abi.GPAP_BITMAP.bitmap)).toString('hex'));
    return 0;
  }
}

function machine() {
  const driver = new Driver();
  return { driver, vm: openMshv(driver as unknown as HostKernel).createVm() };
}

test('memory goes by where it was, and how much it was', () => {
  const { driver, vm } = machine();
  const slots = [
    { slot: 0, guestAddress: 0, mapping: { address: 0x7000_0000n, length: 0x1000_0000 } },
    { slot: 1, guestAddress: 0x20_0000_0000, mapping: { address: 0x6000_0000n, length: 0x20_0000 } },
  ];
  for (const slot of slots) vm.addMemory(slot);
  vm.removeMemory(1);
  const there = { pfn: 0x20_0000_0000n / PAGE, size: 0x20_0000n, host: 0x6000_0000n };
  expect(driver.regions.slice(1)).toEqual([
    { ...there, flags: (1 << WRITABLE) | (1 << EXECUTABLE) },
    { ...there, flags: 1 << UNMAP },
  ]);
  // Another one of the same number, elsewhere.
  vm.addMemory({ slot: 1, guestAddress: 0x30_0000_0000, mapping: { address: 0x5000_0000n, length: 0x40_0000 } });
  vm.removeMemory(1);
  expect(driver.regions.at(-1)).toEqual({
    pfn: 0x30_0000_0000n / PAGE,
    size: 0x40_0000n,
    host: 0x5000_0000n,
    flags: 4,
  });
});

test('memory that the driver refuses is told in a line', () => {
  const { driver, vm } = machine();
  driver.refused = 1n;
  const slot = { slot: 2, guestAddress: 0x1000, mapping: { address: 0x7000_0000n, length: 0x1000 } };
  expect(() => vm.addMemory(slot)).toThrow(HypervisorError);
  expect(() => vm.addMemory(slot)).toThrow(/refuses SET_GUEST_MEMORY: exists already$/);
});

describe('pages that a guest writes', () => {
  const FIRST = 0x10_0000;
  const slotOf = (slot: number, pages: number) => ({
    ...{ slot, guestAddress: FIRST * Number(PAGE) },
    mapping: { address: 0x7000_0000n, length: pages * Number(PAGE) },
  });
  /** struct mshv_gpap_access_bitmap, but for its last field. */
  const states = (operation: number, pages: number, first: number) => {
    const bytes = Buffer.alloc(24);
    bytes.set([1, operation]);
    bytes.writeBigUInt64LE(BigInt(pages), 8);
    bytes.writeBigUInt64LE(BigInt(first), 16);
    return bytes.toString('hex');
  };

  test.each([1, 63, 64, 65, 0x1_0000, 0x1_0001])('are told of a slot of %d pages', (pages) => {
    const { driver, vm } = machine();
    const slot = slotOf(0, pages);
    vm.addMemory(slot);
    // Known from before.
    driver.dirty.add(FIRST);
    vm.trackWrites(slot, true);
    expect([driver.tracking.shift(), driver.dirty.size]).toEqual([1n, 0]);
    const requests = Array.from({ length: Math.ceil(pages / 0x1_0000) }, (_, index) =>
      states(1, Math.min(0x1_0000, pages - index * 0x1_0000), FIRST + index * 0x1_0000),
    );
    expect(driver.tracking.splice(0)).toEqual(requests);
    const written = [...new Set([0, Math.min(9, pages - 1), pages - 1])];
    driver.dirty = new Set([-1, ...written, pages].map((page) => FIRST + page));
    // More words than are needed, with what was there before.
    const into = new Uint32Array(Math.ceil(pages / 64) * 2 + 2).fill(0xffff_ffff);
    const bits = () =>
      [...into].flatMap((word, at) =>
        word === 0 ? [] : Array.from({ length: 32 }, (_, bit) => ((word >>> bit) & 1 ? at * 32 + bit : -1)),
      );
    vm.takeWritten(slot, into);
    expect(bits().filter((bit) => bit >= 0)).toEqual(written);
    expect(driver.tracking.splice(0)).toEqual(requests);
    vm.takeWritten(slot, into);
    expect(bits()).toEqual([]);
    expect([...driver.dirty]).toEqual([FIRST - 1, FIRST + pages]);
  });

  test('are tracked of the partition as long as of one slot, and are all dirty when that ends', () => {
    const { driver, vm } = machine();
    const slots = [slotOf(0, 1), { ...slotOf(1, 2), guestAddress: 0 }, { ...slotOf(2, 3), guestAddress: 0x10_0000 }];
    for (const slot of slots) vm.addMemory(slot);
    vm.trackWrites(slots[2], false);
    expect(driver.tracking).toEqual([]);
    for (const slot of slots) vm.trackWrites(slot, true);
    const cleared = [states(1, 1, FIRST), states(1, 2, 0), states(1, 3, 0x100)];
    expect(driver.tracking.splice(0)).toEqual([1n, ...cleared]);
    vm.trackWrites(slots[0], false);
    expect(driver.tracking.splice(0)).toEqual([states(2, 1, FIRST)]);
    vm.removeMemory(1);
    expect(driver.tracking.splice(0)).toEqual([]);
    vm.trackWrites(slots[2], false);
    expect(driver.tracking.splice(0)).toEqual([states(2, 3, 0x100), 0n]);
    // The memory of the last one goes.
    vm.trackWrites(slots[0], true);
    driver.tracking.length = 0;
    vm.removeMemory(0);
    expect(driver.tracking).toEqual([0n]);
  });

  test('are not tracked where the driver refuses, which is told in a line', () => {
    const { driver, vm } = machine();
    const [slot, other] = [slotOf(0, 1), { ...slotOf(1, 1), guestAddress: 0 }];
    driver.refusesStates = true;
    expect(() => vm.trackWrites(slot, true)).toThrow(HypervisorError);
    expect(driver.tracking.splice(0)).toEqual([1n, 0n]);
    expect(() => vm.takeWritten(slot, new Uint32Array(2))).toThrow(
      /refuses GET_GPAP_ACCESS_BITMAP: input\/output error$/,
    );
    driver.refusesStates = false;
    vm.trackWrites(slot, true);
    driver.refusesStates = true;
    driver.tracking.length = 0;
    expect(() => vm.trackWrites(other, true)).toThrow(HypervisorError);
    expect(driver.tracking).toEqual([]);
  });

  test('are not told into too few words', () => {
    const { vm } = machine();
    expect(() => vm.takeWritten(slotOf(0, 65), new Uint32Array(2))).toThrow(RangeError);
  });
});

test('time stands still until it is started, and whenever it is stopped', () => {
  const { driver, vm } = machine();
  expect(driver.freezes).toEqual([1n]);
  vm.startTime();
  vm.stopTime();
  vm.startTime();
  expect(driver.freezes).toEqual([1n, 0n, 1n, 0n]);
});

test('a route that is given back is the next that is taken', () => {
  const { vm } = machine();
  const routes = [vm.allocateMsiRoute(), vm.allocateMsiRoute()];
  for (const route of routes) vm.signals.setMsiRoute(route, 0xfee0_0000, 0, 0x40, 0);
  vm.freeMsiRoute(routes[0]);
  expect(vm.allocateMsiRoute()).toBe(routes[0]);
  expect(vm.allocateMsiRoute()).toBe(routes[1] + 1);
  vm.freeMsiRoute(routes[0]);
});
