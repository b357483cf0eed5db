/**
 * V8 compiles a function when it runs first, which takes longer than what it does. So who waits for a machine, or is about to send one, goes
 * through saving and restoring before that counts: with a machine that has no memory and never runs.
 */
import { type VmConfig, vmConfigSchema } from '../../config/vm-config.js';
import type { Hypervisor } from '../../hypervisor/hypervisor.js';
import { closeAll } from '../../sys/close-all.js';
import type { BoardState } from '../boards/board-state.js';
import { createBoard } from '../boards/boards.js';
import { platformUnits } from '../boards/platform.js';
import { decodeMachine, encodeMachine } from './state-schema.js';

/** Bytes; nobody maps them. */
const MEMORY = 64 * 2 ** 20;

/** Under KVM on x86_64 alone, where it has been measured. @throws HypervisorError or SystemError; nothing is left behind */
export function rehearse(hypervisor: Hypervisor): void {
  if (hypervisor.name !== 'kvm' || hypervisor.architecture !== 'x86_64') return;
  const config = vmConfigSchema.parse({ payload: { kernel: '/' }, memory: { size: MEMORY } });
  const { cpus, memory } = config;
  const saved = standingStill(hypervisor, config);
  const rest = { built: { cpus, memory }, present: [0], places: [], dimms: [], memory: [{ address: 0, size: MEMORY }] };
  const { life } = decodeMachine(encodeMachine({ hypervisor: hypervisor.name, config, life: { ...rest, ...saved } }));
  standingStill(hypervisor, config, life.board);
}

/** Makes one, which goes on from another, and saves it. */
function standingStill(hypervisor: Hypervisor, config: VmConfig, saved?: BoardState) {
  const board = createBoard(hypervisor, config, new Map(), saved);
  const close = [() => board.vm.close()];
  try {
    close.unshift(...board.createVcpus().map((vcpu) => () => vcpu.close()));
    const units = platformUnits(board.createPlatform([]));
    if (saved === undefined) {
      board.vm.startTime();
      board.vm.stopTime();
    } else board.load();
    const state = {
      board: board.save(),
      units: Object.fromEntries([...units].map(([name, block]) => [name, block.save()])),
    };
    board.vm.startTime(0n);
    return state;
  } finally {
    closeAll(close);
  }
}
