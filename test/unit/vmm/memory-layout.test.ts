/** Where memory zones lie. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import * as arm64 from '../../../src/arch/aarch64/layout.js';
import * as x86 from '../../../src/arch/x86_64/layout.js';
import { type MemoryZone, zonesOf } from '../../../src/config/memory-config.js';
import type { MemoryFile } from '../../../src/vmm/host/memory-file.js';
import { layoutMemory } from '../../../src/vmm/memory/memory-layout.js';
import { memoryOf } from '../../support/memory-layouts.js';

const [MIB, GIB] = [2 ** 20, 2 ** 30];
const zones = (...list: object[]) =>
  zonesOf(
    memoryOf({
      size: 0,
      hotplug_method: 'VirtioMem',
      zones: list.map((zone, index) => ({ id: `z${index}`, ...zone })) as never,
    }),
  );
const ranges = (list: readonly MemoryZone[], windows = x86.RAM_WINDOWS) =>
  layoutMemory(list, windows, 2 ** 32).zones.map(({ ram }) => ram.map(({ address, size }) => [address, size]));
const huge = (size: number) => ({ hugepages: true, hugepage_size: size });

test('each begins where the one before it ends, and goes on behind the hole', () => {
  // The example of Cloud Hypervisor's own documentation.
  expect(ranges(zones({ size: GIB }, { size: 4 * GIB }))).toEqual([
    [[0, GIB]],
    [
      [GIB, 2 * GIB],
      [4 * GIB, 2 * GIB],
    ],
  ]);
  expect(ranges(zones({ size: 3 * GIB }, { size: GIB }))).toEqual([[[0, 3 * GIB]], [[4 * GIB, GIB]]]);
});

test('a huge page is never divided, and what comes behind the hole stays there', () => {
  expect(ranges(zones({ size: 512 * MIB }, { size: 4 * GIB, ...huge(GIB) }, { size: MIB }))).toEqual([
    [[0, 512 * MIB]],
    [
      [512 * MIB, 2 * GIB],
      [4 * GIB, 2 * GIB],
    ],
    [[6 * GIB, MIB]],
  ]);
  // Low RAM of that machine is no multiple of such pages.
  expect(ranges(zones({ size: 4 * GIB, ...huge(GIB) }), arm64.RAM_WINDOWS)).toEqual([
    [
      [GIB, 2 * GIB],
      [4 * GIB, 2 * GIB],
    ],
  ]);
  const file = { fd: -1, pageSize: GIB, close: () => undefined };
  const { ram } = layoutMemory(zones({ size: 4 * GIB }), arm64.RAM_WINDOWS, 0, new Map([['z0', file]]));
  expect(ram.map(({ size }) => size)).toEqual([2 * GIB, 2 * GIB]);
});

test('what each can plug lies behind all RAM, in their order', () => {
  const list = zones(
    { size: GIB, hotplug_size: 128 * MIB },
    { size: GIB },
    { size: 2 * GIB, hotplug_size: GIB, ...huge(GIB) },
  );
  const layout = layoutMemory(list, x86.RAM_WINDOWS, 2 ** 32);
  expect(layout.zones.map(({ hotplug }) => hotplug)).toEqual([
    { address: 5 * GIB, size: 128 * MIB },
    undefined,
    { address: 6 * GIB, size: GIB },
  ]);
  expect(layout.end).toBe(7 * GIB);
});

test('RAM of any zones is theirs to the byte, in order, within the windows, by whole pages', () => {
  const zone = fc
    .record({
      page: fc.constantFrom(4096, 2 * MIB, GIB),
      filed: fc.boolean(),
      count: fc.integer({ min: 1, max: 2000 }),
    })
    .map(({ page, filed, count }) => ({ page, filed, size: page * (page === GIB ? 1 + (count % 5) : count) }));
  fc.assert(
    fc.property(
      fc.array(zone, { minLength: 1, maxLength: 8 }),
      fc.constantFrom(x86, arm64),
      (list, { RAM_WINDOWS: windows }) => {
        const files = new Map<string, MemoryFile>();
        const made = zones(
          ...list.map(({ page, filed, size }, index) => {
            if (filed) files.set(`z${index}`, { fd: -1, pageSize: page, close: () => undefined });
            return { size, ...(filed || page === 4096 ? {} : huge(page)) };
          }),
        );
        const layout = layoutMemory(made, windows, 2 ** 32, files);
        let end = 0;
        layout.zones.forEach(({ zone: { size }, ram }, index) => {
          const { page } = list[index];
          expect(ram.reduce((sum, range) => sum + range.size, 0)).toBe(size);
          for (const range of ram) {
            expect(range.address).toBeGreaterThanOrEqual(end);
            end = range.address + range.size;
            expect(range.size % page).toBe(0);
            expect(range.size).toBeGreaterThan(0);
            const within = windows.some(({ address, size: room }) => range.address >= address && end <= address + room);
            expect(within).toBe(true);
            // No gap but at the end of a window.
            const starts = [
              ...windows.map(({ address }) => address),
              ...layout.zones.flatMap((other) => other.ram.map((one) => one.address + one.size)),
            ];
            expect(starts).toContain(range.address);
          }
        });
        const all = layout.ram.reduce((sum, { size }) => sum + size, 0);
        expect(all).toBe(list.reduce((sum, { size }) => sum + size, 0));
        expect(layout.end).toBe(Math.max(end, 2 ** 32));
      },
    ),
    { numRuns: 300 },
  );
});
