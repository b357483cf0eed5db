/**
 * What is kept of a machine beside its memory: the records of its processors, the state of its devices, and what it was made of, so
 * that the same machine can be put together again.
 */
import type { VmConfig } from '../../config/vm-config.js';
import type { HypervisorName } from '../../hypervisor/hypervisor.js';
import type { SavedState } from '../../state/state-block.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { BoardState } from '../boards/board-state.js';

/** Raised whenever the meaning of what is kept changes. */
export const MACHINE_STATE_VERSION = 1;

/** Where a device was put. */
export interface SavedPlace {
  readonly id: string;
  readonly segment: number;
  readonly slot: number;
  /** Guest physical address that its BAR was given at first; the guest may have moved it. */
  readonly bar: number;
  /** Of memory that it brings. */
  readonly memory?: number | undefined;
}

export interface SavedDimm extends MemoryRange {
  readonly slot: number;
}

/** One life of a machine that stands still. */
export interface SavedLife {
  /** What its board was made of: sizes may have changed since. */
  readonly built: Pick<VmConfig, 'cpus' | 'memory'>;
  readonly board: BoardState;
  /** The vCPUs that the guest has; the others that were made wait until it is given them again. */
  readonly present: readonly number[];
  /** By the names of `savedUnits`. */
  readonly units: Readonly<Record<string, SavedState>>;
  readonly places: readonly SavedPlace[];
  readonly dimms: readonly SavedDimm[];
  /** The stretches of its memory, each of which has a file of its own. */
  readonly memory: readonly MemoryRange[];
}

export interface SavedMachine {
  readonly hypervisor: HypervisorName;
  /** With the names, addresses and sizes of now. */
  readonly config: VmConfig;
  readonly life: SavedLife;
}
