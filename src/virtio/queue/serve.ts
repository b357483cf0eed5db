/** The turn of a device that answers each request at once. */
import type { DeviceQueue } from '../device.js';
import { Pop, type VirtQueue } from './queue.js';

/**
 * Serves the chains of a queue and interrupts the driver; what is wrong with the ring stands in its `fault` then.
 *
 * @param most chains: others want the worker too
 * @param answer serves the ring's chain @returns bytes that it has written
 * @returns whether it stopped at `most`, and nobody tells of what is left
 */
export function serveQueue(queue: DeviceQueue, most: number, answer: (ring: VirtQueue) => number): boolean {
  const { ring } = queue;
  ring.suppressKicks();
  let left = most;
  for (; left > 0; left--) {
    const pop = ring.pop();
    if (pop === Pop.Taken) ring.push(ring.chain.id, answer(ring));
    else if (pop === Pop.Broken || !ring.resumeKicks()) break;
    else ring.suppressKicks();
  }
  queue.signal();
  return left === 0;
}
