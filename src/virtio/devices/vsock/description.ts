/** What the vsock device is to its driver (virtio 1.3, 5.10), and what it counts. */
import { type RestoredDevice, type VirtioDescription, VirtioType } from '../../device.js';

export const VsockCounter = {
  /** Connections that were made. */
  opened: 0,
  /** Packets of data, from and to the guest. */
  fromGuest: 1,
  toGuest: 2,
  /** RST packets sent. */
  resets: 3,
  /** Chains that hold no packet, or have no room for one. */
  malformed: 4,
  /** Connections that were not made. */
  refused: 5,
  /** Times that the transmit queue had to wait. */
  paused: 6,
  /** Chains given back empty because a socket had less than it had said. */
  unused: 7,
  /** Bytes of the guest that no host program took in time. */
  dropped: 8,
} as const;

export function vsockDescription(cid: number): VirtioDescription {
  const config = new Uint8Array(8);
  new DataView(config.buffer).setBigUint64(0, BigInt(cid), true);
  return {
    type: VirtioType.Vsock,
    classCode: 0x078000,
    features: [],
    queueSizes: [256, 256, 256],
    config,
    writable: [],
    counters: Object.keys(VsockCounter),
  };
}

/** Words of the device's own: whether the driver has to be told that all connections are gone. */
export const VsockOwn = { resetDue: 0 } as const;

/** The host's ends of all connections are gone (5.10.6.7). */
export function vsockRestored({ own, ready }: RestoredDevice): void {
  if (ready) own[VsockOwn.resetDue] = 1;
}
