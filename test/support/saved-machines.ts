/** Machines that were saved: the golden records of their processors, with as much of the rest as any has. */
import fs from 'node:fs';
import { type VmConfig, vmConfigSchema } from '../../src/config/vm-config.js';
import type { Arm64Register, X86VcpuState, X86VmState } from '../../src/hypervisor/saved-state.js';
import type { CpuidEntry } from '../../src/hypervisor/x86-state.js';
import type { BoardState } from '../../src/vmm/boards/board-state.js';
import type { SavedLife, SavedMachine } from '../../src/vmm/snapshot/saved-machine.js';

const GIB = 2 ** 30;

export function savedConfig(vcpus: number, more: object = {}): VmConfig {
  return vmConfigSchema.parse({
    ...{ payload: { kernel: '/boot/vmlinux' }, cpus: { boot_vcpus: vcpus, max_vcpus: vcpus + 1 } },
    ...{ memory: { size: GIB }, disks: [{ id: 'disk', path: '/images/disk' }] },
    ...more,
  });
}

function life({ cpus, memory }: VmConfig, board: BoardState): SavedLife {
  return {
    built: { cpus, memory },
    board,
    present: [...board.vcpus.keys()],
    units: {
      serial: { name: 'serial', version: 1, fields: { interruptEnable: [1], output: [0, 0xffff_ffff] } },
      'disk/queues': { name: 'queues', version: 2, fields: { ready: [1] } },
    },
    places: [
      { id: 'disk', segment: 0, slot: 1, bar: 2 ** 38 },
      { id: 'pmem', segment: 15, slot: 31, bar: 2 ** 51, memory: 2 ** 40 },
    ],
    dimms: [{ slot: 3, address: 2 ** 36, size: GIB }],
    memory: [{ address: 0, size: GIB }],
  };
}

/** @param form whose record it is */
export function x86Machine(form: 'kvm' | 'mshv'): SavedMachine {
  const { vcpus, vm } = JSON.parse(
    fs.readFileSync(`test/golden/${form}-x86-1.json`, 'utf8'),
    (_key, value: unknown) => {
      if (typeof value !== 'string') return value;
      if (value.startsWith('0x')) return BigInt(value);
      return value.startsWith('base64:') ? new Uint8Array(Buffer.from(value.slice(7), 'base64')) : value;
    },
  ) as { readonly vcpus: readonly X86VcpuState[]; readonly vm: X86VmState };
  const config = savedConfig(vcpus.length);
  const entry: CpuidEntry = {
    ...{ function: 0x8000_0001, index: 0, significantIndex: false },
    ...{ eax: 0xffff_ffff, ebx: 1, ecx: 2, edx: 3 },
  };
  const cpuid = vcpus.map(() => [entry]);
  const board = { architecture: 'x86_64', addressBits: 46, cpuid, vcpus, vm } as const;
  return { hypervisor: form, config, life: life(config, board) };
}

export function armMachine(): SavedMachine {
  const { vcpus, vm } = JSON.parse(fs.readFileSync('test/unit/hypervisor/golden/arm64-kvm.json', 'utf8')) as {
    readonly vcpus: readonly { readonly registers: Readonly<Record<string, string>>; readonly poweredOff: boolean }[];
    readonly vm: {
      readonly counter: string;
      readonly counterFrequency: number;
      readonly gic: Readonly<Record<string, Readonly<Record<string, string>>>>;
    };
  };
  const list = (values: Readonly<Record<string, string>>): Arm64Register[] =>
    Object.entries(values).map(([id, hex]) => ({ id: BigInt(id), value: new Uint8Array(Buffer.from(hex, 'hex')) }));
  const config = savedConfig(vcpus.length);
  const board: BoardState = {
    architecture: 'aarch64',
    addressBits: 40,
    vcpus: vcpus.map(({ registers, poweredOff }) => ({
      ...{ registers: list(registers), poweredOff, serror: { pending: true, syndrome: 2n ** 64n - 1n } },
    })),
    vm: {
      counter: BigInt(vm.counter),
      counterFrequency: vm.counterFrequency,
      gic: Object.fromEntries(Object.entries(vm.gic).map(([group, values]) => [group, list(values)])),
    },
  };
  return { hypervisor: 'kvm', config, life: life(config, board) };
}
