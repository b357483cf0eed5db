import type { VirtioDescription } from './device.js';
export function vsockDescription(_cid: number): VirtioDescription {
  throw new Error('vsock');
}
