/** KVM's table of interrupt routes, at the most that it can hold. */
import { expect, test } from '@jest/globals';
import { IRQ_ROUTING_ENTRY_SIZE, IRQ_ROUTING_HEADER_SIZE } from '../../../src/hypervisor/kvm/abi.js';
import {
  IOAPIC_PINS,
  kvmRoutesLayout,
  MAX_ROUTES,
  routeMsi,
  setRouting,
  unroute,
  wirePins,
} from '../../../src/hypervisor/kvm/routes.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';

/** KVM_MAX_IRQ_ROUTES */
const KVM_MOST = 4096;

class RoutingKernel extends LinuxKernel {
  table = new Uint8Array();

  override ioctlBuffer(_fd: number, _request: number, argument: Uint8Array): number {
    this.table = argument.slice();
    return 0;
  }
}

test('every route that can be had has its place, beside those of the pins', () => {
  const kernel = new RoutingKernel();
  const routes = new StateBlock(kvmRoutesLayout);
  wirePins(routes);
  for (let gsi = IOAPIC_PINS; gsi < MAX_ROUTES; gsi++) routeMsi(routes, gsi, 0xfee0_0000, 0, gsi, 0);
  setRouting(kernel, -1, routes);
  const view = new DataView(kernel.table.buffer);
  const count = view.getUint32(0, true);
  expect(count).toBeGreaterThan(MAX_ROUTES);
  expect(count).toBeLessThanOrEqual(KVM_MOST);
  expect(kernel.table.length).toBe(IRQ_ROUTING_HEADER_SIZE + count * IRQ_ROUTING_ENTRY_SIZE);
  expect(view.getUint32(kernel.table.length - IRQ_ROUTING_ENTRY_SIZE, true)).toBe(MAX_ROUTES - 1);
  unroute(routes, IOAPIC_PINS);
  setRouting(kernel, -1, routes);
  expect(new DataView(kernel.table.buffer).getUint32(0, true)).toBe(count - 1);
});
