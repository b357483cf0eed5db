/** What is kept of a board: its processors and interrupt controllers, and what they were told of the machine. */
import type { Arm64VcpuState, Arm64VmState, X86VcpuState, X86VmState } from '../../hypervisor/saved-state.js';
import type { CpuidEntry } from '../../hypervisor/x86-state.js';

interface CommonState {
  /** Of guest physical addresses: where devices lie depends on it. */
  readonly addressBits: number;
  /** Guest physical address of the generation ID; a machine from before there was one has none. */
  readonly generation?: number | undefined;
}

export interface X86BoardState extends CommonState {
  readonly architecture: 'x86_64';
  /** For each vCPU that was made. */
  readonly cpuid: readonly (readonly CpuidEntry[])[];
  readonly vcpus: readonly X86VcpuState[];
  readonly vm: X86VmState;
}

export interface Arm64BoardState extends CommonState {
  readonly architecture: 'aarch64';
  readonly vcpus: readonly Arm64VcpuState[];
  readonly vm: Arm64VmState;
}

export type BoardState = X86BoardState | Arm64BoardState;
