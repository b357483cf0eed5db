/**
 * A machine that an earlier version has saved goes on, also in another process that is handed its memory: test/golden/machines/. Each file holds a snapshot of a guest of a few instructions:
 * what was written to its two texts, and the pages of its memory that hold something.
 *
 * With GOLDEN_MACHINES=make in the environment the files that are missing are made; those that are there are never made anew.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { brotliCompressSync, brotliDecompressSync } from 'node:zlib';
import { expect } from '@jest/globals';
import { type ApiClient, DONE, untilListens } from '../support/api-client.js';
import type { Backend } from '../support/backend.js';
import { type Guest, testFolder } from '../support/guest.js';
import type { TestHost } from '../support/host.js';
import { machineCode } from '../support/machine-code.js';
import { MachineProcess } from '../support/machine-process.js';
import { runnable } from '../support/synthetic-kernel.js';
import { assemble as assembleForArm } from './arm-bare-guest.js';

const FOLDER = new URL('../golden/machines/', import.meta.url);
const PAGE = 4096;
const RAM = 32 * 2 ** 20;

/**
 * Halts, and answers each byte that comes to its serial port, by its interrupt: with how many there have been, from `1` on, or `!` where the
 * count in R12, in XMM1 and in memory is not one, or the time has gone back. A `q` powers it off.
 */
const X86_GUEST = `
  .equ COM1, 0x3f8
  .equ IO_APIC, 0xfec00000
  .equ VECTOR, 0x44

  lea stack(%rip), %rsp
  lea received(%rip), %rax
  lea idt(%rip), %rdi
  mov %ax, VECTOR * 16(%rdi)
  movw $0x10, VECTOR * 16 + 2(%rdi)
  movw $0x8e00, VECTOR * 16 + 4(%rdi)
  shr $16, %rax
  mov %eax, VECTOR * 16 + 6(%rdi)
  mov %rdi, idtr + 2(%rip)
  lidt idtr(%rip)
  mov %cr4, %rax
  or $0x600, %rax               # SSE
  mov %rax, %cr4
  mov $0x1b, %ecx               # x2APIC
  rdmsr
  or $0xc00, %eax
  wrmsr
  xor %edx, %edx
  mov $0x80f, %ecx              # spurious interrupts, and on
  mov $0x1ff, %eax
  wrmsr
  mov $IO_APIC, %edi            # line 4: edge-triggered, to processor 0
  movl $0x19, (%rdi)
  movl $0, 0x10(%rdi)
  movl $0x18, (%rdi)
  movl $VECTOR, 0x10(%rdi)
  xor %r12d, %r12d
  xorps %xmm1, %xmm1
  mov $1, %eax
  movq %rax, %xmm15
  mov $COM1 + 4, %edx           # OUT2, without which there is no interrupt
  mov $8, %al
  out %al, (%dx)
  mov $COM1 + 1, %edx           # interrupts of received data
  mov $1, %al
  out %al, (%dx)
  mov $COM1, %edx
  mov $'0', %al
  out %al, (%dx)
  sti
1:
  hlt
  jmp 1b

received:
  mov $COM1 + 5, %edx
  in (%dx), %al
  test $1, %al
  jz 4f
  mov $COM1, %edx
  in (%dx), %al
  cmp $'q', %al
  jne 2f
  mov $0x600, %edx              # sleep type 5
  mov $0x34, %al
  out %al, (%dx)
2:
  inc %r12
  incq count(%rip)
  paddq %xmm15, %xmm1
  cmp %r12, count(%rip)
  jne 3f
  movq %xmm1, %rax
  cmp %r12, %rax
  jne 3f
  rdtsc
  shl $32, %rdx
  or %rdx, %rax
  cmp time(%rip), %rax
  jb 3f
  mov %rax, time(%rip)
  lea '0'(%r12), %eax
  jmp 5f
3:
  mov $'!', %al
5:
  mov $COM1, %edx
  out %al, (%dx)
  jmp received
4:
  xor %eax, %eax
  xor %edx, %edx
  mov $0x80b, %ecx              # end of interrupt
  wrmsr
  iretq

  .balign 16
count: .quad 0
time: .quad 0
idtr: .word VECTOR * 16 + 15
  .quad 0
  .skip 256
stack:
  .balign 16
idt: .skip VECTOR * 16 + 16
`;

/** As the other: by the GIC and the PL011, with counts in X19, in V8 and in memory. */
const ARM_GUEST = `
  .equ UART, 0x09000000
  .equ DISTRIBUTOR, 0x08ff0000
  .equ INTID, 32 + 11

  .global start
start:                          // Documentation/arch/arm64/booting.rst
  b begin
  .long 0
  .quad 0, end - start, 0, 0, 0, 0
  .ascii "ARM\\x64"
  .long 0
begin:
  mov x0, #(3 << 20)            // CPACR_EL1: FP and SIMD
  msr cpacr_el1, x0
  ldr x1, =DISTRIBUTOR          // affinity routing, group 1; edge-triggered, to processor 0
  mov w2, #0x12
  str w2, [x1]
  mov w2, #(1 << (INTID % 32))
  str w2, [x1, #(0x80 + INTID / 32 * 4)]
  str w2, [x1, #(0x100 + INTID / 32 * 4)]
  mov w2, #(2 << (INTID % 16 * 2))
  str w2, [x1, #(0xc00 + INTID / 16 * 4)]
  add x2, x1, #0x6000
  str xzr, [x2, #(INTID * 8)]
  mov x2, #0xff
  msr S3_0_C4_C6_0, x2          // ICC_PMR_EL1
  mov x2, #1
  msr S3_0_C12_C12_7, x2        // ICC_IGRPEN1_EL1
  isb
  mov x19, #0
  movi v8.2d, #0
  fmov d9, x2
  adr x20, count
  ldr x21, =UART
  mov w2, #0x301                // UARTCR: on, both ways
  str w2, [x21, #0x30]
  mov w2, #0x50                 // UARTIMSC: received data, fewer than its FIFO waits for as well
  str w2, [x21, #0x38]
  mov w2, #'0'
  str w2, [x21]
1:
  wfi
  mrs x2, S3_0_C12_C12_0        // ICC_IAR1_EL1
  and w3, w2, #0xffffff
  cmp w3, #INTID
  b.ne 1b
2:
  ldr w3, [x21, #0x18]          // UARTFR: nothing there
  tbnz w3, #4, 5f
  ldr w3, [x21]
  cmp w3, #'q'
  b.ne 3f
  ldr x0, =0x84000008           // PSCI SYSTEM_OFF
  hvc #0
3:
  add x19, x19, #1
  add d8, d8, d9
  ldr x3, [x20]
  add x3, x3, #1
  str x3, [x20]
  cmp x3, x19
  b.ne 4f
  fmov x3, d8
  cmp x3, x19
  b.ne 4f
  isb
  mrs x3, cntvct_el0
  ldr x4, [x20, #8]
  cmp x3, x4
  b.lo 4f
  str x3, [x20, #8]
  add w3, w19, #'0'
  str w3, [x21]
  b 2b
4:
  mov w3, #'!'
  str w3, [x21]
  b 2b
5:
  msr S3_0_C12_C12_1, x2        // ICC_EOIR1_EL1
  b 1b
  .ltorg
  .balign 8
count: .quad 0, 0
end:
`;

function writeKernel(architecture: Backend['architecture'], folder: string): string {
  if (architecture === 'aarch64') return assembleForArm(folder, ARM_GUEST);
  const image = path.join(folder, 'kernel');
  fs.writeFileSync(image, runnable(...machineCode(X86_GUEST)));
  return image;
}

interface Golden {
  readonly config: string;
  readonly state: string;
  /** Of each stretch: its size, and what is in pages of it, by their offset, packed with Brotli, in base64. */
  readonly memory: readonly { readonly size: number; readonly pages: Readonly<Record<string, string>> }[];
}

/** @returns the snapshot, which others can read as text */
function facts(folder: string): Golden {
  const files = fs.readdirSync(folder).filter((name) => name.startsWith('memory-'));
  const memory = files.map((_, index) => {
    const bytes = fs.readFileSync(path.join(folder, `memory-${index}`));
    const pages: Record<string, string> = {};
    for (let at = 0; at < bytes.length; at += PAGE) {
      const page = bytes.subarray(at, at + PAGE);
      if (page.some((byte) => byte !== 0)) pages[at] = brotliCompressSync(page).toString('base64');
    }
    return { size: bytes.length, pages };
  });
  const text = (name: string) => fs.readFileSync(path.join(folder, `${name}.json`), 'utf8');
  return { config: text('config'), state: text('state'), memory };
}

function writeSnapshot(folder: string, { memory, config, state }: Golden): void {
  fs.mkdirSync(folder);
  fs.writeFileSync(path.join(folder, 'config.json'), config);
  fs.writeFileSync(path.join(folder, 'state.json'), state);
  for (const [index, { size, pages }] of memory.entries()) {
    const file = fs.openSync(path.join(folder, `memory-${index}`), 'w');
    fs.ftruncateSync(file, size);
    for (const [at, packed] of Object.entries(pages)) {
      const page = brotliDecompressSync(Buffer.from(packed, 'base64'), { maxOutputLength: PAGE });
      fs.writeSync(file, page, 0, PAGE, Number(at));
    }
    fs.closeSync(file);
  }
}

/** The frequency of a counter is the host's, and a processor that cannot scale it takes no machine of another: this one's goes in its place. */
function withFrequencyOf(here: string, state: string): string {
  const frequency = /"tscKhz":(\d+)/.exec(here)?.[1];
  return frequency === undefined ? state : state.replaceAll(/"tscKhz":\d+/g, `"tscKhz":${frequency}`);
}

/** @returns what the guest says to these bytes */
async function answers(guest: Guest, bytes: string): Promise<string> {
  const from = guest.console.length;
  guest.type(bytes);
  await guest.waitFor(new RegExp(`^.{${bytes.length}}`), from);
  return guest.console.slice(from);
}

/** @param there where the other process is asked */
async function handOver(host: TestHost, api: ApiClient, there: ApiClient, socket: string, anew: object): Promise<void> {
  const url = `unix:${socket}`;
  const arrival = there.put('vm.receive-migration', { receiver_url: url, ...anew });
  await untilListens(host, socket);
  expect(await api.put('vm.send-migration', { destination_url: url, local: true })).toEqual(DONE);
  expect(await arrival).toEqual(DONE);
}

/** It is made anew as well, as its frequency is needed, and then goes over to another process. */
export async function goldenMachine(host: TestHost, backend: Backend): Promise<void> {
  const { folder, remove } = testFolder();
  const scratch = (await host.check('mktemp -d')).trim();
  const disk = `${scratch}/disk`;
  const taps = ['a', 'b'].map((name) => `old${backend.hypervisor}${name}`);
  /** Devices with other names on the host. */
  const anew = (process: number) => ({
    disks: [{ id: 'disk', path: disk }],
    net: [{ id: 'net', tap: taps[process] }],
    vsock: { socket: `${scratch}/vsock${process}` },
  });
  try {
    await host.check(`truncate -s 1M ${disk}`);
    for (const tap of taps) await host.check(`ip tuntap add dev ${tap} mode tap vnet_hdr`);
    const first = await MachineProcess.open(host, `${scratch}/api`, backend);
    const { guest, api } = first;
    const config = {
      payload: { kernel: writeKernel(backend.architecture, folder) },
      cpus: { boot_vcpus: 2, max_vcpus: 3 },
      memory: { size: RAM, shared: true },
      serial: { mode: 'Tty' },
      console: { mode: 'Null' },
      disks: [{ id: 'disk', path: disk, image_type: 'Raw' }],
      net: [{ id: 'net', tap: taps[0], mac: '2e:00:00:00:00:01' }],
      vsock: { id: 'vsock', cid: 3, socket: `${scratch}/vsock0` },
      balloon: { id: 'balloon', size: 0 },
      watchdog: true,
    };
    expect(await api.put('vm.create', config)).toEqual(DONE);
    expect(await api.put('vm.boot')).toEqual(DONE);
    await guest.waitFor('0');
    expect(await answers(guest, 'ab')).toBe('12');
    expect(await api.put('vm.pause')).toEqual(DONE);
    expect(await api.put('vm.snapshot', { destination_url: `file://${scratch}/made` })).toEqual(DONE);
    expect(await api.put('vm.delete')).toEqual(DONE);
    // A lab sees the files of this machine, and not the other way round.
    const archive = Buffer.from(await host.check(`tar -C ${scratch}/made -S -c . | base64`), 'base64');
    fs.mkdirSync(path.join(folder, 'made'));
    execFileSync('tar', ['-C', path.join(folder, 'made'), '-x'], { input: archive });
    const made = facts(path.join(folder, 'made'));
    const file = new URL(`${backend.hypervisor}-${backend.architecture}-1.json`, FOLDER);
    if (process.env['GOLDEN_MACHINES'] === 'make' && !fs.existsSync(file)) {
      fs.writeFileSync(file, `${JSON.stringify(made, undefined, 1)}\n`);
    }
    const golden = JSON.parse(fs.readFileSync(file, 'utf8')) as Golden;
    writeSnapshot(path.join(folder, 'golden'), { ...golden, state: withFrequencyOf(made.state, golden.state) });
    const source_url = `file://${folder}/golden`;
    expect(await api.put('vm.restore', { source_url, resume: true, ...anew(0) })).toEqual(DONE);
    expect(await answers(guest, 'xyz')).toBe('345');
    const next = await MachineProcess.open(host, `${scratch}/next-api`, backend);
    await handOver(host, api, next.api, `${scratch}/handover`, anew(1));
    await first.ended({ status: 0 });
    expect(await answers(next.guest, 'mn')).toBe('67');
    next.guest.type('q');
    await next.ended({ status: 0 });
  } finally {
    await host.check(`${taps.map((tap) => `ip link del ${tap}`).join('; ')}; rm -rf ${scratch}`);
    remove();
  }
}
