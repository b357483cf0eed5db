import { describe, expect, test } from '@jest/globals';
import { vmConfigSchema, type VmConfig } from '../../../src/config/vm-config.js';
import type { MemorySlot, Vm } from '../../../src/hypervisor/hypervisor.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { MachineError } from '../../../src/vmm/machine-error.js';
import { ramRanges } from '../../../src/arch/x86_64/layout.js';
import { MemoryManager } from '../../../src/vmm/memory-manager.js';

const GIB = 2 ** 30;

function memory(options: Partial<VmConfig['memory']>): VmConfig['memory'] {
  return vmConfigSchema.parse({ payload: { kernel: 'k' }, memory: options }).memory;
}

describe('guest RAM', () => {
  test('lies below and above the hole', () => {
    expect(ramRanges(GIB)).toEqual([{ address: 0, size: GIB }]);
    expect(ramRanges(3 * GIB)).toEqual([{ address: 0, size: 3 * GIB }]);
    expect(ramRanges(5 * GIB)).toEqual([
      { address: 0, size: 3 * GIB },
      { address: 4 * GIB, size: 2 * GIB },
    ]);
  });

  test.each([{ shared: false }, { shared: true }, { prefault: true }, { thp: false }])(
    'is mapped, with %j',
    (options) => {
      const kernel = new LinuxKernel();
      const size = 4 * 2 ** 20;
      const manager = new MemoryManager(kernel, memory({ size, ...options }), ramRanges(size));
      const slots: MemorySlot[] = [];
      manager.attach({ addMemory: (slot: MemorySlot) => slots.push(slot) } as unknown as Vm);
      expect(slots.map(({ slot, guestAddress, mapping }) => [slot, guestAddress, mapping.length])).toEqual([
        [0, 0, size],
      ]);
      manager.memory.setU32(size - 4, 0x1234_5678);
      expect(manager.memory.u32(size - 4)).toBe(0x1234_5678);
      manager.close();
    },
  );

  test('above 4 GiB is found behind views of 1 GiB', () => {
    const manager = new MemoryManager(new LinuxKernel(), memory({ size: 6 * GIB }), ramRanges(6 * GIB));
    manager.memory.setU8(7 * GIB - 1, 0xa5);
    expect(manager.memory.u8(7 * GIB - 1)).toBe(0xa5);
    expect(() => manager.memory.u8(3 * GIB)).toThrow();
    manager.close();
  });

  test('that the host cannot map is one line that names the option', () => {
    const size = 2 ** 45;
    const make = () => new MemoryManager(new LinuxKernel(), memory({ size }), ramRanges(size));
    expect(make).toThrow(MachineError);
    expect(make).toThrow(/^--memory size=\d+: the host cannot map that much$/);
  });
});
