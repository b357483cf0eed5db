/** Whatever a guest has in its registers, its memory and its page tables: the emulator comes to an end and looks at RAM alone. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { RIP } from '../../../src/hypervisor/mshv/emulator/cpu.js';
import {
  CODE,
  DATA,
  DEVICE,
  Guest,
  type GuestMode,
  P,
  PD,
  PDPT,
  PML4,
  PT,
  RW,
  US,
} from '../../support/instruction-check-guest.js';

const modes = fc.constantFrom<GuestMode>('long', 'user', 'protected', 'real');
const word64 = fc.oneof(
  fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn }),
  fc.constantFrom(0n, 0xffff_ffff_ffff_ffffn, 0x7fff_ffff_ffffn, BigInt(DEVICE), BigInt(DATA), BigInt(CODE + 0xff8)),
);
const registers = fc.array(word64, { minLength: 16, maxLength: 16 });
/** Half of them begin as something that touches memory. */
const code = fc.oneof(
  fc.uint8Array({ minLength: 0, maxLength: 16 }),
  fc
    .tuple(
      fc.constantFrom([], [0x66], [0x67], [0xf3], [0xf2], [0xf0], [0x64], [0x48], [0x67, 0x4f]),
      fc.constantFrom([0x8b], [0x89], [0x0f, 0xa3], [0x0f, 0xb1], [0xa4], [0xa7], [0x6d], [0xff], [0x0f, 0x11], [0xc7]),
      fc.uint8Array({ minLength: 10, maxLength: 10 }),
    )
    .map(([prefix, opcode, rest]) => Uint8Array.of(...prefix, ...opcode, ...rest)),
);
const flags = fc.integer({ min: 0, max: 0x3f_ffff });

/** Puts the state in, and looks at what the emulator does with it. */
function check(guest: Guest, values: readonly bigint[], rflags: number, bytes: Uint8Array, given: number): void {
  values.forEach((value, index) => guest.cpu.set(index, value));
  guest.cpu.words[34] = rflags & ~(1 << 17);
  guest.code(...bytes);
  const outcome = guest.step(Uint8Array.from(bytes.subarray(0, given)));
  expect(outcome).toBeGreaterThanOrEqual(0);
  expect(guest.ram.violations).toEqual([]);
  if (outcome === 6) expect(guest.emulator.describe()).toMatch(/cannot be carried out/);
  for (const access of guest.accesses)
    expect(access).toMatch(/^(?:(?:read|write) [0-9a-f]+ [1248]|(?:in|out) [0-9a-f]{1,4} [124])/);
}

test('any bytes at RIP', () => {
  fc.assert(
    fc.property(modes, registers, flags, code, fc.nat(16), (mode, values, rflags, bytes, given) => {
      check(new Guest(mode), values, rflags, bytes, given);
    }),
    { numRuns: 400 },
  );
});

test('any bytes at the end of a page whose neighbour is not there', () => {
  fc.assert(
    fc.property(registers, code, fc.integer({ min: 1, max: 15 }), (values, bytes, room) => {
      const guest = new Guest();
      guest.ram.entry(PT + 8 * ((CODE >> 12) + 1), 0n);
      guest.cpu.set(RIP, CODE + 0x1000 - room);
      check(guest, values, 2, bytes, 0);
    }),
    { numRuns: 200 },
  );
});

test('any page tables', () => {
  const entry = fc.oneof(
    word64,
    fc.constantFrom(PML4, PDPT, PD, PT, CODE, DATA, DEVICE, 0xffff_f000).map((at) => BigInt(at) | P | RW | US),
  );
  const changes = fc.array(fc.tuple(fc.constantFrom(PML4, PDPT, PD, PT), fc.nat(511), entry), { maxLength: 6 });
  const roots = fc.tuple(fc.constantFrom(PML4, PDPT, 0, 0xffff_f000), fc.constantFrom(0, 0xf_ffff, 0xffff_ffff));
  const controls = fc.tuple(fc.integer(), fc.integer(), fc.constantFrom(0, 0x400, 0x500, 0xd00, 0x800));
  fc.assert(
    fc.property(
      registers,
      changes,
      roots,
      controls,
      code,
      fc.nat(16),
      (values, entries, root, control, bytes, given) => {
        const guest = new Guest();
        for (const [table, index, value] of entries) guest.ram.entry(table + index * 8, value);
        [guest.cpu.cr3Low, guest.cpu.cr3High] = root;
        // All modes of paging: CR0, CR4 and EFER at random.
        [guest.cpu.cr0, guest.cpu.cr4, guest.cpu.eferLow] = control;
        check(guest, values, 2, bytes, given);
      },
    ),
    { numRuns: 400 },
  );
});

test('any segments', () => {
  const segment = fc.record({
    baseLow: fc.integer({ min: 0, max: 0xffff_ffff }),
    baseHigh: fc.constantFrom(0, 0xffff_8000, 0xffff_ffff),
    limit: fc.constantFrom(0, 0xfff, 0xffff, 0xffff_ffff),
    attributes: fc.nat(0xffff),
  });
  const segments = fc.array(segment, { minLength: 6, maxLength: 6 });
  fc.assert(
    fc.property(modes, registers, segments, code, (mode, values, changes, bytes) => {
      const guest = new Guest(mode);
      changes.forEach((change, index) => Object.assign(guest.cpu.segments[index], change));
      guest.cpu.segments[1].baseLow = mode === 'real' ? CODE : 0;
      check(guest, values, 2, bytes, bytes.length);
    }),
    { numRuns: 400 },
  );
});
