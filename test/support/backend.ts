/** What the scenarios run on: a hypervisor of an architecture, and the `vmm` command for it. */
import fs from 'node:fs';
import path from 'node:path';
import type { HypervisorName } from '../../src/hypervisor/hypervisor.js';
import type { Architecture } from '../lab/kernels.js';

export interface Backend {
  readonly hypervisor: HypervisorName;
  readonly architecture: Architecture;
  /** Whether the hypervisor is not the real one. */
  readonly simulated: boolean;
  /** The command with what chooses the hypervisor. */
  readonly vmm: readonly string[];
  /** The guest's name of its serial port. */
  readonly console: string;
}

const command = (script: string, hypervisor: string) => [
  process.execPath,
  path.resolve(script),
  '--hypervisor',
  hypervisor,
];

export const KVM: Backend = {
  hypervisor: 'kvm',
  architecture: 'x86_64',
  simulated: false,
  vmm: command('dist/vmm.js', 'kvm'),
  console: 'ttyS0',
};

/** The Microsoft hypervisor of this host, or a simulated one on KVM. */
export function mshv(): Backend {
  const simulated = !fs.existsSync('/dev/mshv');
  const script = simulated ? 'dist/tools/simulated/vmm.js' : 'dist/vmm.js';
  return { ...KVM, hypervisor: 'mshv', simulated, vmm: command(script, 'mshv') };
}

export const ARM: Backend = { ...KVM, architecture: 'aarch64', console: 'ttyAMA0' };
