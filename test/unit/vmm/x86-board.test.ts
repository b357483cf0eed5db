import { describe, expect, test } from '@jest/globals';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import type { X86Hypervisor } from '../../../src/hypervisor/hypervisor.js';
import { GuestMemory } from '../../../src/memory/guest-memory.js';
import type { X86BoardState } from '../../../src/vmm/boards/board-state.js';
import { MachineError } from '../../../src/vmm/machine/machine-error.js';
import { X86Board } from '../../../src/vmm/boards/x86-board.js';

/** A hypervisor whose processor has so many physical address bits; what it has closed. */
function hypervisorOf(physicalBits: number, signalMsi: (...message: number[]) => void = () => undefined) {
  const closed: string[] = [];
  const leaf = { function: 0x8000_0008, index: 0, significantIndex: false, eax: physicalBits, ebx: 0, ecx: 0, edx: 0 };
  const vm = {
    signals: { signalMsi },
    supportedCpuid: () => [leaf],
    createInterrupt: () => ({ eventfd: -1 }),
    close: () => void closed.push('vm'),
  };
  return { hypervisor: { createVm: () => vm } as unknown as X86Hypervisor, closed };
}

const configOf = (size: number, maxPhysBits = 46, hotplug = 0) =>
  vmConfigSchema.parse({
    payload: { kernel: 'k' },
    memory: { size, ...(hotplug > 0 && { hotplug_method: 'VirtioMem', hotplug_size: hotplug }) },
    cpus: { boot_vcpus: 1, max_vcpus: 1, max_phys_bits: maxPhysBits },
  });

test('an NMI is a message to the local APIC', () => {
  const sent: number[][] = [];
  const { hypervisor } = hypervisorOf(46, (...message) => void sent.push(message));
  const config = vmConfigSchema.parse({
    payload: { kernel: 'k' },
    // Three cores of a die: APIC ids have a bit for each that is not there.
    cpus: {
      boot_vcpus: 6,
      max_vcpus: 6,
      topology: { threads_per_core: 1, cores_per_die: 3, dies_per_package: 1, packages: 2 },
    },
  });
  const board = new X86Board(hypervisor, config);
  for (const vcpu of [0, 3]) board.sendNmi(vcpu);
  expect(sent).toEqual([
    [0xfee0_0000, 0, 0x400, 0],
    [0xfee0_4000, 0, 0x400, 0],
  ]);
});

describe('the generation ID', () => {
  const { hypervisor } = hypervisorOf(46);
  const memory = new GuestMemory([{ address: 0, buffer: new ArrayBuffer(0x2000) }]);
  const state = { architecture: 'x86_64', addressBits: 46, cpuid: [], vcpus: [], vm: {} } as unknown as X86BoardState;
  const boardOf = (saved: X86BoardState) => new X86Board(hypervisor, configOf(2 ** 29), new Map(), saved);
  const bytes = () => Buffer.from(memory.read(0, 0x2000)).toString('hex');

  test('is another each time, and nothing beside it', () => {
    const board = boardOf({ ...state, generation: 0x1000 });
    const seen = new Set<string>();
    for (let count = 1; count <= 3; count++) {
      expect(board.renewGeneration(memory)).toBe(true);
      const all = bytes();
      expect(all.slice(0, 0x2000)).toMatch(/^0*$/);
      expect(all.slice(0x2000 + 32)).toMatch(/^0*$/);
      seen.add(all.slice(0x2000, 0x2000 + 32));
      expect(seen.size).toBe(count);
    }
  });

  test('is not written where a machine from before has something else', () => {
    const before = bytes();
    expect(boardOf(state).renewGeneration(memory)).toBe(false);
    expect(bytes()).toBe(before);
  });
});

describe('the board of an x86_64 machine', () => {
  test('has RAM below and above the 32-bit hole, and PCI windows that no RAM is in', () => {
    const { hypervisor } = hypervisorOf(40);
    const { memory, segments } = new X86Board(hypervisor, configOf(6 * 2 ** 30));
    expect(memory.ram).toEqual([
      { address: 0, size: 3 * 2 ** 30 },
      { address: 4 * 2 ** 30, size: 3 * 2 ** 30 },
    ]);
    expect(segments[0].mmio32.start).toBe(3 * 2 ** 30);
    expect(segments[0].mmio64.start).toBe(7 * 2 ** 30);
    expect(segments[0].mmio64.end).toBeLessThan(2 ** 40);
  });

  test.each([
    [2 ** 29, 4 * 2 ** 30],
    [3 * 2 ** 30 + 4096, 4 * 2 ** 30 + 2 ** 27],
    [6 * 2 ** 30, 7 * 2 ** 30],
  ])('has memory to plug behind %d bytes of RAM and before the PCI window', (size, address) => {
    const { hypervisor } = hypervisorOf(40);
    const hotplug = 5 * 2 ** 27;
    const { memory, segments } = new X86Board(hypervisor, configOf(size, 46, hotplug));
    expect(memory.zones[0].hotplug).toEqual({ address, size: hotplug });
    expect(memory.ram.reduce((sum, one) => sum + one.size, 0)).toBe(size);
    expect(segments[0].mmio64.start).toBe(address + hotplug);
    expect(new X86Board(hypervisor, configOf(size)).memory.zones[0].hotplug).toBeUndefined();
  });

  test('has the controller of memory that ACPI plugs before those of all else', () => {
    const { hypervisor } = hypervisorOf(40);
    const config = (memory: object) =>
      vmConfigSchema.parse({ payload: { kernel: 'k' }, memory: { size: 2 ** 29, ...memory } });
    const end = 2 ** 40 - 0x1_0000;
    for (const [memory, memoryHotplugAddress, gedAddress] of [
      [{ hotplug_size: 2 ** 30 }, end - 0x1000, end - 0x4000],
      [{ hotplug_size: 2 ** 30, hotplug_method: 'VirtioMem' }, undefined, end - 0x3000],
      [{}, undefined, end - 0x3000],
    ] as const) {
      const board = new X86Board(hypervisor, config(memory));
      expect(board.createPlatform([]).options).toMatchObject({ memoryHotplugAddress, gedAddress });
    }
    const board = new X86Board(hypervisor, config({ hotplug_size: 2 ** 30 }));
    // With as much room behind it as now.
    const fits = (size: number) => board.fits({ ...config({}).memory, size, hotplug_size: 2 ** 30 });
    const most = 2 ** 40 - 2 ** 30 - 2 ** 30 - 2 ** 27;
    expect([2 ** 29, most, most + 2 ** 27].map(fits)).toEqual([true, true, false]);
  });

  test('divides addresses among segments by their weights, and refuses those that leave one without', () => {
    const { hypervisor } = hypervisorOf(40);
    const make = (count: number, bits = 46, ...segments: object[]) =>
      new X86Board(
        hypervisor,
        vmConfigSchema.parse({
          payload: { kernel: 'k' },
          cpus: { boot_vcpus: 1, max_vcpus: 1, max_phys_bits: bits },
          platform: { num_pci_segments: count },
          pci_segments: segments,
        }),
      ).segments;
    const size = ({ start, end }: { start: number; end: number }) => end - start;
    const [first, second] = make(2, 46, { pci_segment: 1, mmio32_aperture_weight: 3, mmio64_aperture_weight: 7 });
    // Of 640 MiB below 4 GiB, and of 254 times 4 GiB and a part above them.
    expect([size(first.mmio32), size(second.mmio32)]).toEqual([160 * 2 ** 20, 480 * 2 ** 20]);
    expect(size(first.mmio64)).toBe(31 * 2 ** 32);
    expect(second.mmio64.start).toBe(first.mmio64.end);
    expect(make(1, 36, { mmio64_aperture_weight: 1000 })).toHaveLength(1);
    expect(make(14, 36)).toHaveLength(14);
    expect(() => make(16, 36)).toThrow(
      /^--platform num_pci_segments=16: accepted are at most 14, as the addresses behind memory are no more$/,
    );
    expect(() => make(2, 36, { mmio64_aperture_weight: 14 })).toThrow(
      /^--pci-segment mmio64_aperture_weight: accepted are weights that are 14 at most, those of all 2 segments together, not 15$/,
    );
    expect(() => make(2, 46, { mmio32_aperture_weight: 163_840 })).toThrow(/^--pci-segment mmio32_aperture_weight: /);
    expect(make(2, 46, { mmio32_aperture_weight: 163_839 })).toHaveLength(2);
  });

  test('refuses memory to plug that does not fit', () => {
    const { hypervisor } = hypervisorOf(36);
    const make = (hotplug: number) => new X86Board(hypervisor, configOf(2 ** 29, 46, hotplug));
    expect(make(2 ** 36 - 2 ** 32 - 2 ** 27).memory.zones[0].hotplug).toBeDefined();
    expect(() => make(2 ** 36 - 2 ** 32)).toThrow(
      /^--memory size=536870912,hotplug_size=\d+: more than a guest of 36 physical address bits can have$/,
    );
  });

  test.each([
    [2 ** 40, 36, 46, /^--memory size=\d+: more than a guest of 36 physical address bits can have$/],
    [2 ** 40, 46, 38, /^--memory size=\d+: more than a guest of 38 physical address bits can have$/],
    [2 ** 19, 46, 46, /^--memory size=\d+: accepted is a size that holds the kernel/],
  ])('refuses %d bytes on a processor of %d bits with max_phys_bits=%d, and closes its VM', (size, bits, max, line) => {
    const { hypervisor, closed } = hypervisorOf(bits);
    const make = () => new X86Board(hypervisor, configOf(size, max));
    expect(make).toThrow(MachineError);
    expect(make).toThrow(line);
    expect(closed).toEqual(['vm', 'vm']);
  });
});
