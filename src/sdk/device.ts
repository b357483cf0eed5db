/** Types for a user's own device: `import type { DeviceModule } from 'vmm/device'`. docs/devices.md says how one is written. */
export type { DeviceModule, DeviceSetup, DeviceValues } from '../virtio/device-module.js';
export type {
  DeviceContext,
  DeviceQueue,
  Driver,
  EventLoop,
  Timer,
  VirtioDescription,
  VirtioDevice,
} from '../virtio/device.js';
export type { Latency } from '../virtio/latency.js';
export type { Chain, Pop, VirtQueue } from '../virtio/queue/queue.js';
