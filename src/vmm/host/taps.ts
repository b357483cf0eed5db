/** The host ends of a network interface, as its configuration says. */
import type { NetConfig } from '../../config/device-config.js';
import { adoptTap, openTap, TapError } from '../../net/tap.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { SystemError } from '../../sys/host-kernel.js';
import { randomBytes } from '../../sys/random.js';
import { MachineError } from '../machine/machine-error.js';

/**
 * @returns a descriptor for each pair of queues, the caller's to close, and the guest's hardware address
 * @throws MachineError
 */
export function openTaps(kernel: HostKernel, config: NetConfig): { taps: number[]; mac: Uint8Array } {
  const mac = parseMac(config.mac ?? randomMac());
  const pairs = config.num_queues / 2;
  const taps: number[] = [];
  try {
    if (config.fds === undefined) {
      const { tap: name, ip, mask, mtu } = config;
      const hostMac = config.host_mac === undefined ? undefined : parseMac(config.host_mac);
      return { taps: openTap(kernel, { name, queuePairs: pairs, ip, mask, hostMac, mtu }), mac };
    }
    // Duplicates: what this process was given stays open for whoever gave it.
    for (const fd of config.fds) taps.push(kernel.duplicate(fd));
    taps.forEach((tap, pair) => adoptTap(kernel, tap, pair, taps.length));
    return { taps, mac };
  } catch (error) {
    for (const tap of taps) kernel.close(tap);
    if (!(error instanceof TapError || error instanceof SystemError)) throw error;
    const option = config.fds === undefined ? `tap=${config.tap ?? ''}` : `fd=[${config.fds.join(',')}]`;
    throw new MachineError(`--net ${option}: ${error.message}`, { cause: error });
  }
}

function parseMac(text: string): Uint8Array {
  return Uint8Array.from(text.split(':'), (part) => parseInt(part, 16));
}

/** Locally administered, unicast. */
export function randomMac(): string {
  const mac = randomBytes(6);
  mac[0] = (mac[0] & 0xfc) | 0x02;
  return Array.from(mac, (byte) => byte.toString(16).padStart(2, '0')).join(':');
}
