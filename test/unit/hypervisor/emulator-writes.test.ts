/** What an instruction that is emulated writes to guest memory, as whoever copies that meanwhile is told. */
import { expect, test } from '@jest/globals';
import { RDI, RSI, RSP } from '../../../src/hypervisor/mshv/emulator/cpu.js';
import { Outcome } from '../../../src/hypervisor/mshv/emulator/emulator.js';
import { createEmulator, type MshvCpu } from '../../../src/hypervisor/mshv/processor.js';
import { GuestMemory } from '../../../src/memory/guest-memory.js';
import { LOG_PAGE, WrittenPages } from '../../../src/memory/written-pages.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { CODE, DATA, DEVICE, Guest, PD, PDPT, PML4, PT, RAM } from '../../support/instruction-check-guest.js';

const kernel = new LinuxKernel();
const RBX = 3;
const TABLES = [PML4, PDPT, PD, PT];

test.each([
  ['a load, the tables that it walks', [0x8b, 0x03], DATA, TABLES], // mov eax, [rbx]
  ['a string, both pages of its target', [0x48, 0xa5], DATA + 0xffc, [DATA, DATA + LOG_PAGE, ...TABLES]], // movsq
  ['a push, the stack', [0xff, 0x33], DATA, [CODE - LOG_PAGE, ...TABLES]], // push [rbx]
])('%s', (_what, code, target, expected) => {
  const guest = new Guest().code(...code);
  const { cpu, ram } = guest;
  cpu.set(RBX, DEVICE);
  cpu.set(RSI, DEVICE);
  cpu.set(RDI, target);
  cpu.set(RSP, CODE);
  const memory = new GuestMemory([{ address: 0, buffer: ram.bytes.buffer }]);
  const pages = WrittenPages.create(kernel, memory.mappings());
  memory.written = pages;
  const before = Uint8Array.from(ram.bytes);
  const emulator = createEmulator(cpu as unknown as MshvCpu, memory);
  let outcome = emulator.begin(new Uint8Array(0), 0);
  while (outcome === Outcome.Read) {
    Object.assign(emulator.access, { low: -1, high: -1 });
    outcome = emulator.resume();
  }
  expect(outcome).toBe(Outcome.Done);
  const bits = new Uint32Array(RAM / LOG_PAGE / 32);
  pages.take({ address: 0, size: RAM }, bits);
  pages.close();
  const all = Array.from({ length: RAM / LOG_PAGE }, (_, page) => page * LOG_PAGE);
  const marked = all.filter((_, page) => (bits[page >>> 5] >>> (page & 31)) & 1);
  const changed = all.filter(
    (at) => Buffer.compare(before.subarray(at, at + LOG_PAGE), ram.bytes.subarray(at, at + LOG_PAGE)) !== 0,
  );
  expect(marked).toEqual([...expected].sort((a, b) => a - b));
  expect(changed).toEqual(marked);
});
