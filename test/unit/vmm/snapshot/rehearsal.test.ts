import { expect, test } from '@jest/globals';
import fs from 'node:fs';
import { openHostKvm } from '../../../../src/hypervisor/kvm/host.js';
import { LinuxKernel } from '../../../../src/sys/linux-kernel.js';
import { rehearse } from '../../../../src/vmm/snapshot/rehearsal.js';

test('a rehearsal goes through all of it, and leaves nothing open', () => {
  const hypervisor = openHostKvm(new LinuxKernel());
  const open = () => fs.readdirSync('/proc/self/fd').length;
  const before = open();
  rehearse(hypervisor);
  expect(open()).toBe(before);
  hypervisor.close();
});
