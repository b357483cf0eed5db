import { describe, expect, test } from '@jest/globals';
import {
  CR4_LA57,
  CR4_PSE,
  CR4_SMAP,
  CR4_SMEP,
  CR0_PG,
  CR0_WP,
  Flag,
  RAX,
  RCX,
  RDI,
  RDX,
  RFLAGS,
  RIP,
  RSI,
  RSP,
} from '../../../src/hypervisor/mshv/emulator/cpu.js';
import { Outcome } from '../../../src/hypervisor/mshv/emulator/emulator.js';
import {
  ACCESSED,
  CODE,
  DATA,
  DEVICE,
  DIRTY,
  Guest,
  NX,
  P,
  PD,
  PDPT,
  PML4,
  PS,
  PT,
  RAM,
  RW,
  US,
} from '../../support/instruction-check-guest.js';

const RBX = 3;
const RBP = 5;

function deviceGuest(...bytes: number[]): Guest {
  const guest = new Guest().code(...bytes);
  guest.cpu.set(RBX, DEVICE);
  return guest;
}

describe('a device access', () => {
  test('a load asks once and moves RIP', () => {
    const guest = deviceGuest(0x8b, 0x43, 0x10); // mov eax, [rbx+16]
    guest.cpu.set(RAX, -1);
    guest.answers = [0x1234_5678n];
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(['read d0000010 4']);
    expect(guest.cpu.get(RAX)).toBe(0x1234_5678n);
    expect(guest.cpu.get(RIP)).toBe(BigInt(CODE + 3));
    expect(guest.cpu.loads).toBe(1);
  });

  test('the bytes that the hypervisor gave are used, and what is missing is fetched', () => {
    for (const given of [0, 1, 2, 3]) {
      const guest = deviceGuest(0x8b, 0x43, 0x10);
      const bytes = Uint8Array.of(0x8b, 0x43, 0x20).subarray(0, given);
      expect(guest.step(bytes)).toBe(Outcome.Done);
      expect(guest.accesses).toEqual([given === 3 ? 'read d0000020 4' : 'read d0000010 4']);
    }
  });

  test('eight bytes are one access, sixteen are two', () => {
    const guest = deviceGuest(0x48, 0x89, 0x03); // mov [rbx], rax
    guest.cpu.set(RAX, 0x1_0000_0002n);
    expect(guest.step()).toBe(Outcome.Done);
    const vector = deviceGuest(0x0f, 0x11, 0x0b); // movups [rbx], xmm1
    vector.cpu.vectors[32] = 1;
    vector.cpu.vectors[40] = 2;
    expect(vector.step()).toBe(Outcome.Done);
    expect([...guest.accesses, ...vector.accesses]).toEqual([
      'write d0000000 8 100000002',
      'write d0000000 8 1',
      'write d0000008 8 2',
    ]);
  });

  test('a modification reads, then writes, once each', () => {
    const guest = deviceGuest(0xf0, 0x09, 0x03); // lock or [rbx], eax
    guest.cpu.set(RAX, 0xf0);
    guest.answers = [0xffff_ff01n];
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(['read d0000000 4', 'write d0000000 4 fffffff1']);
    expect(guest.cpu.get(RFLAGS)).toBe(BigInt(2 | Flag.SF));
  });

  test('an operand that lies half in RAM', () => {
    const guest = new Guest().code(0x8b, 0x03); // mov eax, [rbx]
    guest.ram.entry(PT + 8 * 0x21, BigInt(DEVICE) | P | RW);
    guest.cpu.set(RBX, DATA + 0xffd);
    guest.ram.bytes.set([1, 2, 3], DATA + 0xffd);
    guest.answers = [4n];
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(['read d0000000 1']);
    expect(guest.cpu.get(RAX)).toBe(0x0403_0201n);
    guest.code(0x89, 0x03).cpu.set(RIP, CODE);
    guest.code(0x89, 0x03); // mov [rbx], eax
    guest.cpu.set(RAX, 0x8765_4321n);
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses.at(-1)).toBe('write d0000000 1 87');
    expect([...guest.ram.bytes.subarray(DATA + 0xffd, DATA + 0x1000)]).toEqual([0x21, 0x43, 0x65]);
  });

  test('REP MOVSB from a device: one iteration a call', () => {
    const guest = new Guest().code(0xf3, 0xa4);
    guest.cpu.set(RSI, DEVICE);
    guest.cpu.set(RDI, DATA);
    guest.cpu.set(RCX, 2);
    guest.answers = [7n, 8n];
    expect(guest.step()).toBe(Outcome.Done);
    expect([guest.cpu.get(RIP), guest.cpu.get(RCX), guest.cpu.get(RSI)]).toEqual([
      BigInt(CODE),
      1n,
      BigInt(DEVICE + 1),
    ]);
    expect(guest.step()).toBe(Outcome.Done);
    expect([guest.cpu.get(RIP), guest.cpu.get(RCX)]).toEqual([BigInt(CODE + 2), 0n]);
    expect([...guest.ram.bytes.subarray(DATA, DATA + 3)]).toEqual([7, 8, 0]);
  });

  test('INS and OUTS go between a port and memory', () => {
    const guest = new Guest().code(0x6d); // insd
    guest.cpu.set(RDX, 0x1234);
    guest.cpu.set(RDI, DEVICE);
    guest.answers = [0xabcdn];
    expect(guest.step()).toBe(Outcome.Done);
    guest.code(0x6e); // outsb
    guest.cpu.set(RSI, DATA);
    guest.ram.bytes[DATA] = 0x5a;
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(['in 1234 4', 'write d0000000 4 abcd', 'out 1234 1 5a']);
  });
});

test('CMPXCHG writes in either case', () => {
  const guest = deviceGuest(0xf0, 0x0f, 0xb1, 0x0b); // lock cmpxchg [rbx], ecx
  guest.cpu.set(RAX, 1);
  guest.cpu.set(RCX, 2);
  guest.answers = [5n];
  expect(guest.step()).toBe(Outcome.Done);
  expect(guest.accesses).toEqual(['read d0000000 4', 'write d0000000 4 5']);
  expect(guest.cpu.get(RAX)).toBe(5n);
});

test('an operand across a multiple of 4 GiB', () => {
  const guest = new Guest().code(0x8b, 0x03); // mov eax, [rbx]
  guest.cpu.set(RBX, 0xffff_fffe);
  // The first page of the fifth GiB is the device's.
  guest.ram.entry(PDPT + 4 * 8, 0xc000_0000n | P | RW | PS);
  expect(guest.step()).toBe(Outcome.Done);
  expect(guest.accesses).toEqual(['read fffffffe 2', 'read c0000000 2']);
});

test('an instruction that is done clears RF', () => {
  const guest = deviceGuest(0x8b, 0x03);
  guest.cpu.set(RFLAGS, 2 | Flag.RF);
  expect(guest.step()).toBe(Outcome.Done);
  expect(guest.cpu.get(RFLAGS)).toBe(2n);
});

describe('a fault leaves everything as it was', () => {
  function faulted(guest: Guest, vector: number, errorCode: number, hasErrorCode = true): void {
    const before = guest.cpu.words.slice();
    expect(guest.step()).toBe(Outcome.Fault);
    expect(guest.emulator.fault).toMatchObject({ vector, errorCode, hasErrorCode });
    before[RFLAGS * 2] |= Flag.RF;
    expect(guest.cpu.words).toEqual(before);
    expect(guest.accesses).toEqual([]);
  }

  test('MOVS to a page that is not there reads no device', () => {
    const guest = new Guest().code(0xf3, 0xa4);
    guest.cpu.set(RSI, DEVICE);
    guest.cpu.set(RDI, 0x80_0000);
    guest.cpu.set(RCX, 2);
    faulted(guest, 14, 2);
    expect(guest.emulator.fault).toMatchObject({ cr2Low: 0x80_0000, cr2High: 0 });
  });

  test.each([
    ['not canonical, by DS', RBX, 13],
    ['not canonical, by SS', RBP, 12],
  ])('%s', (_, base, vector) => {
    const guest = new Guest().code(0x8b, 0x40 | base, 0); // mov eax, [base+0]
    guest.cpu.set(base, 0x8000_0000_0000n);
    faulted(guest, vector, 0);
    // The last byte counts too.
    guest.cpu.set(base, 0x7fff_ffff_fffen);
    faulted(guest, vector, 0);
  });

  test('with five levels, canonical is 57 bits', () => {
    const guest = new Guest().code(0x8b, 0x03);
    guest.cpu.cr4 |= CR4_LA57;
    guest.cpu.cr3Low = 0x3_4000;
    guest.ram.entry(0x3_4000, BigInt(PML4) | P | RW | US);
    guest.ram.entry(0x3_4008, BigInt(PML4) | P | RW | US);
    guest.cpu.set(RBX, 0x1_0000_0000_0000n + BigInt(DEVICE));
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(['read d0000000 4']);
    guest.accesses.length = 0;
    guest.cpu.set(RIP, CODE);
    guest.cpu.set(RBX, 0x100_0000_0000_0000n);
    faulted(guest, 13, 0);
  });

  test.each([
    ['beyond the limit', { limit: 0xfff }, 0xffd, 13],
    ['not writable', { attributes: 0xc091 }, 0, 13],
    ['not present', { attributes: 0 }, 0, 13],
    ['expand-down, below the limit', { attributes: 0xc097, limit: 0xfff }, 0xfff, 13],
  ])('segment: %s', (_, change, offset, vector) => {
    const guest = new Guest('protected').code(0x89, 0x03); // mov [ebx], eax
    Object.assign(guest.cpu.segments[3], change);
    guest.cpu.set(RBX, offset);
    faulted(guest, vector, 0);
  });

  test('expand-down segments reach up from their limit', () => {
    const guest = new Guest('protected').code(0x89, 0x03);
    Object.assign(guest.cpu.segments[3], { attributes: 0xc097, limit: 0xfff, baseLow: DEVICE });
    guest.cpu.set(RBX, 0x1000);
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(['write d0001000 4 0']);
  });

  test('real mode has no error codes', () => {
    const guest = new Guest('real').code(0x89, 0x07); // mov [bx], ax
    guest.cpu.set(RBX, 0xffff);
    faulted(guest, 13, 0, false);
  });

  test('an aligned move to where it is not aligned', () => {
    const guest = deviceGuest(0x0f, 0x28, 0x03); // movaps xmm0, [rbx]
    guest.cpu.set(RBX, DEVICE + 8);
    faulted(guest, 13, 0);
  });

  test('bytes that are no instruction', () => {
    faulted(new Guest().code(0x06), 6, 0, false);
    faulted(new Guest().code(...new Array<number>(14).fill(0x66), 0x8b, 0x03), 13, 0);
  });
});

describe('page tables', () => {
  const page = PT + 8 * (DATA >> 12);

  /** A store to DATA, with this entry. */
  function store(entry: bigint, mode: 'long' | 'user' = 'long', cr0 = 0, cr4 = 0, flags = 2): Guest {
    const guest = new Guest(mode).code(0xc6, 0x03, 0x99); // mov byte [rbx], 99h
    guest.cpu.set(RBX, DATA);
    guest.cpu.set(RFLAGS, flags);
    guest.cpu.cr0 |= cr0;
    guest.cpu.cr4 |= cr4;
    guest.ram.entry(page, BigInt(DATA) | entry);
    // The code is its ring's own, for SMEP.
    if (mode === 'long') guest.ram.entry(PT + 8 * (CODE >> 12), BigInt(CODE) | P | RW);
    return guest;
  }

  test.each<[string, () => Guest, number | 'done']>([
    ['not present', () => store(RW | US), 2],
    ['not present, user', () => store(RW | US, 'user'), 6],
    ['supervisor page, user', () => store(P | RW, 'user'), 7],
    ['read-only, user', () => store(P | US, 'user'), 7],
    ['read-only, supervisor, WP', () => store(P, 'long', CR0_WP), 3],
    ['read-only, supervisor, no WP', () => store(P), 'done'],
    ['user page, SMAP', () => store(P | RW | US, 'long', 0, CR4_SMAP), 3],
    ['user page, SMAP and AC', () => store(P | RW | US, 'long', 0, CR4_SMAP, 2 | Flag.AC), 'done'],
    ['user page, SMEP', () => store(P | RW | US, 'long', 0, CR4_SMEP), 'done'],
    ['execute-disable', () => store(P | RW | NX), 'done'],
  ])('%s', (_, make, expected) => {
    const guest = make();
    const outcome = guest.step();
    if (expected === 'done') expect(outcome).toBe(Outcome.Done);
    else {
      expect(outcome).toBe(Outcome.Fault);
      expect(guest.emulator.fault).toMatchObject({ vector: 14, errorCode: expected, cr2Low: DATA });
    }
    expect(guest.ram.bytes[DATA]).toBe(expected === 'done' ? 0x99 : 0);
  });

  test('a store sets accessed and dirty, a load accessed alone', () => {
    const guest = store(P | RW);
    expect(guest.step()).toBe(Outcome.Done);
    const entry = (at: number) => guest.ram.view.getBigUint64(at, true);
    expect(entry(page) & (ACCESSED | DIRTY)).toBe(ACCESSED | DIRTY);
    for (const at of [PML4, PDPT, PD, PT + 8 * (CODE >> 12)]) expect(entry(at) & (ACCESSED | DIRTY)).toBe(ACCESSED);
  });

  test('fetching from where it is forbidden', () => {
    const code = PT + 8 * (CODE >> 12);
    for (const [entry, mode, cr4, error] of [
      [P | RW | NX, 'long', 0, 0x11],
      [P | RW | US, 'long', CR4_SMEP, 0x11],
      [P | RW, 'user', 0, 0x15],
      [0n, 'long', 0, 0x10],
    ] as const) {
      const guest = new Guest(mode).code(0x8b, 0x03);
      guest.cpu.cr4 |= cr4;
      guest.ram.entry(code, BigInt(CODE) | entry);
      expect(guest.step()).toBe(Outcome.Fault);
      expect(guest.emulator.fault).toMatchObject({ vector: 14, errorCode: error, cr2Low: CODE });
    }
  });

  test('reserved bits: the size bit of the top level, address bits of large pages', () => {
    for (const [at, entry] of [
      [PML4, BigInt(PDPT) | P | RW | PS],
      [PDPT + 3 * 8, 0xc000_2000n | P | RW | PS],
    ] as const) {
      const guest = deviceGuest(0x8b, 0x03);
      guest.ram.entry(at, entry);
      expect(guest.step(Uint8Array.of(0x8b, 0x03))).toBe(Outcome.Fault);
      expect(guest.emulator.fault.errorCode).toBe(9);
    }
  });

  test('an instruction at the end of a page whose neighbour is not there', () => {
    const guest = new Guest();
    guest.cpu.set(RIP, CODE + 0xffe);
    guest.code(0x8b, 0x43, 0x10);
    guest.ram.entry(PT + 8 * ((CODE >> 12) + 1), 0n);
    expect(guest.step()).toBe(Outcome.Fault);
    expect(guest.emulator.fault).toMatchObject({ vector: 14, errorCode: 0x10, cr2Low: CODE + 0x1000 });
    // A short one needs no neighbour.
    guest.code(0x8b, 0x03);
    guest.cpu.set(RBX, DEVICE);
    expect(guest.step()).toBe(Outcome.Done);
  });

  test('tables that point at themselves, or where there is no RAM', () => {
    const guest = deviceGuest(0x8b, 0x03);
    guest.ram.entry(PML4, BigInt(PML4) | P | RW | US);
    expect([Outcome.Done, Outcome.Fault, Outcome.Unknown]).toContain(guest.step());
    guest.ram.entry(PML4, 0xfff_ffff_f000n | P | RW);
    expect(guest.step()).toBe(Outcome.Unknown);
    expect(guest.emulator.describe()).toMatch(/page tables reach guest address 0xffffffff000, which is not RAM/);
    expect(guest.ram.violations).toEqual([]);
  });

  test('4 MiB pages of 32-bit paging reach above 4 GiB', () => {
    const guest = new Guest('protected').code(0x89, 0x03); // mov [ebx], eax
    guest.cpu.cr0 |= CR0_PG;
    guest.cpu.cr4 = CR4_PSE;
    guest.cpu.cr3Low = PML4;
    guest.ram.view.setUint32(PML4, Number(P | RW | PS), true);
    guest.ram.view.setUint32(PML4 + 4, Number(P | RW | PS) | (0x12 << 13) | 0x0040_0000, true);
    guest.cpu.set(RBX, 0x40_0010);
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(['write 1200400010 4 0']);
  });
});

describe('what is not emulated', () => {
  test('says what it is, and where', () => {
    const guest = deviceGuest(0xd9, 0x03); // fld dword [rbx]
    expect(guest.step()).toBe(Outcome.Unknown);
    expect(guest.emulator.describe()).toBe(
      `The guest's instruction 'fld dword ptr [rbx]' (d903, 64-bit code) at RIP 0x10000 cannot be carried out: it is not emulated`,
    );
  });

  test('code outside RAM', () => {
    const guest = new Guest('protected');
    guest.cpu.set(RIP, RAM);
    expect(guest.step()).toBe(Outcome.Unknown);
    expect(guest.emulator.describe()).toMatch(/lies at guest address 0x40000, which is not RAM/);
  });
});

describe('vectors with AVX', () => {
  test('a load clears the upper half, one without V leaves it', () => {
    const guest = deviceGuest(0xc5, 0xfa, 0x6f, 0x03); // vmovdqu xmm0, [rbx]
    guest.cpu.vectors.fill(0xee);
    guest.answers = [1n, 2n];
    expect(guest.step()).toBe(Outcome.Done);
    expect([...guest.cpu.vectors.subarray(0, 33)]).toEqual([
      1,
      ...new Array<number>(7).fill(0),
      2,
      ...new Array<number>(23).fill(0),
      0xee,
    ]);
    guest.code(0xf3, 0x0f, 0x6f, 0x0b); // movdqu xmm1, [rbx]
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.cpu.vectors[32]).toBe(0);
    expect(guest.cpu.vectors[48]).toBe(0xee);
  });

  test('32 bytes go in four pieces', () => {
    const guest = deviceGuest(0xc5, 0xfe, 0x7f, 0x03); // vmovdqu [rbx], ymm0
    guest.cpu.vectors.set([1, 2, 3, 4].flatMap((value) => [value, 0, 0, 0, 0, 0, 0, 0]));
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.accesses).toEqual(
      [0, 8, 16, 24].map((at, index) => `write ${(DEVICE + at).toString(16)} 8 ${index + 1}`),
    );
  });
});

describe('the stack', () => {
  test('POP computes its operand with the new stack pointer', () => {
    const guest = new Guest().code(0x8f, 0x04, 0x24); // pop qword [rsp]
    guest.ram.bytes[DATA + 0x800] = 0x77;
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.cpu.get(RSP)).toBe(BigInt(DATA + 0x808));
    expect(guest.ram.bytes[DATA + 0x808]).toBe(0x77);
  });

  test('CALL through a device, and not to where no code can be', () => {
    const guest = deviceGuest(0xff, 0x13); // call [rbx]
    guest.answers = [0x1234n];
    expect(guest.step()).toBe(Outcome.Done);
    expect(guest.cpu.get(RIP)).toBe(0x1234n);
    expect(guest.ram.view.getBigUint64(DATA + 0x7f8, true)).toBe(BigInt(CODE + 2));
    guest.cpu.set(RIP, CODE);
    guest.answers = [0x8000_0000_0000n];
    expect(guest.step()).toBe(Outcome.Fault);
    expect(guest.emulator.fault).toMatchObject({ vector: 13, errorCode: 0 });
    expect(guest.cpu.get(RIP)).toBe(BigInt(CODE));
  });
});

test('code that changes in its place is decoded anew, and forms are counted', () => {
  const guest = deviceGuest(0x8b, 0x03);
  guest.step();
  guest.cpu.set(RIP, CODE);
  guest.code(0x89, 0x03).step();
  guest.cpu.set(RIP, CODE);
  guest.code(0x8b, 0x03).step();
  expect(guest.accesses.map((access) => access.split(' ')[0])).toEqual(['read', 'write', 'read']);
  expect(guest.emulator.formsMet).toBe(2);
});

test('a bit offset of 64 bits reaches as far', () => {
  const guest = deviceGuest(0x48, 0x0f, 0xa3, 0x03); // bt [rbx], rax
  guest.cpu.set(RAX, -0x4000_0000_0000_0000n + 64n + 3n);
  guest.cpu.set(RBX, 0x0800_0000_0000_0000n + BigInt(DEVICE));
  guest.answers = [8n];
  expect(guest.step()).toBe(Outcome.Done);
  expect(guest.accesses).toEqual(['read d0000008 8']);
  expect(guest.cpu.get(RFLAGS)).toBe(BigInt(2 | Flag.CF));
});

test('the same bytes mean other things in other modes', () => {
  const guest = deviceGuest(0x48, 0x8b, 0x03); // mov rax, [rbx]; in 32-bit code: dec eax
  guest.step();
  expect(guest.accesses).toEqual(['read d0000000 8']);
  guest.cpu.segments[1].attributes = 0xc09b;
  guest.cpu.set(RIP, CODE);
  guest.cpu.set(RAX, 5);
  expect(guest.step()).toBe(Outcome.Done);
  expect([guest.cpu.get(RAX), guest.cpu.get(RIP)]).toEqual([4n, BigInt(CODE + 1)]);
});
