/** What machines of all architectures have in common, seen from the one that puts a machine together. */
import { defaultTopology, type Topology } from '../../arch/topology.js';
import type { MemoryConfig } from '../../config/memory-config.js';
import type { CpusConfig } from '../../config/vm-config.js';
import type { Vcpu, Vm } from '../../hypervisor/hypervisor.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { IntxHandle } from '../../pci/intx.js';
import type { SegmentWindows } from '../../pci/segments.js';
import { randomBytes } from '../../sys/random.js';
import type { VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { MachineError } from '../machine/machine-error.js';
import type { MemoryLayout } from '../memory/memory-layout.js';
import type { BoardState } from './board-state.js';
import type { PlacedFunction } from './numa.js';
import type { PlatformHandle } from './platform.js';

/** A machine's processors, interrupt controllers, firmware tables and memory map: what its architecture decides. */
export interface Board {
  readonly vm: Vm;
  /** Where memory lies, as the configuration wants it. */
  readonly memory: MemoryLayout;
  /** Whether the machine could be made with this memory as well. */
  fits(memory: MemoryConfig): boolean;
  /** By segment number. */
  readonly segments: readonly SegmentWindows[];
  /** The lines of PCI functions without MSI-X, at power-on. */
  readonly intx: IntxHandle;
  /** The vCPUs, by number, not running yet; all that ever were, where it goes on from another. Their caller closes them. @throws HypervisorError, SystemError */
  createVcpus(): Vcpu[];
  /**
   * One more while the machine runs, with the next number; its caller closes it. Undefined: guests of this architecture can be
   * given none.
   *
   * @throws HypervisorError, SystemError
   */
  plugVcpu?(): Vcpu;
  /** Sends a vCPU a non-maskable interrupt. Undefined: the architecture has none. */
  sendNmi?(vcpu: number): void;
  /** What a core file tells of these vCPUs, none of which runs; with the EM_ of the architecture. */
  core(vcpus: Iterable<number>): { readonly machine: number; readonly notes: Uint8Array[] };
  /** The devices at power-on; after `createVcpus`. */
  createPlatform(virtio: readonly VirtioPciHandle[]): PlatformHandle;
  /**
   * Puts the firmware's tables and the payload into memory and the first vCPU at the payload's entry; after `createVcpus`.
   *
   * @param functions of PCI that are there from the start
   * @returns whether the first vCPU is to wait until all others can answer it
   * @throws BootError naming the option that is to blame
   */
  boot(memory: GuestMemory, functions: readonly PlacedFunction[]): boolean;
  /** Its processors and interrupt controllers, after `Vm.stopTime`; writes guest memory on some. @throws HypervisorError, SystemError */
  save(): BoardState;
  /**
   * Instead of `boot`: goes on where another stood, whose state it was created with, as after `Vm.stopTime`. Guest memory is as it was
   * there.
   *
   * @throws HypervisorError, SystemError
   */
  load(): void;
  /** Gives the guest another generation ID, after `load`. @returns false: it was told of none */
  renewGeneration(memory: GuestMemory): boolean;
}

/** The shape of the vCPUs that can ever be present. */
export function configuredTopology({ topology, max_vcpus: max }: CpusConfig): Topology {
  if (topology === undefined) return defaultTopology(max);
  return {
    threadsPerCore: topology.threads_per_core,
    coresPerDie: topology.cores_per_die,
    diesPerPackage: topology.dies_per_package,
    packages: topology.packages,
  };
}

/** Of the generation ID: nobody can guess the next. Bytes. */
export const GENERATION_SIZE = 16;

/** @param address of the generation ID @throws GuestMemoryError */
export function writeGeneration(memory: GuestMemory, address: number): void {
  memory.write(address, randomBytes(GENERATION_SIZE));
}

/**
 * Of guest physical addresses: where devices lie depends on it.
 *
 * @param possible the most that a guest can have here
 * @param saved the state of another board, from which this one goes on
 * @throws MachineError when that guest has more
 */
export function addressBits(possible: number, saved: Pick<BoardState, 'addressBits'> | undefined): number {
  const bits = saved?.addressBits ?? possible;
  if (bits <= possible) return bits;
  throw new MachineError(`The guest has ${bits} physical address bits; accepted are at most ${possible} here`);
}
