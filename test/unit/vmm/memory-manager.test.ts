import fs from 'node:fs';
import { describe, expect, test } from '@jest/globals';
import { readHostFacts } from '../../../src/config/host-facts.js';
import { type MemoryConfig, zonesOf } from '../../../src/config/memory-config.js';
import type { MemorySlot, Vm } from '../../../src/hypervisor/hypervisor.js';
import { type HostMapping, SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { MachineError } from '../../../src/vmm/machine/machine-error.js';
import { RAM_WINDOWS } from '../../../src/arch/x86_64/layout.js';
import { MemoryManager } from '../../../src/vmm/memory/memory-manager.js';
import { attachMemory, type MemoryPart } from '../../../src/vmm/memory/memory-part.js';
import { layoutMemory } from '../../../src/vmm/memory/memory-layout.js';
import { newDescriptors, openDescriptors } from '../../support/descriptors.js';
import { layoutOf, memoryOf } from '../../support/memory-layouts.js';

const GIB = 2 ** 30;

const ramRanges = (size: number) => layoutOf({ size }, RAM_WINDOWS).ram;

function manage(kernel: LinuxKernel, options: Partial<MemoryConfig>): MemoryManager {
  return new MemoryManager(kernel, memoryOf(options), layoutOf(options, RAM_WINDOWS).zones);
}

/** What the VM gets of it. */
function partsOf(manager: MemoryManager): readonly MemoryPart[] {
  return manager.attach({ addMemory: () => undefined } as unknown as Vm).parts;
}

describe('guest RAM', () => {
  test('lies below and above the hole', () => {
    expect(ramRanges(GIB)).toEqual([{ address: 0, size: GIB }]);
    expect(ramRanges(3 * GIB)).toEqual([{ address: 0, size: 3 * GIB }]);
    expect(ramRanges(5 * GIB)).toEqual([
      { address: 0, size: 3 * GIB },
      { address: 4 * GIB, size: 2 * GIB },
    ]);
  });

  test.each([{ shared: false }, { shared: true }, { prefault: true }, { thp: false }])(
    'is mapped, with %j',
    (options) => {
      const kernel = new LinuxKernel();
      const size = 4 * 2 ** 20;
      const manager = manage(kernel, { size, ...options });
      const slots: MemorySlot[] = [];
      manager.attach({ addMemory: (slot: MemorySlot) => slots.push(slot) } as unknown as Vm);
      expect(slots.map(({ slot, guestAddress, mapping }) => [slot, guestAddress, mapping.length])).toEqual([
        [0, 0, size],
      ]);
      manager.memory.setU32(size - 4, 0x1234_5678);
      expect(manager.memory.u32(size - 4)).toBe(0x1234_5678);
      manager.close();
    },
  );

  test('has files in the place of what it holds, and changes none of them', () => {
    const kernel = new LinuxKernel();
    const before = openDescriptors();
    const size = 4 * 2 ** 20;
    const manager = manage(kernel, { size });
    const [part] = partsOf(manager);
    const thread = attachMemory([part], kernel);
    manager.memory.setU32(4096, 1);
    const file = kernel.memfd('memory', { size });
    kernel.writeAt(file, Uint8Array.of(7, 0, 0, 0), 8192);
    for (let time = 0; time < 2; time++) {
      expect(manager.mapFrom(new Map([[0, file]]))).toEqual([part]);
      expect([0, 4096, 8192].map((address) => manager.memory.u32(address))).toEqual([0, 0, 7]);
      expect([part.kind, manager.memory.kindAt(0)]).toEqual(['copy', 'copy']);
      expect(thread.u32(8192)).toBe(7);
      thread.setU32(8192, 8);
      expect(manager.memory.u32(8192)).toBe(8);
      const written = new Uint8Array(4);
      kernel.readAt(file, written, 8192);
      expect([...written]).toEqual([7, 0, 0, 0]);
      const [held] = manager.held();
      expect([held.touched, held.nextData?.(8192), held.nextData?.(12288)]).toEqual([
        true,
        { address: 8192, size: 4096 },
        undefined,
      ]);
    }
    manager.close();
    kernel.close(file);
    expect(newDescriptors(before)).toEqual([]);
  });

  const sizes = [2 ** 12, 2 ** 21, 2 ** 30 - 2 ** 12, GIB, 3 * GIB, 3 * GIB + 2 ** 12, 6 * GIB];
  const pools = readHostFacts().hugepageSizes;
  const kinds: { readonly options: Partial<MemoryConfig>; readonly unit: number }[] = [
    { options: {}, unit: 1 },
    { options: { shared: true }, unit: 1 },
    // Nothing is taken out of the pool, which may be empty.
    ...pools.flatMap((unit) =>
      [false, true].map((shared) => ({
        options: { hugepages: true, hugepage_size: unit, shared, reserve: false },
        unit,
      })),
    ),
  ];
  test.each(kinds)(
    'is where guest and host addresses are equal modulo huge pages, with $options',
    ({ options, unit }) => {
      const kernel = new LinuxKernel();
      for (const start of [0, GIB]) {
        for (const size of sizes.filter((one) => one % unit === 0)) {
          // What is mapped before leaves the next address in the middle of a huge page.
          const odd = kernel.map({ length: 4096, shared: true });
          const windows = RAM_WINDOWS.map((window) => ({ ...window, address: window.address + start }));
          const { zones, ram } = layoutOf({ size, ...options }, windows);
          const manager = new MemoryManager(kernel, memoryOf({ size, ...options }), zones);
          const mappings = manager.memory.mappings();
          expect(mappings.map(({ address, size: bytes }) => ({ address, size: bytes }))).toEqual(ram);
          for (const { address, hostAddress, size: bytes } of mappings) {
            const modulo = Math.max(bytes >= GIB ? GIB : 2 ** 21, unit);
            expect([bytes, (hostAddress - address) % modulo]).toEqual([bytes, 0]);
          }
          manager.close();
          odd.unmap();
        }
      }
    },
  );

  test('what is taken of the address space for that is given back, also where nothing can be mapped', () => {
    const kernel = new LinuxKernel();
    const taken = () => {
      const sizes = fs
        .readFileSync('/proc/self/maps', 'latin1')
        .split('\n')
        .filter((line) => line.includes('---p'))
        .map((line) => line.split(/[- ]/).map((word) => parseInt(word, 16)));
      return sizes.reduce((sum, [start, end]) => sum + end - start, 0);
    };
    const before = taken();
    for (let round = 0; round < 20; round++) {
      const manager = manage(kernel, { size: 5 * GIB });
      manager.close();
      const placement = { like: 0, modulo: GIB };
      expect(() => kernel.map({ length: GIB, fd: 0, offset: 1, shared: true, placement })).toThrow(SystemError);
    }
    // The engine has some for itself, now here and now there.
    expect(taken()).toBeLessThan(before + 2 ** 28);
  });

  /** What the host says of the mapping that begins at an address. */
  function facts(hostAddress: number): { readonly flags: readonly string[]; readonly resident: number } {
    const start = hostAddress.toString(16);
    const text = fs.readFileSync('/proc/self/smaps', 'latin1');
    const at = text.search(new RegExp(`^0*${start}-`, 'm'));
    if (at < 0) throw new Error('Nothing is mapped there');
    const [entry] = text.slice(at).split(/^VmFlags/m, 1);
    const flags = /^VmFlags: (.*)$/m.exec(text.slice(text.indexOf(entry)))![1];
    return { flags: flags.trim().split(' '), resident: Number(/^Rss: +(\d+) kB$/m.exec(entry)![1]) * 1024 };
  }

  test.each<[Partial<MemoryConfig>, boolean, boolean]>([
    [{}, false, false],
    [{ reserve: false }, false, false],
    [{ reserve: true }, true, false],
    [{ prefault: true }, false, true],
    [{ prefault: true, shared: true }, false, true],
  ])('%j: is reserved: %p, is there at once: %p', (options, reserved, resident) => {
    const size = 8 * 2 ** 20;
    const manager = manage(new LinuxKernel(), { size, ...options });
    const found = facts(manager.memory.hostAddress(0, size));
    expect(found.flags.includes('nr')).toBe(!reserved);
    expect(found.resident).toBe(resident ? size : 0);
    expect(manager.memory.read(0, size).every((byte) => byte === 0)).toBe(true);
    manager.close();
  });

  test('an older kernel has it at once all the same', () => {
    class Older extends LinuxKernel {
      override populateRaw(): number {
        return -22; // EINVAL
      }
    }
    const size = 8 * 2 ** 20 + 4096;
    const manager = manage(new Older(), { size, prefault: true, thp: false });
    expect(facts(manager.memory.hostAddress(0, size)).resident).toBe(size);
    manager.close();
  });

  test('leaves nothing behind when part of it cannot be had, and tells what came first', () => {
    const open = new Set<string>();
    /** The second mapping fails, and each thing that is closed says that it cannot be. */
    class Failing extends LinuxKernel {
      override memfd(...parameters: Parameters<LinuxKernel['memfd']>): number {
        const fd = super.memfd(...parameters);
        open.add(`fd ${fd}`);
        return fd;
      }
      override close(fd: number): void {
        super.close(fd);
        open.delete(`fd ${fd}`);
        throw new Error('close');
      }
      override map(options: Parameters<LinuxKernel['map']>[0]): HostMapping {
        if (open.has('mapping')) throw new SystemError('ENOMEM', 12, 'mmap', 'not enough memory');
        const mapping = super.map(options);
        open.add('mapping');
        const { handle } = mapping;
        const unmap = () => {
          mapping.unmap();
          open.delete('mapping');
          throw new Error('unmap');
        };
        const replace = (fd: number) => mapping.replace(fd);
        return { handle, view: (offset, length) => mapping.view(offset, length), replace, unmap };
      }
    }
    const make = (size: number) => manage(new Failing(), { size, shared: true });
    expect(() => make(5 * GIB)).toThrow(/^--memory size=\d+: the host cannot map that much$/);
    expect([...open]).toEqual([]);
    const whole = make(GIB);
    expect(open.size).toBe(2);
    expect(() => whole.close()).toThrow('unmap');
    expect([...open]).toEqual([]);
  });

  test('above 4 GiB is found behind views of 1 GiB', () => {
    const manager = manage(new LinuxKernel(), { size: 6 * GIB });
    manager.memory.setU8(7 * GIB - 1, 0xa5);
    expect(manager.memory.u8(7 * GIB - 1)).toBe(0xa5);
    expect(() => manager.memory.u8(3 * GIB)).toThrow();
    manager.close();
  });

  test.each<Partial<MemoryConfig>>([{}, { shared: true }, { prefault: true, reserve: true, thp: false }])(
    'that comes while the machine runs is mapped as the rest, and goes as a whole, with %j',
    async (options) => {
      const kernel = new LinuxKernel();
      const before = openDescriptors();
      const size = 4 * 2 ** 20;
      const manager = manage(kernel, { size, ...options });
      const [{ zone }] = layoutOf({ size, ...options }, RAM_WINDOWS).zones;
      const range = { address: 5 * GIB, size: 130 * 2 ** 20 };
      let turns = 0;
      const other = setInterval(() => turns++);
      const part = await manager.add(zone, range);
      clearInterval(other);
      // More than one piece: others have had their turn.
      if (zone.prefault) expect(turns).toBeGreaterThan(0);
      const elsewhere = attachMemory([part], kernel);
      const address = elsewhere.hostAddress(range.address, range.size);
      const { flags, resident } = facts(address);
      expect([flags.includes('nr'), flags.includes('nh'), resident]).toEqual([
        !zone.reserve,
        options.thp === false,
        zone.prefault ? range.size : 0,
      ]);
      expect(address % 2 ** 21).toBe(0);
      elsewhere.setU32(range.address + range.size - 4, 7);
      const another = await manager.add(zone, { address: 6 * GIB, size });
      manager.remove(part);
      expect(() => facts(address)).toThrow();
      manager.memory.setU8(0, 1);
      // What is left goes at the end.
      expect(facts(Number(another.mapping.address)).resident).toBe(zone.prefault ? size : 0);
      manager.close();
      expect(() => facts(Number(another.mapping.address))).toThrow();
      expect(newDescriptors(before)).toEqual([]);
    },
  );

  test.each(['map', 'populateRaw', 'advise'] as const)('that cannot come leaves nothing: %s', async (call) => {
    let fails = false;
    const kernel = new LinuxKernel();
    const real = kernel[call].bind(kernel) as (...parameters: unknown[]) => unknown;
    const mapped: bigint[] = [];
    kernel[call] = ((...parameters: unknown[]) => {
      if (fails && call === 'populateRaw') return -12; // ENOMEM
      if (fails) throw new SystemError('ENOMEM', 12, call, 'not enough memory');
      return real(...parameters);
    }) as never;
    const options = { size: 4 * 2 ** 20, shared: call !== 'advise', prefault: true, mergeable: call === 'advise' };
    const manager = manage(kernel, options);
    const before = openDescriptors();
    const map = kernel.map.bind(kernel);
    kernel.map = (...parameters) => {
      const mapping = map(...parameters);
      mapped.push(mapping.handle.address);
      return mapping;
    };
    const [{ zone }] = layoutOf(options, RAM_WINDOWS).zones;
    fails = true;
    await expect(manager.add(zone, { address: 5 * GIB, size: 2 ** 27 })).rejects.toThrow(
      call === 'advise' ? /no page merging$/ : /^134217728 bytes more: the host cannot map that much$/,
    );
    expect(mapped).toHaveLength(call === 'map' ? 0 : 1);
    for (const address of mapped) expect(() => facts(Number(address))).toThrow();
    expect(newDescriptors(before)).toEqual([]);
    manager.close();
  });

  test.each([{}, { shared: true }, { prefault: true, reserve: true }])(
    'that is plugged later is there from the start for all but the memory map, with %j',
    (options) => {
      const kernel = new LinuxKernel();
      const size = 4 * 2 ** 20;
      const range = { address: 4 * GIB, size: 2 ** 40 };
      const manager = manage(kernel, { size, hotplug_method: 'VirtioMem', hotplug_size: range.size, ...options });
      expect(manager.memory.ranges()).toEqual([{ address: 0, size }]);
      const slots: MemorySlot[] = [];
      const { parts } = manager.attach({ addMemory: (slot: MemorySlot) => slots.push(slot) } as unknown as Vm);
      expect(slots.map(({ slot, guestAddress, mapping }) => [slot, guestAddress, mapping.length])).toEqual([
        [0, 0, size],
        [1, range.address, range.size],
      ]);
      const elsewhere = attachMemory(parts, kernel);
      expect(elsewhere.isRam(range.address, range.size)).toBe(true);
      // Nothing of it is set aside or there, whatever is so of RAM.
      const found = facts(elsewhere.hostAddress(range.address, range.size));
      expect([found.flags.includes('nr'), found.resident]).toEqual([true, 0]);
      expect(elsewhere.hostAddress(range.address, 1) % GIB).toBe(0);
      elsewhere.setU8(range.address + range.size - 1, 7);
      expect(elsewhere.u8(range.address + range.size - 1)).toBe(7);
      manager.close();
    },
  );

  describe('in zones', () => {
    const MIB = 2 ** 20;
    /** @param files by zone, with their page sizes */
    function build(
      list: object[],
      files: Record<string, [fd: number, pageSize: number]> = {},
      kernel = new LinuxKernel(),
    ) {
      const options = { size: 0, hotplug_method: 'VirtioMem' as const, zones: list as never };
      const opened = new Map(
        Object.entries(files).map(([id, [fd, pageSize]]) => [id, { fd, pageSize, close: () => undefined }] as const),
      );
      const { zones } = layoutMemory(zonesOf(memoryOf(options)), RAM_WINDOWS, 4 * GIB, opened);
      return new MemoryManager(kernel, memoryOf(options), zones, opened);
    }

    test('has each mapped as it says', () => {
      const plugs = { hotplug_size: 128 * MIB };
      const manager = build([
        { id: 'a', size: MIB, shared: true },
        { id: 'b', size: 2 * MIB, reserve: true, ...plugs },
        { id: 'c', size: MIB, prefault: true, shared: true, ...plugs },
      ]);
      const handle = partsOf(manager);
      expect(handle.map(({ range: { address, size }, kind }) => [address, size, kind])).toEqual([
        [0, MIB, 'shared'],
        [MIB, 2 * MIB, 'private'],
        [3 * MIB, MIB, 'shared'],
        [4 * GIB, 128 * MIB, 'private'],
        [4 * GIB + 128 * MIB, 128 * MIB, 'shared'],
      ]);
      const found = handle.map(({ mapping }) => facts(Number(mapping.address)));
      expect(found.map(({ flags, resident }) => [flags.includes('nr'), resident])).toEqual([
        [true, 0],
        [false, 0],
        [true, MIB],
        [true, 0],
        [true, 0],
      ]);
      expect(manager.memory.ranges()).toEqual([{ address: 0, size: 4 * MIB }]);
      manager.close();
    });

    test.each([false, true])('in a file that goes on behind the hole, shared: %p', (shared) => {
      const kernel = new LinuxKernel();
      const size = 3 * GIB + 8192;
      const fd = kernel.memfd('zone', { size });
      kernel.writeAt(fd, Uint8Array.of(1, 2, 3), 3 * GIB - 1);
      const files = { z: [fd, 4096] as [number, number] };
      const manager = build([{ id: 'z', size, shared }], files, kernel);
      const { memory } = manager;
      expect(memory.mappings().map(({ kind }) => kind)).toEqual(Array(2).fill(shared ? 'shared' : 'copy'));
      expect([memory.u8(3 * GIB - 1), memory.u8(4 * GIB), memory.u8(4 * GIB + 1)]).toEqual([1, 2, 3]);
      // A core file has all of it: what the guest has not touched is the file's.
      const [low] = manager.held();
      expect(low.nextData!(5)).toEqual({ address: 5, size: 3 * GIB - 5 });
      expect(low.nextData!(3 * GIB)).toBeUndefined();
      memory.setU8(4 * GIB + 1, 9);
      const read = new Uint8Array(1);
      kernel.readAt(fd, read, 3 * GIB + 1);
      expect(read[0]).toBe(shared ? 9 : 3);
      manager.close();
      // It is the machine's, not one life's.
      expect(fs.fstatSync(fd).size).toBe(size);
      kernel.close(fd);
    });

    test('an older kernel has a file there at once as it is', () => {
      class Older extends LinuxKernel {
        override populateRaw(): number {
          return -22; // EINVAL
        }
      }
      const kernel = new Older();
      const fd = kernel.memfd('zone', { size: MIB });
      kernel.writeAt(fd, new Uint8Array(MIB).fill(5), 0);
      const manager = build([{ id: 'z', size: MIB, prefault: true }], { z: [fd, 4096] }, kernel);
      expect(facts(manager.memory.hostAddress(0, MIB)).resident).toBe(MIB);
      expect(manager.memory.read(0, MIB).every((byte) => byte === 5)).toBe(true);
      manager.close();
      kernel.close(fd);
    });

    test('of huge pages where none of them begins in the guest', () => {
      const asked: Parameters<LinuxKernel['map']>[0][] = [];
      class Asked extends LinuxKernel {
        override map(options: Parameters<LinuxKernel['map']>[0]): HostMapping {
          asked.push(options);
          return super.map({ ...options, hugepageSize: undefined });
        }
      }
      const huge = { hugepages: true, hugepage_size: 2 * MIB, reserve: false };
      build(
        [
          { id: 'a', size: MIB },
          { id: 'b', size: 4 * MIB, ...huge },
        ],
        {},
        new Asked(),
      ).close();
      build(
        [
          { id: 'a', size: 2 * MIB },
          { id: 'b', size: 4 * MIB, ...huge },
        ],
        {},
        new Asked(),
      ).close();
      const like = (at: number) => ({ like: at, modulo: 2 * MIB });
      expect(asked.map(({ placement, hugepageSize }) => [placement, hugepageSize])).toEqual([
        [like(0), undefined],
        [{ like: 0, modulo: 2 * MIB }, 2 * MIB],
        [like(0), undefined],
        [like(2 * MIB), 2 * MIB],
      ]);
    });

    const [node] = readHostFacts().numaNodes as readonly (number | undefined)[];
    (node === undefined ? test.skip : test)('has its pages from a node of the host', () => {
      const policy = (hostAddress: number) =>
        new RegExp(`^0*${hostAddress.toString(16)} (\\S+)`, 'm').exec(
          fs.readFileSync('/proc/self/numa_maps', 'latin1'),
        )![1];
      const manager = build([
        { id: 'a', size: MIB },
        { id: 'b', size: MIB, host_numa_node: node, prefault: true, hotplug_size: 128 * MIB },
      ]);
      const [first, second, plugged] = partsOf(manager).map(({ mapping }) => policy(Number(mapping.address)));
      expect([first, second, plugged]).toEqual(['default', `bind:${node}`, `bind:${node}`]);
      manager.close();
      expect(() => build([{ id: 'b', size: MIB, host_numa_node: 1023 }])).toThrow(
        /^--memory-zone id=b,host_numa_node=1023: the host does not bind memory to it$/,
      );
    });

    test('that cannot be had is told by its name', () => {
      const zones = [
        { id: 'a', size: MIB },
        { id: 'b', size: 2 ** 48 },
      ];
      expect(() => build(zones)).toThrow(/^--memory-zone id=b,size=\d+: the host cannot map that much$/);
    });
  });

  test('that the host cannot map is one line that names the option', () => {
    const size = 2 ** 48; // more than a process has addresses
    const make = () => manage(new LinuxKernel(), { size });
    expect(make).toThrow(MachineError);
    expect(make).toThrow(/^--memory size=\d+: the host cannot map that much$/);
  });
});

describe('RAM that goes on from files', () => {
  const MIB = 2 ** 20;
  const kernel = new LinuxKernel();

  function contents(size: number): number {
    const fd = kernel.memfd('saved', { size });
    kernel.writeAt(fd, Uint8Array.of(1, 2, 3), 2 * MIB - 1);
    return fd;
  }
  const zone = (config: Partial<MemoryConfig>) => zonesOf(memoryOf(config))[0];
  const manager = (
    config: Partial<MemoryConfig>,
    files: ReadonlyMap<number, number>,
    mode: 'map' | 'ondemand' = 'map',
  ) => new MemoryManager(kernel, memoryOf(config), layoutOf(config, RAM_WINDOWS).zones, new Map(), { mode, files });

  test('has what they hold, and keeps what is written to itself', () => {
    const before = openDescriptors();
    const file = contents(4 * MIB);
    const config = { size: 4 * MIB };
    const made = manager(config, new Map([[0, file]]));
    const { memory } = made;
    expect([memory.u8(2 * MIB - 1), memory.u8(2 * MIB), memory.u8(0)]).toEqual([1, 2, 0]);
    memory.setU8(2 * MIB, 9);
    memory.setU8(3 * MIB, 8);
    const read = new Uint8Array(2);
    kernel.readAt(file, read, 2 * MIB);
    expect([...read]).toEqual([2, 3]);
    // Pages that go back would show the file's contents.
    expect(memory.mappings().map(({ kind }) => kind)).toEqual(['copy']);
    const [held] = made.held();
    expect([held.touched, held.nextData!(4096)]).toEqual([true, { address: 2 * MIB - 4096, size: 8192 }]);
    expect(made.unfilled()).toEqual([]);

    // More that is there from the start: the one from a file, the other to be filled.
    const another = contents(4 * MIB);
    const more = manager(config, new Map([[2 ** 40, another]]));
    more.addNow(zone(config), { address: 2 ** 40, size: 4 * MIB });
    const part = more.addNow(zone(config), { address: 2 ** 41, size: 4 * MIB });
    expect(more.held().map(({ range }) => range.address)).toEqual([0, 2 ** 40, 2 ** 41]);
    expect(more.unfilled().map(({ range }) => range.address)).toEqual([0, 2 ** 41]);
    expect(new Uint8Array(more.held()[1].view(2 * MIB, 1))[0]).toBe(2);
    more.remove(part);
    expect(more.held()).toHaveLength(2);

    // The files are whoever's they were.
    more.close();
    made.close();
    expect(fs.fstatSync(file).size).toBe(4 * MIB);
    kernel.close(file);
    kernel.close(another);
    expect(newDescriptors(before)).toEqual([]);
  });

  test.each([2, 6])('is as long as the stretch, not %d MiB', (mib) => {
    const before = openDescriptors();
    const file = contents(mib * MIB);
    expect(() => manager({ size: 4 * MIB }, new Map([[0, file]]))).toThrow(
      `memory at 0x0: accepted is a file of ${4 * MIB} bytes, as much as the configuration makes`,
    );
    kernel.close(file);
    expect(newDescriptors(before)).toEqual([]);
  });

  test.each([{}, { shared: true }, { prefault: true }, { hotplug_size: 128 * MIB }])(
    'is put in by somebody else, who is told of all of it, with %j',
    (more) => {
      const before = openDescriptors();
      const files = [contents(4 * MIB), contents(128 * MIB), contents(4 * MIB)];
      const places = [0, layoutOf({ size: 4 * MIB, ...more }, RAM_WINDOWS).zones[0].hotplug?.address ?? 1, 2 ** 41];
      const from = new Map(places.map((address, index) => [address, files[index]]));
      const config = { size: 4 * MIB, ...more };
      const made = manager(config, from, 'ondemand');
      const dimm = made.addNow(zone(config), { address: 2 ** 41, size: 4 * MIB });
      expect(made.missing().map(({ size, fd, name }) => [size, fd, name])).toEqual([
        [4 * MIB, files[0], 'memory at 0x0'],
        ...('hotplug_size' in more ? [[128 * MIB, files[1], `memory at 0x${places[1].toString(16)}`]] : []),
        [4 * MIB, files[2], 'memory at 0x20000000000'],
      ]);
      expect(made.unfilled()).toEqual([]);
      // The VM gets what is added by who adds it.
      expect(partsOf(made)).not.toContain(dimm);
      const pagemap = fs.openSync('/proc/self/pagemap', 'r');
      const entry = Buffer.alloc(8);
      fs.readSync(pagemap, entry, 0, 8, (made.missing()[0].hostAddress / 4096) * 8);
      fs.closeSync(pagemap);
      // Nothing is there that would have to give way.
      expect(entry[7] & 0xc0).toBe(0);
      made.close();
      for (const file of files) kernel.close(file);
      expect(newDescriptors(before)).toEqual([]);
    },
  );

  test('is not put into huge pages', () => {
    const file = contents(4 * MIB);
    const config = { size: 4 * MIB, hugepages: true, hugepage_size: 2 * MIB, reserve: false };
    expect(() => manager(config, new Map([[0, file]]), 'ondemand')).toThrow(
      'memory_restore_mode=ondemand: accepted is memory that is not in huge pages',
    );
    kernel.close(file);
  });

  test.each([{ shared: true }, { hugepages: true, hugepage_size: 2 * MIB, reserve: false }])('is not %j', (more) => {
    const before = openDescriptors();
    const file = contents(4 * MIB);
    const config = { size: 4 * MIB, ...more };
    expect(() => manager(config, new Map([[0, file]]))).toThrow(
      'memory_restore_mode=map: accepted is memory that is neither shared nor in huge pages',
    );
    kernel.close(file);
    expect(newDescriptors(before)).toEqual([]);
  });
});
