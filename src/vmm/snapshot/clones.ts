/** Clones of a machine: other processes restore what is in shared memory for as long as they take. */
import { existsSync } from 'node:fs';
import fs from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import type { ForkConfig } from '../../config/restore-config.js';
import { causeMessages, RequestError } from '../machine/machine-error.js';

/** Asks another `vmm` over its API. @param call such as vm.restore */
export type AskVmm = (socket: string, call: string, body: object) => Promise<unknown>;

/** A file system whose files are memory. */
const SHARED_MEMORY = '/dev/shm';

/** @param use given the path of a folder that is not there yet, and is gone afterwards: who has mapped its files keeps them */
export async function inSharedMemory(use: (folder: string) => Promise<void>): Promise<void> {
  const parent = await fs.mkdtemp(path.join(existsSync(SHARED_MEMORY) ? SHARED_MEMORY : os.tmpdir(), 'vmm-fork-'));
  try {
    await use(path.join(parent, 'machine'));
  } finally {
    await fs.rm(parent, { recursive: true, force: true });
  }
}

/** Resolves when all have the machine. @param folder with its snapshot @throws RequestError with why the first that has not has not */
export async function makeClones(clones: ForkConfig['clones'], folder: string, ask: AskVmm): Promise<void> {
  const source = { source_url: pathToFileURL(folder).href, memory_restore_mode: 'Map' };
  const made = await Promise.allSettled(
    clones.map(async ({ api_socket: socket, ...anew }) => {
      await ask(socket, 'vm.restore', { ...source, ...anew });
    }),
  );
  for (const [index, outcome] of made.entries()) {
    if (outcome.status === 'fulfilled') continue;
    throw new RequestError(`clones[${index}]: ${causeMessages(outcome.reason).join(': ')}`, 'failed');
  }
}
