/** A guest of a few instructions goes on in another VM, a hundred times, as if nothing had been. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import type { WrittenReport } from '../support/written-check.js';

/**
 * Four vCPUs: 0 works, and its timer has deadlines; 1 works, and its timer is periodic; 2 halts, and its timer goes off once each
 * time; 3 is not started before the host asks for it. test/support/saved-state-check.ts has what is at which address.
 *
 * Each has a page: what it counts is in memory by FS and in XMM1, which have to agree. R14 is its page, R15 its number.
 */
const GUEST = `
  .equ PAGES, 0x40000
  .equ SHARED, 0x48000          # the latest time that a vCPU has seen
  .equ START_LAST, 0x48008      # not 0: start vCPU 3
  .equ COUNT, 0x00
  .equ TIME, 0x08
  .equ WRONG, 0x10              # how often something was not as it had been
  .equ TICKS, 0x18
  .equ WHERE, 0x20              # the address after the last such check
  .equ FAULTS, 0x28
  .equ MESSAGES, 0x30
  .equ GDT, 0x500
  .equ PML4, 0x9000
  .equ PORT, 0xe4
  .equ DEADLINE_TICKS, 10000000
  .equ NANOSECONDS, 5000000     # what KVM's local APIC timer counts

  .macro setMsr index
  mov $\\index, %ecx
  mov %rax, %rdx
  shr $32, %rdx
  wrmsr
  .endm

  .macro getMsr index
  mov $\\index, %ecx
  rdmsr
  shl $32, %rdx
  or %rdx, %rax
  .endm

  # RAX has to be R14 and something.
  .macro expect offset
  lea \\offset(%r14), %rcx
  call check
  .endm

  .globl base
base:
  .code16
  cli                           # SIPI: real mode, CS is this page
  lgdtl %cs:(gdtr - base)
  mov $0x20, %eax
  mov %eax, %cr4
  mov $PML4, %eax
  mov %eax, %cr3
  mov $0xc0000080, %ecx         # EFER.LME
  rdmsr
  or $0x100, %eax
  wrmsr
  mov $0x80000031, %eax
  mov %eax, %cr0
  ljmpl $0x10, $0x20100

  .code64
  .org 0x100
start:
  mov $0x18, %eax
  mov %eax, %ss
  mov %eax, %ds
  mov %eax, %es
  mov %cr4, %rax
  or $0x600, %rax               # SSE
  mov %rax, %cr4
  getMsr 0x1b                   # x2APIC
  or $0xc00, %rax
  setMsr 0x1b
  getMsr 0x802
  mov %rax, %r15
  mov %r15, %r14
  shl $12, %r14
  add $PAGES, %r14
  lea 0x1000(%r14), %rsp
  lidt idtr
  mov %r14, %rax
  setMsr 0xc0000100             # FS
  lea 0x33(%r14), %rax
  setMsr 0xc0000102             # KERNEL_GS_BASE
  lea 0x44(%r14), %rax
  setMsr 0xc0000082             # LSTAR
  lea 0x11(%r14), %rax
  mov %rax, %dr0
  lea 0x22(%r14), %rax
  mov %rax, %cr2
  .irp n, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14
  lea \\n(%r14), %rax
  movq %rax, %xmm\\n
  .endr
  xor %eax, %eax
  movq %rax, %xmm1
  inc %eax
  movq %rax, %xmm15
  mov $0x1ff, %eax
  setMsr 0x80f                  # spurious interrupts, and on
  mov $0xb, %eax
  setMsr 0x83e                  # the timer counts each tick
  mov $0x40, %eax
  cmp $1, %r15d
  ja 1f                         # once
  mov $0x20040, %eax            # periodic
  je 1f
  mov $0x40040, %eax            # deadlines
1:
  setMsr 0x832
  call arm
  test %r15d, %r15d
  jnz 2f
  mov $1, %ebx
  call wake
  mov $2, %ebx
  call wake
2:
  cmp $2, %r15d
  jae halt

work:
  cli
  incq %fs:COUNT
  paddq %xmm15, %xmm1
  movq %xmm1, %rax
  mov %fs:COUNT, %rcx
  call check
  movq %xmm7, %rax
  expect 7
  call time
  testb $63, %fs:COUNT
  jnz 3f
  mov %dr0, %rax
  expect 0x11
  mov %cr2, %rax
  expect 0x22
  getMsr 0xc0000102
  expect 0x33
  getMsr 0xc0000082
  expect 0x44
  test %r15d, %r15d
  jnz 3f
  mov %fs:COUNT, %eax           # the device gives the complement of what it was given
  mov %eax, %ebx
  mov $PORT, %edx
  out %eax, (%dx)
  in (%dx), %eax
  not %eax
  mov %ebx, %ecx
  call check
  cmpq $0, START_LAST
  je 3f
  movq $0, START_LAST
  mov $3, %ebx
  call wake
3:
  mov $50, %ecx
4:
  pause
  loop 4b
  sti
  nop
  jmp work

halt:
  cli
  incq %fs:COUNT
  paddq %xmm15, %xmm1
  movq %xmm1, %rax
  mov %fs:COUNT, %rcx
  call check
  call time
  sti
  hlt
  jmp halt

check:                          # RAX has to be RCX
  cmp %rcx, %rax
  je 5f
  incq %fs:WRONG
  mov (%rsp), %rax
  mov %rax, %fs:WHERE
5:
  ret

time:                           # never before what any vCPU has seen
  mov SHARED, %rbx
  lfence
  rdtsc
  shl $32, %rdx
  or %rdx, %rax
  cmp %rbx, %rax
  jb 6f
  cmp %fs:TIME, %rax
  jb 6f
  mov %rax, %fs:TIME
  mov %rax, SHARED
  ret
6:
  incq %fs:WRONG
  movq $0, %fs:WHERE
  ret

arm:
  test %r15d, %r15d
  jz 7f
  mov $NANOSECONDS, %eax
  setMsr 0x838
  ret
7:
  rdtsc
  shl $32, %rdx
  or %rdx, %rax
  add $DEADLINE_TICKS, %rax
  setMsr 0x6e0
  ret

wake:                           # INIT and SIPI to vCPU EBX
  mov $0x830, %ecx
  mov %ebx, %edx
  mov $0x4500, %eax
  wrmsr
  mov $0x4620, %eax
  wrmsr
  ret

timer:
  push %rax
  push %rcx
  push %rdx
  incq %fs:TICKS
  cmp $1, %r15d
  je end
  call arm
  jmp end
message:
  push %rax
  push %rcx
  push %rdx
  incq %fs:MESSAGES
end:
  xor %eax, %eax
  setMsr 0x80b                  # end of interrupt
  pop %rdx
  pop %rcx
  pop %rax
  iretq
fault:
  incq %fs:FAULTS
  mov (%rsp), %rax
  mov %rax, %fs:WHERE
  hlt
  jmp fault

  .balign 16
idt:
  .rept 64
  .word fault - base, 0x10, 0x8e00, 2, 0, 0, 0, 0
  .endr
  .word timer - base, 0x10, 0x8e00, 2, 0, 0, 0, 0
  .word message - base, 0x10, 0x8e00, 2, 0, 0, 0, 0
idtEnd:
idtr:
  .word idtEnd - idt - 1
  .quad idt
gdtr:
  .word 31
  .long GDT
`;

let host: TestHost;
const { folder, remove } = testFolder();

beforeAll(async () => {
  host = await TestHost.open();
});

afterAll(() => {
  host.close();
  remove();
});

function assemble(source: string): string {
  const [assembly, elf, image] = ['guest.s', 'guest.elf', 'guest.bin'].map((name) => path.join(folder, name));
  fs.writeFileSync(assembly, source);
  execFileSync('gcc', ['-nostdlib', '-static', '-Wl,-Ttext=0x20000,-ebase,--build-id=none', '-o', elf, assembly]);
  execFileSync('objcopy', ['-O', 'binary', '-j', '.text', elf, image]);
  return image;
}

/** Half a second each where nothing else runs. */
const LIMIT_MILLISECONDS = 500_000;

test(
  'a guest that is saved and restored a hundred times misses nothing but the time between',
  async () => {
    const check = path.resolve('dist/tools/saved-state-check.js');
    const { stdout, stderr, status } = await host.run([process.execPath, check, assemble(GUEST), '100']);
    expect([stderr, status]).toEqual(['', 0]);
    const report = JSON.parse(stdout) as Record<'aheadMicroseconds' | 'pending' | 'messages', number> & WrittenReport;
    expect(report).toMatchObject({ rounds: 100, problems: [], written: { problems: [], again: 0 } });
    // Pages in which its vCPUs count; and of the rest of the memory, little is said to be written: its page tables.
    expect(report.written.changed).toBeGreaterThan(100);
    expect(report.written.unchanged).toBeLessThan(32);
    // Its clocks never show more than has passed while it ran.
    expect(report.aheadMicroseconds).toBeLessThan(100);
    // Interrupts that were pending when it was saved have come.
    expect(report.pending).toBeGreaterThan(10);
    expect(report.messages).toBeGreaterThan(10);
  },
  LIMIT_MILLISECONDS,
);
