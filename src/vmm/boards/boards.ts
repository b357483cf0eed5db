/** Which board a machine gets: the hypervisor's architecture decides. */
import type { MemoryConfig } from '../../config/memory-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import type { Hypervisor } from '../../hypervisor/hypervisor.js';
import type { MemoryFiles } from '../host/memory-file.js';
import { Arm64Board, arm64Memory } from './arm64-board.js';
import type { Board } from './board.js';
import type { Arm64BoardState, BoardState, X86BoardState } from './board-state.js';
import { MachineError } from '../machine/machine-error.js';
import type { MemoryLayout } from '../memory/memory-layout.js';
import { X86Board, x86Memory } from './x86-board.js';

/** @param saved that of another, from which it goes on @throws MachineError, HypervisorError or SystemError */
export function createBoard(
  hypervisor: Hypervisor,
  config: VmConfig,
  files: MemoryFiles,
  saved: BoardState | undefined,
): Board {
  const { architecture } = hypervisor;
  if (saved !== undefined && saved.architecture !== architecture) {
    throw new MachineError(`A machine of ${saved.architecture}; accepted is one of this host's ${architecture}`);
  }
  return hypervisor.architecture === 'x86_64'
    ? new X86Board(hypervisor, config, files, saved as X86BoardState | undefined)
    : new Arm64Board(hypervisor, config, files, saved as Arm64BoardState | undefined);
}

/** Where memory lies in a machine of an architecture. @param files that zones are in */
export function memoryOf(
  architecture: Hypervisor['architecture'],
  memory: MemoryConfig,
  files: MemoryFiles = new Map(),
): MemoryLayout {
  return (architecture === 'x86_64' ? x86Memory : arm64Memory)(memory, files);
}
