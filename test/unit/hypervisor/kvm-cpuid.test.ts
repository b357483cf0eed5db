import { describe, expect, test } from '@jest/globals';
import { withoutAmx } from '../../../src/hypervisor/kvm/cpuid.js';
import type { CpuidEntry } from '../../../src/hypervisor/x86-state.js';

type Row = readonly [leaf: number, index: number, eax: number, ebx: number, ecx: number, edx: number];
const entries = (rows: readonly Row[]): CpuidEntry[] =>
  rows.map(([leaf, index, eax, ebx, ecx, edx]) => ({
    ...{ function: leaf, index, significantIndex: true },
    ...{ eax, ebx, ecx, edx },
  }));

/** Sapphire Rapids, as CPUID tells of it: AVX-512, PKRU, and AMX with its two components at the end of the area. */
const SAPPHIRE_RAPIDS: readonly Row[] = [
  [0, 0, 0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
  [7, 0, 2, 0xf3bf_bfeb, 0xfb40_7f5e, 0xffdc_4512],
  [7, 1, 0x0020_1c30, 0, 0, 0x0000_0100],
  [7, 2, 0, 0, 0, 0x1f],
  [0xd, 0, 0x6_02e7, 0x2b00, 0x2b00, 0],
  [0xd, 1, 0x1f, 0x2540, 0x1900, 0],
  [0xd, 2, 0x100, 0x240, 0, 0],
  [0xd, 5, 0x40, 0x440, 0, 0],
  [0xd, 6, 0x200, 0x480, 0, 0],
  [0xd, 7, 0x400, 0x680, 0, 0],
  [0xd, 8, 0x80, 0, 1, 0],
  [0xd, 9, 0x8, 0xa80, 0, 0],
  [0xd, 17, 0x40, 0xac0, 2, 0],
  [0xd, 18, 0x2000, 0xb00, 6, 0],
  [0x1d, 0, 1, 0, 0, 0],
  [0x1d, 1, 0x0400_2000, 0x0008_0040, 0x10, 0],
  [0x1e, 0, 0, 0x4010, 0, 0],
  [0x1f, 0, 1, 2, 0x100, 0],
];

describe('AMX, for which this process has not asked', () => {
  const left = withoutAmx(entries(SAPPHIRE_RAPIDS));
  const leaf = (number: number, index = 0) =>
    left.find((entry) => entry.function === number && entry.index === index) ?? { eax: 0, ebx: 0, ecx: 0, edx: 0 };

  test('is not offered: no instructions, no components, no tiles', () => {
    expect(leaf(7).edx).toBe(0xffdc_4512 - (1 << 22) - (1 << 24) - (1 << 25));
    expect([leaf(7, 1).eax, leaf(7, 1).edx]).toEqual([0x1c30, 0]);
    expect(leaf(0xd).eax).toBe(0x2e7);
    for (const [number, index] of [
      [0xd, 17],
      [0xd, 18],
      [0x1d, 0],
      [0x1d, 1],
      [0x1e, 0],
    ] as const)
      expect(leaf(number, index)).toEqual({ eax: 0, ebx: 0, ecx: 0, edx: 0 });
    // Extended feature disable, which serves AMX alone.
    expect(leaf(0xd, 1).eax).toBe(0xf);
  });

  test('is not part of the largest XSAVE area', () => {
    expect(leaf(0xd).ecx).toBe(0xa88);
    const plain = entries([
      [0xd, 0, 0x6_0003, 0x2b00, 0x2b00, 0],
      [0xd, 17, 0x40, 0xac0, 2, 0],
    ]);
    expect(withoutAmx(plain)[0].ecx).toBe(576);
  });

  test('changes nothing else, and nothing on a processor without it', () => {
    const changed = [7, 0xd, 0x1d, 0x1e];
    const same = entries(SAPPHIRE_RAPIDS).filter((entry) => !changed.includes(entry.function));
    expect(left.filter((entry) => !changed.includes(entry.function))).toEqual(same);
    expect([leaf(7).ebx, leaf(7).ecx, leaf(7, 2).edx]).toEqual([0xf3bf_bfeb, 0xfb40_7f5e, 0x1f]);
    expect(withoutAmx(left)).toEqual(left);
    const none = entries([
      [0xd, 0, 7, 0x340, 0x340, 0],
      [0xd, 1, 7, 0x340, 0, 0],
      [0xd, 2, 0x100, 0x240, 0, 0],
    ]);
    expect(withoutAmx(none)).toEqual(none);
  });
});
