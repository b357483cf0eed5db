/**
 * Which I/O worker serves which queues: a pure function of the devices and of the host's CPUs.
 *
 * - Queues that have to be on one worker are a group. A group that `queue_affinity=` names has a worker of its own.
 * - A device that may wait for a disk has workers of its own: nobody else waits with it.
 * - The groups of devices that move much go round a pool of workers; all other devices are with the pool's first.
 */

/** Workers of the pool, and of a device that has its own, at most. */
const MAX_POOL = 4;

export type QueueAffinity = readonly { readonly queue_index: number; readonly host_cpus: readonly number[] }[];

export interface PlannedDevice {
  readonly queues: number;
  /**
   * How the queues may be divided among workers: not at all, one by one, or by pairs (2n and 2n + 1). A queue without its
   * other half is with the first pair: the control queue of a network.
   */
  readonly division: 'together' | 'single' | 'pairs';
  /** Moves much data. */
  readonly busy: boolean;
  /** Its worker may wait for a disk within a system call. */
  readonly blocking: boolean;
  readonly affinity?: QueueAffinity | undefined;
}

export interface PlannedWorker {
  /** Host CPUs that it is bound to; undefined: any. */
  readonly affinity: readonly number[] | undefined;
  /** The queues that it serves, by the index of their device. */
  readonly serves: Map<number, number[]>;
}

/** @param cpus of the host that this process may use @returns workers: each queue is served by exactly one of them */
export function planWorkers(devices: readonly PlannedDevice[], cpus: number): PlannedWorker[] {
  const workers: PlannedWorker[] = [];
  const add = (affinity?: readonly number[]) => {
    const worker: PlannedWorker = { affinity, serves: new Map() };
    workers.push(worker);
    return worker;
  };
  const shared = new Pool(poolSize(devices, cpus), add);
  devices.forEach((device, index) => {
    const own = new Pool(MAX_POOL, add);
    for (const group of groups(device)) {
      const bound = boundCpus(device, group);
      let worker: PlannedWorker;
      if (bound.length > 0) worker = add(bound);
      else if (device.blocking) worker = own.next();
      else worker = device.busy ? shared.next() : shared.first();
      worker.serves.set(index, [...(worker.serves.get(index) ?? []), ...group]);
    }
  });
  return workers;
}

/** Workers that are made as they are needed, and taken in turn. */
class Pool {
  readonly #workers: PlannedWorker[] = [];
  #turn = 0;

  constructor(
    private readonly size: number,
    private readonly add: () => PlannedWorker,
  ) {}

  first(): PlannedWorker {
    return (this.#workers[0] ??= this.add());
  }

  next(): PlannedWorker {
    return (this.#workers[this.#turn++ % this.size] ??= this.add());
  }
}

/**
 * One for each host CPU but one, which is left to the vCPUs; but a device with several queues was given them to be served
 * by several.
 */
function poolSize(devices: readonly PlannedDevice[], cpus: number): number {
  const counts = devices
    .filter(({ busy, blocking }) => busy && !blocking)
    .map((device) => groups(device).filter((group) => boundCpus(device, group).length === 0).length);
  const wanted = counts.reduce((sum, count) => sum + count, 0);
  const most = Math.max(cpus - 1, Math.min(cpus, Math.max(...counts, 1)));
  return Math.max(Math.min(wanted, most, MAX_POOL), 1);
}

function groups({ queues, division }: PlannedDevice): number[][] {
  const all = Array.from({ length: queues }, (_, queue) => queue);
  if (division === 'together') return [all];
  if (division === 'single') return all.map((queue) => [queue]);
  const pairs = Array.from({ length: queues >> 1 }, (_, pair) => [2 * pair, 2 * pair + 1]);
  if (queues % 2 === 1) (pairs[0] ??= []).push(queues - 1);
  return pairs;
}

function boundCpus({ affinity }: PlannedDevice, group: readonly number[]): number[] {
  const entries = (affinity ?? []).filter(({ queue_index: queue }) => group.includes(queue));
  return [...new Set(entries.flatMap(({ host_cpus: cpus }) => cpus))];
}
