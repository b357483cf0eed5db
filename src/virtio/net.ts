import type { VirtioDescription } from './device.js';
export function netDescription(_options: {
  mac: Uint8Array;
  queuePairs: number;
  queueSize: number;
  mtu?: number | undefined;
  tso: boolean;
  ufo: boolean;
  csum: boolean;
}): VirtioDescription {
  throw new Error('net');
}
