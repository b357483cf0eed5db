import { describe, expect, test } from '@jest/globals';
import type { Arm64Hypervisor } from '../../../src/hypervisor/hypervisor.js';
import { type MemoryConfig, zonesOf } from '../../../src/config/memory-config.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { memPlan } from '../../../src/vmm/devices/device-plans.js';
import { Arm64Board } from '../../../src/vmm/boards/arm64-board.js';
import { blockSize, resizeRefusal } from '../../../src/vmm/memory/hotplug.js';
import { layoutOf } from '../../support/memory-layouts.js';

const [MIB, GIB] = [2 ** 20, 2 ** 30];
const PLUGS = { hotplug_method: 'VirtioMem', hotplug_size: GIB } as const;

const configOf = (options: Partial<MemoryConfig>) =>
  vmConfigSchema.parse({ payload: { kernel: 'k' }, memory: options });
const zoneOf = (options: Partial<MemoryConfig>) => zonesOf(configOf(options).memory)[0];
const memory = (options: Partial<MemoryConfig> = {}) => zoneOf({ ...PLUGS, ...options });

describe('memory that is plugged', () => {
  test('lies behind RAM, where Linux takes all of it', () => {
    const plugged = (options: Partial<MemoryConfig>, window = 4 * GIB) =>
      layoutOf(options, [{ address: window, size: Infinity }]).zones[0].hotplug;
    const size = 4096;
    expect(plugged({ size })).toBeUndefined();
    expect(plugged({ ...PLUGS, size }, 0)).toEqual({ address: 4 * GIB, size: GIB });
    expect(plugged({ ...PLUGS, size: 128 * MIB })).toEqual({ address: 4 * GIB + 128 * MIB, size: GIB });
    expect(plugged({ ...PLUGS, size })).toEqual({ address: 4 * GIB + 128 * MIB, size: GIB });
    const huge = { ...PLUGS, hugepages: true, hugepage_size: GIB, size: 2 * GIB };
    expect(plugged(huge, 4 * GIB + 4096)).toEqual({ address: 7 * GIB, size: GIB });
  });

  test('comes by 2 MiB, or by huge pages where they are bigger', () => {
    expect(blockSize(memory())).toBe(2 * MIB);
    expect(blockSize(memory({ hugepages: true, hugepage_size: 2 ** 16 }))).toBe(2 * MIB);
    expect(blockSize(memory({ hugepages: true, hugepage_size: GIB }))).toBe(GIB);
  });

  test('changes up to hotplug_size, by whole blocks', () => {
    const size = 512 * MIB;
    for (const more of [0, 2 * MIB, GIB]) expect(resizeRefusal(memory(), size + more)).toBeUndefined();
    const line = `desired_ram: accepted is ${size} and up to ${GIB} more, by multiples of ${2 * MIB}`;
    for (const more of [-2 * MIB, MIB, GIB + 2 * MIB]) expect(resizeRefusal(memory(), size + more)).toBe(line);
    const none = zoneOf({});
    expect(resizeRefusal(none, size)).toBeUndefined();
    expect(resizeRefusal(none, size + 2 * MIB)).toBe(
      `desired_ram: accepted is ${size}: the machine has no hotplug_size`,
    );
  });

  test.each<[Partial<MemoryConfig>, number[], boolean]>([
    [{}, [], false],
    [{ prefault: true }, [], true],
    [{ shared: true }, [1], false],
    [{ hugepages: true, hugepage_size: 2 * MIB }, [1], true],
  ])('is a device of its own, with %j', (options, features, populate) => {
    const plan = memPlan(memory({ hotplugged_size: 6 * MIB, ...options }), { address: 4 * GIB, size: GIB });
    expect(plan).toMatchObject({ id: 'mem0', blocking: true, description: { features }, backend: { populate } });
    const view = new DataView(plan.description.config.buffer);
    const fields = [0, 16, 24, 48].map((at) => Number(view.getBigUint64(at, true)));
    expect(fields).toEqual([2 * MIB, 4 * GIB, GIB, 6 * MIB]);
    expect(plan.backend).toMatchObject({ plugged: expect.objectContaining({ byteLength: 68 }) });
  });

  test('is in its NUMA node', () => {
    const { description } = memPlan(memory(), { address: 4 * GIB, size: GIB }, 258);
    expect(description.features).toEqual([0]);
    expect([...description.config.subarray(8, 16)]).toEqual([2, 1, 0, 0, 0, 0, 0, 0]);
    expect(memPlan(memory({ shared: true }), { address: 4 * GIB, size: GIB }, 0).description.features).toEqual([0, 1]);
  });

  test.each([
    [512 * MIB, 4 * GIB],
    [4 * GIB, 4 * GIB + 1088 * MIB + 64 * MIB],
  ])('lies before the PCI window of an aarch64 machine with %d bytes of RAM', (size, address) => {
    const hypervisor = { ipaBits: 40, createVm: () => ({}) } as unknown as Arm64Hypervisor;
    const board = new Arm64Board(hypervisor, configOf({ ...PLUGS, size }));
    expect(board.memory.zones[0].hotplug).toEqual({ address, size: GIB });
    expect(board.segments[0].mmio64.start).toBe(Math.ceil((address + GIB) / GIB) * GIB);
    const tooMuch = () => new Arm64Board(hypervisor, configOf({ ...PLUGS, size, hotplug_size: 2 ** 40 - 4 * GIB }));
    expect(tooMuch).toThrow(
      /^--memory size=\d+,hotplug_size=\d+: more than a guest of 40 physical address bits can have$/,
    );
  });
});
