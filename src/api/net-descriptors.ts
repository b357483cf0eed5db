/** The descriptors that came with a request to restore or to receive, by network: in the order of the networks, as many for each as it says. */
import type { RestoreConfig } from '../config/restore-config.js';
import { refusal } from './bodies.js';

/** @param fds that came with the request; numbers in its body mean nothing here @throws RequestError */
export function netDescriptors(
  { net_fds: networks = [] }: Pick<RestoreConfig, 'net_fds'>,
  fds: readonly number[],
): ReadonlyMap<string, readonly number[]> {
  let next = 0;
  const found = new Map<string, readonly number[]>();
  for (const [index, { id, num_fds: count, fds: named }] of networks.entries()) {
    const wanted = count ?? named?.length;
    if (wanted === undefined)
      throw refusal(['net_fds', index, 'num_fds'], 'how many descriptors of the request are its');
    if (found.has(id)) throw refusal(['net_fds', index, 'id'], 'each network once');
    found.set(id, fds.slice(next, next + wanted));
    next += wanted;
  }
  if (next !== fds.length) throw refusal(['net_fds'], `all ${fds.length} descriptors that came with the request`);
  return found;
}
