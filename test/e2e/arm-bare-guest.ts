/** A guest of a few instructions for KVM on aarch64: what each of them does to the machine is known. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from '@jest/globals';
import { testFolder } from '../support/guest.js';
import type { TestHost } from '../support/host.js';

/** Stores to NOTE say how far the guest is; see test/support/arm-guest-runner.ts for what is at which address. */
const GUEST = `
  .equ NOTE, 0x10000000
  .equ DISTRIBUTOR, 0x08000000
  .equ REDISTRIBUTOR, 0x080a0000
  .equ ITS, 0x08080000
  .equ TABLES, 0x40100000
  .equ VALID, 1 << 63
  .equ SPI, 32 + 40
  .equ DEVICE, 0x110            // segment 1, slot 2, as the ITS has it

  .macro awaitInterrupt
9: wfi
  mrs x2, S3_0_C12_C12_0      // ICC_IAR1_EL1
  and w2, w2, #0xffffff
  sub w3, w2, #1020           // 1020 to 1023: none
  cmp w3, #3
  b.ls 9b
  msr S3_0_C12_C12_1, x2      // ICC_EOIR1_EL1
  str w2, [x19, #0x1c]
  .endm

  .global start
start:
  mov x19, #NOTE
  str x0, [x19]               // the boot argument, in two halves
  ldr w1, [x19, #4]
  strh w1, [x19, #8]
  strb w1, [x19, #10]

  adr x0, vectors             // a store that KVM cannot describe aborts
  msr vbar_el1, x0
  isb
  stp x1, x2, [x19, #0x20]

  ldr x0, =0xc4000003         // PSCI CPU_ON: vCPU 1, with a context
  mov x1, #1
  adr x2, second
  mov x3, #0x77
  hvc #0
  str w0, [x19, #0xc]
  adr x1, flag
1: ldr w2, [x1]
  cbz w2, 1b

  ldr x1, =DISTRIBUTOR        // GICD: affinity routing, group 1; the SPI edge-triggered, enabled, to vCPU 0
  mov w2, #0x12
  str w2, [x1]
  mov w2, #(1 << (SPI % 32))
  str w2, [x1, #(0x80 + SPI / 32 * 4)]
  mov w3, #(2 << (SPI % 16 * 2))
  str w3, [x1, #(0xc00 + SPI / 16 * 4)]
  str w2, [x1, #(0x100 + SPI / 32 * 4)]
  add x2, x1, #0x6000
  str xzr, [x2, #(SPI * 8)]
  mov x2, #0xff
  msr S3_0_C4_C6_0, x2        // ICC_PMR_EL1
  mov x2, #1
  msr S3_0_C12_C12_7, x2      // ICC_IGRPEN1_EL1
  isb
  str w2, [x19, #0x18]
  awaitInterrupt

  ldr x1, =REDISTRIBUTOR      // GICR: LPIs with their tables of properties and of what is pending
  ldr x2, =(TABLES + 0x30000 + 13)
  str x2, [x1, #0x70]
  ldr x2, =(TABLES + 0x40000 + (1 << 62))
  str x2, [x1, #0x78]
  mov w2, #1
  str w2, [x1]
  ldr x3, =(TABLES + 0x30000) // LPIs 8192 and 8193: enabled
  mov w2, #0xa1a1
  strh w2, [x3]
  ldr x1, =ITS                // GITS: tables of devices and of collections, and the queue of commands
  ldr x2, =(VALID + TABLES + 0x200)
  str x2, [x1, #0x100]
  ldr x2, =(VALID + TABLES + 0x10000 + 0x200)
  str x2, [x1, #0x108]
  ldr x2, =(VALID + TABLES + 0x20000)
  str x2, [x1, #0x80]
  mov w2, #1
  str w2, [x1]
  adr x3, commands
  ldr x4, =(TABLES + 0x20000)
  mov x5, #(commandsEnd - commands)
3: sub x5, x5, #8
  ldr x2, [x3, x5]
  str x2, [x4, x5]
  cbnz x5, 3b
  mov x2, #(commandsEnd - commands)
  str x2, [x1, #0x88]         // GITS_CWRITER: KVM executes them
  str w2, [x19, #0x30]
  awaitInterrupt
  str w2, [x19, #0x34]
  awaitInterrupt

  add x1, x19, #0x1000        // the doorbell
  str w2, [x1]
  ldr x0, =0x84000008         // PSCI SYSTEM_OFF
  hvc #0
  b .

second:
  mov x19, #NOTE
  str w0, [x19, #0x10]
  adr x1, flag
  mov w2, #1
  str w2, [x1]
4: wfi
  b 4b

  .balign 4
flag: .word 0
  .ltorg

  .balign 8
commands:                       // IHI 0069, 5.3: MAPD, MAPC, MAPTI and INV for both events
  .quad 0x08 | DEVICE << 32, 3, VALID | TABLES + 0x50000, 0
  .quad 0x09, 0, VALID, 0
  .quad 0x0a | DEVICE << 32, 3 | 8192 << 32, 0, 0
  .quad 0x0a | DEVICE << 32, 4 | 8193 << 32, 0, 0
  .quad 0x0c | DEVICE << 32, 3, 0, 0
  .quad 0x0c | DEVICE << 32, 4, 0, 0
commandsEnd:

  .balign 2048
vectors:
  .skip 0x200                 // synchronous, from EL1 with its own stack pointer
  mrs x3, esr_el1
  str w3, [x19, #0x14]
  mrs x3, elr_el1
  add x3, x3, #4
  msr elr_el1, x3
  eret
`;

/** The lab sees the host's files. */
export function assemble(folder: string, source: string): string {
  const [assembly, elf, image] = ['guest.s', 'guest.elf', 'guest.bin'].map((name) => path.join(folder, name));
  fs.writeFileSync(assembly, source);
  const link = ['-nostdlib', '-static', '-Wl,-Ttext=0x40000000,-estart'];
  execFileSync('aarch64-linux-gnu-gcc', [...link, '-o', elf, assembly]);
  execFileSync('aarch64-linux-gnu-objcopy', ['-O', 'binary', '-j', '.text', elf, image]);
  return image;
}

export function bareGuest(host: () => TestHost): void {
  test('bare guest: MMIO, PSCI, interrupts by eventfd and ITS', async () => {
    const { folder, remove } = testFolder();
    try {
      const image = assemble(folder, GUEST);
      const runner = path.resolve('dist/tools/arm-guest-runner.js');
      const { status, stdout, stderr } = await host().run([process.execPath, runner, image]);
      expect([status, stderr]).toEqual([0, '']);
      expect(JSON.parse(stdout)).toEqual({
        maxVcpus: 512,
        ipaBits: 48,
        mpidr: [0, 1],
        ends: ['SystemPowerOff', 'Interrupted'],
        stores: [
          [
            '4*2 10000000 9abcdef0 12345678',
            '2*1 10000008 4',
            '1*1 1000000a 4',
            '4*1 10000014 96000010', // ESR_EL1: a data abort of the same level, synchronous external
            '4*1 1000000c 0', // PSCI SUCCESS
            '4*1 10000018 1',
            `4*1 1000001c ${(32 + 40).toString(16)}`,
            '4*1 10000030 c0',
            `4*1 1000001c ${(8192).toString(16)}`,
            '4*1 10000034 2000',
            `4*1 1000001c ${(8193).toString(16)}`,
          ],
          ['4*1 10000010 77'],
        ],
        doorbell: true,
      });
    } finally {
      remove();
    }
  });
}
