/** The firmware's tables before the Firmware Test Suite, which a guest runs on what it found. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { runInGuest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { guestTools } from '../support/rootfs.js';

/** What it finds fault with all the same, in Cloud Hypervisor's tables too. */
const EXCEPTIONS = [
  // Linux lets nobody map a device's memory through /dev/mem (CONFIG_IO_STRICT_DEVMEM).
  'MMapUnmappable',
  // It knows no processor whose _STA reads a register: it interprets AML itself, without the machine's memory.
  'MADTLAPICUidMismatch',
  // The PM timer and the century of the clock, which guests use all the same.
  'FADTRHWNonZero',
  'FADTRHWFlagsNonZero',
  // Microsoft's specification gives the generation ID's device a name of another form; all others are numbers.
  'MethodCIDInvalidString',
];

const { folder, remove } = testFolder();
let host: TestHost;
let generic: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  generic = await kernel('generic');
});

afterAll(() => {
  host.close();
  remove();
});

test('the tables of a machine with all that is described', async () => {
  const { output, vmm } = await runInGuest(host, folder, {
    kernel: generic,
    task: { command: 'cd /tmp; fwts --acpitests -', archives: [await guestTools('fwts')] },
    vmm: [
      ...['--cpus', 'boot=2,max=4', '--memory', 'size=512M,hotplug_size=1G'],
      ...['--platform', 'num_pci_segments=2', '--pvpanic'],
    ],
  });
  expect(vmm).toBe(0);
  // It got to its end.
  expect(output).toMatch(/^Total: +\| +[0-9]{3}\|/m);
  const failures = [...output.matchAll(/^FAILED \[\w+\] (\w+): .*/gm)];
  const unexpected = failures.filter(([, name]) => !EXCEPTIONS.includes(name)).map(([text]) => text);
  expect(unexpected).toEqual([]);
});
