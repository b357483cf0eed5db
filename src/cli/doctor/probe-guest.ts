/**
 * The guests of the live test: a few instructions by hand, for the state in which a stock kernel is entered.
 *
 * Each guest asks for a count by a port read, runs its loop that many times, answers by a port write and starts again, so
 * one guest serves every length of run. None halts: with KVM's interrupt controller a halted vCPU would sleep in the kernel.
 * Instructions: Intel SDM volume 2. Interrupt gates: volume 3, 6.14.1.
 */
import {
  type BootEntry,
  bootRegisters,
  bootSpecialRegisters,
  writeBootStructures,
} from '../../arch/x86_64/boot/entry.js';
import type { Vcpu } from '../../hypervisor/hypervisor.js';
import type { GuestMemory } from '../../memory/guest-memory.js';

export const PROBE_MODES = ['real', 'protected', 'long', 'exceptions'] as const;
export type ProbeMode = (typeof PROBE_MODES)[number];

/** Bytes: what the addresses below need, in one large page. */
export const PROBE_RAM = 0x20_0000;
export const PROBE_PORT = 0xe0;
/** Instructions of one turn of the loop, in every mode. */
export const LOOP_INSTRUCTIONS = 4;

const CODE = 0x1000;
const HANDLER = 0x2000;
const IDT = 0x3000;
/** The 64-bit code segment of writeBootStructures. */
const CODE64_SELECTOR = 0x10;
const VECTOR_INVALID_OPCODE = 6;
const GATE_SIZE = 16;
const RFLAGS_FIXED = 2n;

/** Sums and rotates: the answer is {@link checksum}. The same bytes in 32-bit and in 64-bit code. */
const LOOP = [
  ...[0xe5, PROBE_PORT], // start: in eax, PROBE_PORT
  ...[0x89, 0xc1], //             mov ecx, eax
  ...[0x31, 0xdb], //             xor ebx, ebx
  ...[0x01, 0xcb], //       loop: add ebx, ecx
  ...[0xd1, 0xc3], //             rol ebx, 1
  ...[0xff, 0xc9], //             dec ecx
  ...[0x75, 0xf8], //             jnz loop
  ...[0x89, 0xd8], //             mov eax, ebx
  ...[0xe7, PROBE_PORT], //       out PROBE_PORT, eax
  ...[0xeb, 0xec], //             jmp start
];

/** The same in 16-bit code: 0x66 makes an operand 32 bits wide. */
const LOOP_16 = [
  ...[0x66, 0xe5, PROBE_PORT], // start: in eax, PROBE_PORT
  ...[0x66, 0x89, 0xc1], //              mov ecx, eax
  ...[0x66, 0x31, 0xdb], //              xor ebx, ebx
  ...[0x66, 0x01, 0xcb], //        loop: add ebx, ecx
  ...[0x66, 0xd1, 0xc3], //              rol ebx, 1
  ...[0x66, 0xff, 0xc9], //              dec ecx
  ...[0x75, 0xf5], //                    jnz loop
  ...[0x66, 0x89, 0xd8], //              mov eax, ebx
  ...[0x66, 0xe7, PROBE_PORT], //        out PROBE_PORT, eax
  ...[0xeb, 0xe4], //                    jmp start
];

/** Counts the exceptions that its handler returned from: the answer is the count itself. */
const EXCEPTIONS = [
  ...[0xe5, PROBE_PORT], // start: in eax, PROBE_PORT
  ...[0x89, 0xc1], //             mov ecx, eax
  ...[0x31, 0xdb], //             xor ebx, ebx
  ...[0x0f, 0x0b], //       loop: ud2
  ...[0xff, 0xc9], //             dec ecx
  ...[0x75, 0xfa], //             jnz loop
  ...[0x89, 0xd8], //             mov eax, ebx
  ...[0xe7, PROBE_PORT], //       out PROBE_PORT, eax
  ...[0xeb, 0xee], //             jmp start
];
const EXCEPTION_HANDLER = [
  ...[0xff, 0xc3], //                   inc ebx
  ...[0x48, 0x83, 0x04, 0x24, 0x02], // add qword [rsp], 2: past the ud2
  ...[0x48, 0xcf], //                   iretq
];

/** What LOOP answers to a count, on a processor that computes. */
export function checksum(count: number): number {
  let sum = 0;
  for (let left = count; left > 0; left--) {
    sum += left;
    sum = (sum << 1) | (sum >>> 31);
  }
  return sum >>> 0;
}

/** Puts a mode's code and tables into RAM and the vCPU at its start. */
export function enterProbe(mode: ProbeMode, vcpu: Vcpu, memory: GuestMemory): void {
  const reset = vcpu.specialRegisters();
  if (mode === 'real') {
    memory.write(CODE, Uint8Array.from(LOOP_16));
    vcpu.setSpecialRegisters({ ...reset, cs: { ...reset.cs, base: 0n, selector: 0 } });
    vcpu.setRegisters({ ...vcpu.registers(), rip: BigInt(CODE), rflags: RFLAGS_FIXED });
    return;
  }
  const entry: BootEntry = { protocol: mode === 'protected' ? 'pvh' : 'linux64', address: CODE };
  writeBootStructures(entry, memory);
  memory.write(CODE, Uint8Array.from(mode === 'exceptions' ? EXCEPTIONS : LOOP));
  memory.write(HANDLER, Uint8Array.from(EXCEPTION_HANDLER));
  const gate = IDT + VECTOR_INVALID_OPCODE * GATE_SIZE;
  memory.setU32(gate, HANDLER | (CODE64_SELECTOR << 16)); // selector, offset 15:0
  memory.setU32(gate + 4, 0x8e00); // present, interrupt gate; the rest of the offset is 0
  vcpu.setSpecialRegisters({
    ...bootSpecialRegisters(entry, reset),
    idt: { base: BigInt(IDT), limit: (VECTOR_INVALID_OPCODE + 1) * GATE_SIZE - 1 },
  });
  vcpu.setRegisters(bootRegisters(entry));
}
