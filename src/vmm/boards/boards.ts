/** Which board a machine gets: the hypervisor's architecture decides. */
import type { VmConfig } from '../../config/vm-config.js';
import type { Hypervisor } from '../../hypervisor/hypervisor.js';
import type { MemoryFiles } from '../host/memory-file.js';
import { Arm64Board } from './arm64-board.js';
import type { Board } from './board.js';
import { X86Board } from './x86-board.js';

/** @throws MachineError, HypervisorError or SystemError */
export function createBoard(hypervisor: Hypervisor, config: VmConfig, files: MemoryFiles): Board {
  return hypervisor.architecture === 'x86_64'
    ? new X86Board(hypervisor, config, files)
    : new Arm64Board(hypervisor, config, files);
}
