/** A VM of the Microsoft hypervisor while it runs: what is asked of the driver as memory, routes and time come and go. */
import { expect, test } from '@jest/globals';
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
    const input = new DataView(this.#memory.findLast((memory) => memory.address === address)!.buffer);
    if (input.getUint32(abi.PARTITION_PROPERTY.code, true) === abi.HV_PARTITION_PROPERTY.TIME_FREEZE) {
      this.freezes.push(input.getBigUint64(abi.PARTITION_PROPERTY.value, true));
    }
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
