import type { NetConfig } from '../config/device-config.js';
import type { HostKernel } from '../sys/host-kernel.js';
export function openTaps(_kernel: HostKernel, _config: NetConfig): { taps: number[]; mac: Uint8Array } {
  throw new Error('net');
}
