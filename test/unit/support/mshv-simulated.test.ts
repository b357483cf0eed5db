/** The simulated /dev/mshv: what its messages say, and that whatever KVM did of an instruction is undone. */
import fs from 'node:fs';
import { afterEach, describe, expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { assemble, assembleEach, BareVmm, CODE } from '../../support/mshv/bare-vmm.js';

const hasKvm = fs.existsSync('/dev/kvm');
const { HVMSG } = abi;
const DEVICE = 0xd000_0000n;

let open: { vmm: BareVmm; vp: number } | undefined;
afterEach(() => {
  open?.vmm.close([open.vp]);
  open = undefined;
});

function guest(bits: 16 | 32 | 64, code: string | Uint8Array, registers: Parameters<BareVmm['enter']>[3] = {}) {
  const vmm = new BareVmm();
  const vp = vmm.createVp(0);
  open = { vmm, vp };
  vmm.enter(0, vp, bits, registers);
  vmm.load(typeof code === 'string' ? assemble(bits, code) : code);
  const at = (offset: number) => vmm.message.getBigUint64(offset, true);
  return { vmm, vp, at };
}

(hasKvm ? describe : describe.skip)('ports', () => {
  test('OUT and IN are told before they are carried out, and go on from the registers that the VMM sets', () => {
    const { vmm, vp, at } = guest(32, 'mov al, 0x41\nmov dx, 0x3f8\nout dx, al\nin eax, dx\nout 0x80, ax');
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    const start = CODE + 6;
    expect(at(abi.INTERCEPT.rip)).toBe(BigInt(start));
    expect(vmm.message.getUint16(abi.IO_PORT_MESSAGE.port, true)).toBe(0x3f8);
    expect(vmm.message.getUint8(abi.IO_PORT_MESSAGE.accessInfo)).toBe(1);
    expect(vmm.message.getUint8(abi.INTERCEPT.accessType)).toBe(abi.HV_INTERCEPT_ACCESS.WRITE);
    expect(vmm.message.getUint8(abi.INTERCEPT.instructionLength) & 0xf).toBe(1);
    expect(at(abi.IO_PORT_MESSAGE.rax) & 0xffn).toBe(0x41n);
    vmm.skipPort(0, vp);
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    expect(at(abi.INTERCEPT.rip)).toBe(BigInt(start + 1));
    expect(vmm.message.getUint8(abi.IO_PORT_MESSAGE.accessInfo)).toBe(4);
    expect(vmm.message.getUint8(abi.INTERCEPT.accessType)).toBe(abi.HV_INTERCEPT_ACCESS.READ);
    vmm.skipPort(0, vp, { RAX: 0x1234_5678n });
    expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
    expect(at(abi.IO_PORT_MESSAGE.rax)).toBe(0x1234_5678n);
    expect(vmm.message.getUint16(abi.IO_PORT_MESSAGE.port, true)).toBe(0x80);
    expect(vmm.message.getUint8(abi.IO_PORT_MESSAGE.accessInfo)).toBe(2);
    expect(vmm.message.getUint8(abi.INTERCEPT.instructionLength) & 0xf).toBe(3);
  });
});

type Registers = Parameters<BareVmm['enter']>[3] & object;

interface Form {
  readonly text: string;
  readonly registers?: Registers;
  readonly write: boolean;
  /** Bytes from DEVICE on. */
  readonly offset?: number;
  readonly bits?: 16 | 32 | 64;
  /** Only on a whole KVM. */
  readonly lab?: boolean;
}

/** Instructions that read or write the device at DEVICE, with all that KVM may do for them. */
const FORMS: readonly Form[] = [
  { text: 'mov eax, [ebx]', write: false },
  { text: 'mov al, [ebx+3]', write: false, offset: 3 },
  { text: 'mov [ebx], eax', write: true },
  { text: 'mov byte ptr [ebx+5], cl', write: true, offset: 5 },
  { text: 'mov word ptr [ebx], dx', write: true },
  { text: 'mov dword ptr [ebx], 0x11223344', write: true },
  { text: 'mov byte ptr [ebx], 0x3e', write: true },
  { text: 'mov ds:0xd0000010, eax', write: true, offset: 16 },
  { text: 'mov eax, ds:0xd0000010', write: false, offset: 16 },
  { text: 'mov [ebx+ecx*4+8], ah', registers: { RCX: 2n }, write: true, offset: 16 },
  { text: 'movzx ecx, word ptr [ebx]', write: false },
  { text: 'or [ebx], eax', write: false },
  { text: 'lock add dword ptr [ebx], 1', write: false },
  { text: 'xchg [ebx], eax', write: false },
  { text: 'xadd [ebx], eax', write: false },
  { text: 'cmpxchg [ebx], ecx', write: false },
  { text: 'test dword ptr [ebx], 7', write: false },
  { text: 'div dword ptr [ebx]', write: false },
  { text: 'push dword ptr [ebx]', write: false },
  { text: 'pop dword ptr [ebx]', write: true },
  { text: 'call dword ptr [ebx]', write: false },
  { text: 'jmp dword ptr [ebx]', write: false },
  { text: 'movsd', registers: { RSI: DEVICE, RDI: 0x3000n }, write: false },
  { text: 'movsb', registers: { RSI: 0x3000n, RDI: DEVICE }, write: true },
  { text: 'std\nmovsd', registers: { RSI: DEVICE, RDI: 0x3000n }, write: false },
  { text: 'rep movsd', registers: { RSI: DEVICE, RDI: 0x3000n, RCX: 5n }, write: false },
  { text: 'rep movsd', registers: { RSI: 0x3000n, RDI: DEVICE, RCX: 5n }, write: true },
  { text: 'rep movsd', registers: { RSI: 0x3000n, RDI: DEVICE, RCX: 1n }, write: true },
  { text: 'std\nrep movsw', registers: { RSI: 0x3000n, RDI: DEVICE, RCX: 3n }, write: true },
  { text: 'stosd', registers: { RDI: DEVICE }, write: true },
  { text: 'rep stosb', registers: { RDI: DEVICE, RCX: 7n }, write: true },
  { text: 'lodsd', registers: { RSI: DEVICE }, write: false },
  { text: 'repne scasb', registers: { RDI: DEVICE, RCX: 7n }, write: false },
  { text: 'cmpsd', registers: { RSI: 0x3000n, RDI: DEVICE }, write: false },
  { text: 'sete [ebx]', write: true },
  { text: 'movnti [ebx], eax', write: true },
  { text: 'movups [ebx], xmm0', lab: true, write: true },
  { text: 'movups xmm0, [ebx]', lab: true, write: false },
  { text: 'movq [ebx], xmm1', lab: true, write: true },
  { text: 'mov [ebx], ax', registers: { RBX: DEVICE + 0xfffn }, write: true, offset: 0xfff },
  { text: 'mov rax, [rbx]', write: false, bits: 64 },
  { text: 'mov [rbx], rax', write: true, bits: 64 },
  { text: 'mov [r15], r14d', registers: { R15: DEVICE, R14: 0x77n }, write: true, bits: 64 },
  {
    text: 'mov byte ptr [r15+r14*8+0x40], sil',
    registers: { R15: DEVICE, R14: 2n },
    write: true,
    bits: 64,
    offset: 0x50,
  },
  { text: 'rep stosq', registers: { RDI: DEVICE, RCX: 4n }, write: true, bits: 64 },
  { text: 'mov [ebx], eax', write: true, bits: 16 },
  { text: 'rep movsb', registers: { RSI: DEVICE, RDI: 0x3000n, RCX: 5n }, write: false, bits: 64 },
];

const GENERAL = ['RAX', 'RCX', 'RDX', 'RBX', 'RSP', 'RBP', 'RSI', 'RDI'] as const;
/** Ends of instructions before, which look like prefixes of the one that is meant. */
const NEIGHBOURS = ['nop', '.byte 0xb0, 0x66', '.byte 0xb0, 0x3e', '.byte 0xb0, 0xf3'];

/** Whether this machine's KVM runs such code: where it is emulated, vectors and long mode are not to be had. */
function runs(bits: 16 | 32 | 64, lab: boolean): boolean {
  return hasKvm && ((bits === 32 && !lab) || process.env.VMM_IN_LAB !== undefined);
}

describe('memory', () => {
  for (const { text, registers = {}, write, offset = 0, bits = 32, lab = false } of FORMS) {
    const setUp = text.startsWith('std') ? ['std'] : [];
    const instruction = text.replace(/^std\n/, '');
    for (const [index, neighbour] of NEIGHBOURS.entries()) {
      // A KVM that only emulates knows few instructions; where there is a better one, as in a lab, all of them are tried.
      if (!runs(bits, lab)) continue;
      test(`${bits} bits: ${text} after ${neighbour}`, () => {
        const initial: Registers = {
          RAX: 0x8765_4321n,
          RBX: DEVICE,
          RCX: 0x11n,
          RDX: 0x22n,
          RBP: 0x3300n,
          ...registers,
        };
        const full = assembleEach(bits, [...setUp, neighbour, instruction, 'nop', 'out 0x10, al']);
        const { vmm, vp, at } = guest(bits, full, initial);
        for (let byte = 0x2000; byte < 0x9000; byte++) vmm.bytes[byte] = byte * 7;
        const before = vmm.bytes.slice();
        const before64 = assembleEach(bits, [...setUp, neighbour]).length;
        expect(vmm.run(vp)).toBe(HVMSG.UNMAPPED_GPA);
        expect(at(abi.INTERCEPT.rip)).toBe(BigInt(CODE + before64));
        if (offset >= 0) expect(at(abi.MEMORY_MESSAGE.guestPhysicalAddress)).toBe(DEVICE + BigInt(offset));
        const access = write ? abi.HV_INTERCEPT_ACCESS.WRITE : abi.HV_INTERCEPT_ACCESS.READ;
        expect(vmm.message.getUint8(abi.INTERCEPT.accessType)).toBe(access);
        const code = assemble(bits, instruction);
        const given = new Uint8Array(vmm.message.buffer, abi.MEMORY_MESSAGE.instructionBytes, code.length);
        expect(Buffer.from(given).equals(code)).toBe(true);
        expect(Buffer.compare(vmm.bytes, before)).toBe(0);
        const expected: Record<string, bigint> = { RSP: 0x8000n, RSI: 0n, RDI: 0n, ...initial };
        // The neighbours load AL, where they are no NOP.
        if (index > 0) expected.RAX = (expected.RAX & ~0xffn) | BigInt(assemble(32, neighbour)[1]);
        for (const name of GENERAL) expect([name, vmm.get(0, vp, name)]).toEqual([name, expected[name]]);
        expect(vmm.get(0, vp, 'RFLAGS')).toBe(setUp.length === 0 ? 2n : 0x402n);
        // The same again: nothing of the first time is left.
        expect(vmm.run(vp)).toBe(HVMSG.UNMAPPED_GPA);
        expect(at(abi.INTERCEPT.rip)).toBe(BigInt(CODE + before64));
        for (const name of GENERAL) expect([name, vmm.get(0, vp, name)]).toEqual([name, expected[name]]);
        expect(Buffer.compare(vmm.bytes, before)).toBe(0);
        // And past it, the guest goes on.
        vmm.set(0, vp, { RIP: BigInt(CODE + before64 + code.length) });
        expect(vmm.run(vp)).toBe(HVMSG.X64_IO_PORT_INTERCEPT);
      });
    }
  }
});
