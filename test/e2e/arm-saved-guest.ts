/** A guest on KVM of aarch64 that is saved and goes on in a new VM, again and again, and looks at what it finds. */
import path from 'node:path';
import { expect, test } from '@jest/globals';
import { testFolder } from '../support/guest.js';
import type { TestHost } from '../support/host.js';
import type { WrittenReport } from '../support/written-check.js';
import { assemble } from './arm-bare-guest.js';

/**
 * vCPU 0 counts loops, takes its virtual timer's interrupts, an LPI and two SPIs, and starts vCPU 1 again and again. That one takes
 * another LPI, waits in WFI for three ticks of its timer and powers itself off. Both look at their registers and at the virtual counter
 * all the time. Which counter is where at DATA: test/support/arm-state-runner.ts.
 */
const GUEST = `
  .arch armv8.5-a+sve
  .equ LOWER, 0x10000000
  .equ DISTRIBUTOR, 0x08000000
  .equ REDISTRIBUTOR, 0x080a0000 // 128 KiB for each vCPU
  .equ ITS, 0x08080000
  .equ DATA, 0x40080000
  .equ LOOPS, 0x00
  .equ TICKS0, 0x08
  .equ LPI0, 0x10
  .equ LPI1, 0x18
  .equ EDGES, 0x20
  .equ LEVELS, 0x28
  .equ BOOTS, 0x30
  .equ TICKS1, 0x38
  .equ ERROR, 0x40
  .equ SEEN0, 0x48              // CNTVCT_EL0 as vCPU 0 saw it last
  .equ VECTORS0, 0x1000         // a copy of the vector registers, 12 KiB for each vCPU
  .equ TABLES, 0x40100000
  .equ PAGES, 0x40070000
  .equ STACK0, 0x40068000
  .equ STACK1, 0x4006c000
  .equ VALID, 1 << 63
  .equ EDGE, 32 + 40
  .equ LEVEL, 32 + 41
  .equ TIMER, 16 + 11
  .equ PERIOD, 100000
  .equ DEVICE, 0x110

  .macro add1 at
  ldr x1, [x0, #\\at]
  add x1, x1, #1
  str x1, [x0, #\\at]
  .endm

  .macro fail code
  ldr x0, =DATA
  mov x1, #\\code
  str x1, [x0, #ERROR]
  dsb sy
9: wfi
  b 9b
  .endm

  .macro armTimer
  mrs x1, cntvct_el0
  ldr x2, =PERIOD
  add x1, x1, x2
  msr cntv_cval_el0, x1
  mov x1, #1
  msr cntv_ctl_el0, x1
  isb
  .endm

  .global start
start:
  ldr x0, =PAGES                // the first GiB is devices', the second memory
  ldr x1, =(0x401 | 1 << 54 | 1 << 53)
  str x1, [x0]
  ldr x1, =(0x40000000 | 0x705)
  str x1, [x0, #8]
  dsb sy
  ldr x0, =STACK0
  mov sp, x0
  bl processor

  ldr x1, =DISTRIBUTOR          // one SPI by edge, one by level, both in group 1 to vCPU 0
  mov w2, #0x12
  str w2, [x1]
  mov w2, #(3 << (EDGE % 32))
  str w2, [x1, #(0x80 + EDGE / 32 * 4)]
  mov w3, #(2 << (EDGE % 16 * 2))
  str w3, [x1, #(0xc00 + EDGE / 16 * 4)]
  str w2, [x1, #(0x100 + EDGE / 32 * 4)]
  add x2, x1, #0x6000
  str xzr, [x2, #(EDGE * 8)]
  str xzr, [x2, #(LEVEL * 8)]

  ldr x3, =(TABLES + 0x30000)   // LPIs 8192 and 8193: enabled
  mov w2, #0xa1a1
  strh w2, [x3]
  dsb sy
  ldr x1, =REDISTRIBUTOR
  ldr x2, =(TABLES + 0x30000 + 13 + (7 << 7))
  str x2, [x1, #0x70]
  ldr x2, =(TABLES + 0x40000)
  str x2, [x1, #0x78]
  add x3, x1, #0x20000
  ldr x2, =(TABLES + 0x60000)
  str x2, [x3, #0x78]
  mov w2, #1
  str w2, [x1]
  str w2, [x3]
  ldr x1, =ITS
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
  dsb sy
  mov x2, #(commandsEnd - commands)
  str x2, [x1, #0x88]

  armTimer
  mov x28, #0
loop:
  ldr x0, =DATA
  add1 LOOPS
  mrs x2, cntvct_el0
  ldr x3, [x0, #SEEN0]
  str x2, [x0, #SEEN0]
  cmp x2, x3
  b.hs 1f
  fail 1
1: bl check
  ldr x0, =DATA                 // for some ticks vCPU 1 is left off
  ldr x1, [x0, #TICKS0]
  tbz x1, #3, loop
  ldr x0, =0xc4000003           // PSCI CPU_ON, which it mostly is already
  mov x1, #1
  adr x2, second
  mov x3, #0x77
  hvc #0
  b loop

second:
  mov x29, x0
  ldr x1, =STACK1
  mov sp, x1
  bl processor
  cmp x29, #0x77
  b.eq 1f
  fail 2
1: ldr x0, =DATA
  add1 BOOTS
  mov x28, #3
  armTimer
2: wfi
  ldr x0, =DATA
  ldr x3, [x0, #SEEN0]
  dsb sy
  isb
  mrs x2, cntvct_el0
  cmp x2, x3
  b.hs 3f
  fail 3
3: bl check
  ldr x0, =DATA
  ldr x1, [x0, #TICKS1]
  cmp x28, #0
  b.gt 2b
  msr daifset, #2
  msr cntv_ctl_el0, xzr
  isb
  ldr x0, =0x84000002           // PSCI CPU_OFF
  hvc #0
  fail 4

processor:                      // what each needs: MMU, vectors, GIC, vector registers; x20 is its number
  mrs x20, mpidr_el1
  and x20, x20, #0xff
  ldr x1, =0xff00               // device and memory
  msr mair_el1, x1
  ldr x1, =(25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32)
  msr tcr_el1, x1
  ldr x1, =PAGES
  msr ttbr0_el1, x1
  tlbi vmalle1
  dsb sy
  isb
  mrs x1, sctlr_el1
  ldr x2, =0x1005
  orr x1, x1, x2
  msr sctlr_el1, x1
  isb
  adr x1, vectors
  msr vbar_el1, x1
  ldr x1, =0x330000             // FPEN, ZEN
  msr cpacr_el1, x1
  isb
  ldr x1, =(REDISTRIBUTOR + 0x10000)
  add x1, x1, x20, lsl #17
  mov w2, #-1
  str w2, [x1, #0x80]
  mov w2, #(1 << TIMER)
  str w2, [x1, #0x100]
  mov x1, #0xf8
  msr S3_0_C4_C6_0, x1          // ICC_PMR_EL1
  mov x1, #1
  msr S3_0_C12_C12_7, x1        // ICC_IGRPEN1_EL1
  isb
  mov x21, x30
  add x22, x20, #0x123
  msr tpidr_el0, x22
  add x1, x22, #1
  msr tpidr_el1, x1
  mov x27, #(1 << 24)           // flush to zero
  msr fpcr, x27
  add x23, x20, #1
  mrs x24, id_aa64pfr0_el1
  ubfx x24, x24, #32, #4        // SVE
  cbnz x24, 1f
  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
  add x1, x23, #(\\n * 16 + 7)
  dup v\\n\\().2d, x1
  .endr
  b 2f
1: .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
  add x1, x23, #(\\n * 16 + 7)
  index z\\n\\().d, x1, #5
  .endr
  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
  add x1, x23, #(\\n * 3)
  whilelo p\\n\\().b, xzr, x1
  .endr
2: bl sum
  mov x25, x1
  msr daifclr, #2
  br x21

check:                          // registers are as \`processor\` has left them
  mov x26, x30
  mrs x1, tpidr_el0
  cmp x1, x22
  b.ne 8f
  mrs x1, tpidr_el1
  sub x1, x1, #1
  cmp x1, x22
  b.ne 8f
  mrs x1, fpcr
  cmp x1, x27
  b.ne 8f
  bl sum
  cmp x1, x25
  b.ne 7f
  br x26
7: fail 5
8: fail 6

sum:                            // x1: of all vector registers
  ldr x0, =(DATA + VECTORS0)
  mov x1, #0x3000
  madd x0, x1, x20, x0
  mov x2, x0
  cbnz x24, 1f
  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
  str q\\n, [x0, #(\\n * 16)]
  .endr
  mov x3, #(32 * 16)
  b 2f
1: rdvl x3, #1
  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
  str z\\n, [x0, #\\n, mul vl]
  .endr
  lsl x3, x3, #5
  add x4, x0, x3
  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
  str p\\n, [x4, #\\n, mul vl]
  .endr
  rdvl x5, #2                   // 16 of an eighth
  add x3, x3, x5
2: mov x1, #0
3: ldr x4, [x2], #8
  eor x1, x4, x1, ror #7
  subs x3, x3, #8
  b.ne 3b
  ret

interrupt:
  stp x0, x1, [sp, #-48]!
  stp x2, x3, [sp, #16]
  stp x4, x5, [sp, #32]
  ldr x0, =DATA
  mrs x3, S3_0_C12_C12_0        // ICC_IAR1_EL1
  and x3, x3, #0xffffff
  cmp x3, #TIMER
  b.eq 1f
  cmp x3, #EDGE
  b.eq 2f
  cmp x3, #LEVEL
  b.eq 3f
  cmp x3, #8192
  b.eq 4f
  ldr x4, =8193
  cmp x3, x4
  b.eq 5f
  cmp x3, #1023
  b.eq 7f
  fail 7
1: cbnz x20, 8f
  add1 TICKS0
  armTimer
  b 6f
8: add1 TICKS1
  sub x28, x28, #1
  armTimer
  b 6f
2: add1 EDGES
  b 6f
3: ldr x4, =LOWER
  str w3, [x4]
  dsb sy
  add1 LEVELS
  b 6f
4: cbnz x20, 9f
  add1 LPI0
  b 6f
5: cbz x20, 9f
  add1 LPI1
6: msr S3_0_C12_C12_1, x3       // ICC_EOIR1_EL1
7: isb
  ldp x4, x5, [sp, #32]
  ldp x2, x3, [sp, #16]
  ldp x0, x1, [sp], #48
  eret
9: fail 8

exception:
  mrs x2, esr_el1
  ldr x0, =DATA
  str x2, [x0, #ERROR]
  b .

  .ltorg
  .balign 8
commands:                       // IHI 0069, 5.3: MAPD, MAPC for both vCPUs, MAPTI and INV for both events
  .quad 0x08 | DEVICE << 32, 3, VALID | TABLES + 0x50000, 0
  .quad 0x09, 0, VALID, 0
  .quad 0x09, 0, VALID | 1 << 16 | 1, 0
  .quad 0x0a | DEVICE << 32, 3 | 8192 << 32, 0, 0
  .quad 0x0a | DEVICE << 32, 4 | 8193 << 32, 1, 0
  .quad 0x0c | DEVICE << 32, 3, 0, 0
  .quad 0x0c | DEVICE << 32, 4, 0, 0
commandsEnd:

  .balign 2048
vectors:
  .skip 0x200                   // from EL1 with its own stack pointer
  b exception
  .balign 128
  b interrupt
  .balign 128
  b exception
  .balign 128
  b exception
`;

export function savedGuest(host: () => TestHost): void {
  test('bare guest: saved and restored many times', async () => {
    const { folder, remove } = testFolder();
    try {
      const image = assemble(folder, GUEST);
      const runner = path.resolve('dist/tools/arm-state-runner.js');
      const { status, stdout, stderr } = await host().run([process.execPath, runner, image]);
      expect([status, stderr]).toEqual([0, '']);
      const { sent, last, seen, written } = JSON.parse(stdout) as Record<
        'sent' | 'last' | 'seen',
        Record<string, number>
      > &
        WrittenReport;
      expect(last).toMatchObject({ ...sent, error: 0 });
      expect(seen).toMatchObject({ wrongTime: [] });
      // One that is short may see no turn of the loop on a slow host.
      expect(seen['busyLives']).toBeGreaterThan(seen['lives'] / 2);
      for (const some of [...Object.values(sent), seen['pendingAtSave'], seen['poweredOff'], seen['poweredOn']]) {
        expect(some).toBeGreaterThan(0);
      }
      expect(seen['aheadOnBoth']).toBeGreaterThan(0);
      expect(written).toMatchObject({ problems: [], again: 0 });
      expect(written.changed).toBeGreaterThan(seen['lives'] / 3);
      expect(written.unchanged).toBeLessThan(32);
    } finally {
      remove();
    }
  });
}
