import type { HostKernel } from '../../src/sys/host-kernel.js';
import { StateBlock } from '../../src/state/state-block.js';
import type { VirtioDescription } from '../../src/virtio/device.js';
import { offeredFeatures, type VirtioPciHandle } from '../../src/virtio/transport/pci-handle.js';
import { transportLayout } from '../../src/virtio/transport/transport-state.js';

/**
 * A virtio function of one queue and one byte of configuration, which one worker serves.
 *
 * @param pin the interrupt controller's input of its pin @param call the event by which the host's kernel interrupts its queue, if it
 * serves that
 */
export function testFunction(kernel: HostKernel, pin: number, call?: number): VirtioPciHandle {
  const description: VirtioDescription = {
    type: 42,
    classCode: 0xff0000,
    features: [],
    queueSizes: [16],
    config: Uint8Array.of(1),
    counters: [],
    writable: [],
  };
  return {
    id: '_test0',
    segment: 0,
    slot: 3,
    description,
    offered: offeredFeatures(description, false),
    state: new StateBlock(transportLayout(description)).buffer,
    doorbells: [kernel.eventfd()],
    workers: [kernel.eventfd()],
    wideBar: true,
    interruptLine: pin,
    kernelInterrupts: call === undefined ? [] : [{ queue: 0, route: 24, eventfd: call }],
  };
}
