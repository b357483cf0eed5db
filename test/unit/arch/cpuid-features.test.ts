/** Whether a guest's processor is there. */
import { expect, test } from '@jest/globals';
import { missingFeatures } from '../../../src/arch/x86_64/cpuid-features.js';
import type { CpuidEntry } from '../../../src/hypervisor/x86-state.js';

const NONE = { index: 0, significantIndex: false, eax: 0, ebx: 0, ecx: 0, edx: 0 };
const entry = (leaf: number, more: Partial<CpuidEntry> = {}): CpuidEntry => ({ ...NONE, function: leaf, ...more });
const vendor = entry(0, { eax: 0x20, ebx: 1, ecx: 2, edx: 3 });
const lacks = (told: CpuidEntry, ...has: CpuidEntry[]) => missingFeatures([vendor, told], [vendor, ...has]);
const indexed = (index: number, more: Partial<CpuidEntry>) => entry(7, { significantIndex: true, index, ...more });

test('a processor that has more, or another highest leaf, will do', () => {
  const told = [{ ...vendor, eax: 7 }, entry(1, { ecx: 0x8000_0001 | 0, edx: 5 }), indexed(0, { ebx: 1 })];
  const has = [vendor, entry(1, { ecx: 0xffff_ffff, edx: 0xffff_ffff }), indexed(0, { ebx: 3 }), indexed(1, {})];
  expect(missingFeatures(told, has)).toEqual([]);
});

test.each([
  ['1 ECX 0x1', entry(1, { ecx: 3 }), entry(1, { ecx: 2 })],
  ['1 EDX 0x80000000', entry(1, { edx: 0x8000_0000 }), entry(1)],
  ['7 EBX 0x20', indexed(0, { ebx: 0x20 }), indexed(1, { ebx: 0x20 })],
  ['7 ECX 0x4', indexed(0, { ecx: 4 }), indexed(0, { ebx: 4 })],
  ['7 EAX 0x10', indexed(1, { eax: 0x10 }), indexed(0, { eax: 0x10 })],
  ['7 EDX 0x8', indexed(2, { edx: 8 }), indexed(1, { edx: 8 })],
  ['d EAX 0x60000', entry(0xd, { eax: 0x6_0007 }), entry(0xd, { eax: 7 })],
  ['80000001 ECX 0x20', entry(0x8000_0001, { ecx: 0x20 }), entry(0x8000_0001)],
  ['80000001 EDX 0x20000000', entry(0x8000_0001, { edx: 1 << 29 }), entry(0x8000_0001)],
  ['80000008 EBX 0x1000', entry(0x8000_0008, { ebx: 0x1000 }), entry(0x8000_0008)],
])('%s is missing', (line, told, has) => {
  expect(lacks(told, has)).toContain(line);
  expect(lacks(told, told)).toEqual([]);
  // A leaf that is not there has nothing.
  expect(lacks(told)).not.toEqual([]);
});

test('what tells of the system rather than of the processor does not count', () => {
  // OSXSAVE and the hypervisor's bit; HTT; CmpLegacy and TopologyExtensions.
  expect(lacks(entry(1, { ecx: (1 << 27) | (1 << 31), edx: 1 << 28 }), entry(1))).toEqual([]);
  expect(lacks(entry(0x8000_0001, { ecx: (1 << 1) | (1 << 22) }), entry(0x8000_0001))).toEqual([]);
});

test('a processor of another vendor', () => {
  expect(missingFeatures([vendor], [{ ...vendor, ecx: 9 }])).toEqual(['0']);
  expect(missingFeatures([], [vendor])).toEqual(['0']);
});
