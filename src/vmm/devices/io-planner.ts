/**
 * Which I/O worker serves which queues: found from the devices and the host's CPUs alone.
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
  /** It serves one device alone, and goes with it. */
  readonly own: boolean;
}

export class IoPlanner {
  readonly #present = new Set<PlannedDevice>();
  /** Made as they are needed. */
  readonly #pool: PlannedWorker[] = [];
  #size: number;
  #turn = 0;

  /**
   * @param devices that will be placed at first, in any order
   * @param cpus of the host that this process may use
   */
  constructor(
    devices: readonly PlannedDevice[],
    private readonly cpus: number,
  ) {
    this.#size = poolSize(devices, cpus);
  }

  /** @returns the queues that each worker serves: each queue is served by exactly one of them */
  place(device: PlannedDevice): ReadonlyMap<PlannedWorker, readonly number[]> {
    this.#present.add(device);
    this.#size = Math.max(this.#size, poolSize([...this.#present], this.cpus));
    const serves = new Map<PlannedWorker, readonly number[]>();
    const own: PlannedWorker[] = [];
    groups(device).forEach((group, turn) => {
      const bound = boundCpus(device, group);
      let worker: PlannedWorker;
      if (bound.length > 0) worker = { affinity: bound, own: true };
      else if (device.blocking) worker = own[turn % MAX_POOL] ??= { affinity: undefined, own: true };
      else worker = this.#pool[device.busy ? this.#turn++ % this.#size : 0] ??= { affinity: undefined, own: false };
      serves.set(worker, [...(serves.get(worker) ?? []), ...group]);
    });
    return serves;
  }

  remove(device: PlannedDevice): void {
    this.#present.delete(device);
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
