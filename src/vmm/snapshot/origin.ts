/** A snapshot as a machine goes on from it. */
import type { VmConfig } from '../../config/vm-config.js';
import type { Origin } from '../machine/incarnation.js';
import { RequestError } from '../machine/machine-error.js';
import type { MachineParts } from '../machine/machine-parts.js';
import { Progress } from '../machine/progress.js';
import type { RestoreConfig } from '../../config/restore-config.js';
import { OnDemand } from '../memory/on-demand.js';
import { configAnew, type GivenAnew } from './given-anew.js';
import type { SavedLife } from './saved-machine.js';
import { openSnapshot } from './snapshot-folder.js';
import { SnapshotError } from './snapshot-error.js';

export interface OpenOrigin extends Origin {
  readonly config: VmConfig;
  /** When the machine has its memory. */
  close(): Promise<void>;
}

export interface OriginOptions {
  readonly mode: RestoreConfig['memory_restore_mode'];
  /** Whether there are pages everywhere before it runs. */
  readonly prefault: boolean;
  readonly anew: GivenAnew;
  /** Asked now and then; false: it is not wanted any more. */
  readonly goesOn: () => boolean;
}

/** @throws RequestError or SnapshotError in one line; nothing is left open then */
export async function openOrigin(
  { kernel, hypervisor, tell, fillWorker }: Pick<MachineParts, 'kernel' | 'hypervisor' | 'tell' | 'fillWorker'>,
  folder: string,
  { mode, prefault, anew, goesOn }: OriginOptions,
): Promise<OpenOrigin> {
  const snapshot = await openSnapshot(kernel, folder);
  try {
    const { machine, files } = snapshot;
    if (machine.hypervisor !== hypervisor.name) {
      throw new SnapshotError(
        `${folder}: of a machine under ${machine.hypervisor}; accepted is one of ${hypervisor.name}`,
      );
    }
    const config = configAnew(machine.config, anew);
    const descriptors = new Map([...files].map(([address, { fd }]) => [address, fd]));
    const tellProgress = (done: string, total: string) => tell('vm', 'memory-progress', { done, total });
    const goesOnFrom = {
      Copy: {},
      Map: { contents: { mode: 'map', files: descriptors } },
      OnDemand: {
        contents: { mode: 'ondemand', files: descriptors },
        serve: (missing) => new OnDemand(kernel, fillWorker, missing, tellProgress),
      },
    } satisfies Record<OriginOptions['mode'], Pick<Origin, 'contents' | 'serve'>>;
    return {
      config,
      life: prefault ? { ...machine.life, built: prefaulted(machine.life.built) } : machine.life,
      clone: true,
      ...goesOnFrom[mode],
      fill: (memory) => {
        const progress = new Progress(memory, tellProgress);
        return snapshot.fill(memory, (bytes) => {
          if (!goesOn()) throw new RequestError('The process is ending', 'failed');
          progress.add(bytes);
        });
      },
      close: () => snapshot.close(),
    };
  } catch (error) {
    await snapshot.close();
    throw error;
  }
}

function prefaulted({ cpus, memory }: SavedLife['built']): SavedLife['built'] {
  const zones = memory.zones?.map((zone) => ({ ...zone, prefault: true }));
  return { cpus, memory: { ...memory, ...(zones === undefined ? { prefault: true } : { zones }) } };
}
