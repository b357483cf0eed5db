/** What a virtio network device is to its driver (virtio 1.3, 5.1). */
import { type RestoredDevice, type VirtioDescription, VirtioType } from '../../device.js';

export const NetFeature = {
  csum: 0,
  guestCsum: 1,
  ctrlGuestOffloads: 2,
  mtu: 3,
  mac: 5,
  guestTso4: 7,
  guestTso6: 8,
  guestEcn: 9,
  guestUfo: 10,
  hostTso4: 11,
  hostTso6: 12,
  hostEcn: 13,
  hostUfo: 14,
  mergeRxBuffers: 15,
  status: 16,
  ctrlVq: 17,
  guestAnnounce: 21,
  multiQueue: 22,
} as const;

/** Indices of `DeviceContext.counters`. Bytes are those of frames, without virtio's header. */
export const NetCounter = {
  rx_frames: 0,
  tx_frames: 1,
  rx_bytes: 2,
  tx_bytes: 3,
  dropped: 4,
  malformed: 5,
  limited: 6,
} as const;

export const CONTROL_QUEUE_SIZE = 64;
/** Bits of the status, and where that is in the configuration (5.1.4). */
export const NetStatus = { linkUp: 1, announce: 2 } as const;
export const STATUS_AT = 6;

export interface NetSetup {
  readonly mac: Uint8Array;
  readonly queuePairs: number;
  readonly queueSize: number;
  readonly mtu?: number | undefined;
  readonly tso: boolean;
  readonly ufo: boolean;
  readonly csum: boolean;
}

/** Queues: receive 0, transmit 0, receive 1, ..., and the control queue last. */
export function netDescription({ mac, queuePairs, queueSize, mtu, tso, ufo, csum }: NetSetup): VirtioDescription {
  const f = NetFeature;
  const config = new Uint8Array(12);
  config.set(mac);
  const view = new DataView(config.buffer);
  view.setUint16(STATUS_AT, NetStatus.linkUp, true);
  view.setUint16(8, queuePairs, true);
  view.setUint16(10, mtu ?? 0, true);
  return {
    type: VirtioType.Net,
    classCode: 0x020000,
    features: [
      ...[f.mac, f.status, f.mergeRxBuffers, f.ctrlVq, f.guestAnnounce],
      ...(csum ? [f.csum, f.guestCsum, f.ctrlGuestOffloads] : []),
      ...(csum && tso ? [f.guestTso4, f.guestTso6, f.guestEcn, f.hostTso4, f.hostTso6, f.hostEcn] : []),
      ...(csum && ufo ? [f.guestUfo, f.hostUfo] : []),
      ...(mtu === undefined ? [] : [f.mtu]),
      ...(queuePairs > 1 ? [f.multiQueue] : []),
    ],
    queueSizes: [...Array.from({ length: queuePairs * 2 }, () => queueSize), CONTROL_QUEUE_SIZE],
    config,
    writable: [],
    counters: Object.keys(NetCounter),
  };
}

/** A machine that goes on elsewhere is to tell the switches where it is now (5.1.6.5.4). */
export function netRestored({ config, has }: RestoredDevice): void {
  if (has(NetFeature.guestAnnounce)) config[STATUS_AT] |= NetStatus.announce;
}
