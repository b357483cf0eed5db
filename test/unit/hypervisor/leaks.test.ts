/** Whatever the host refuses while a machine's processors are set up: nothing stays open or mapped. */
import fs from 'node:fs';
import { expect, test } from '@jest/globals';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import type { HypervisorName, X86Hypervisor } from '../../../src/hypervisor/hypervisor.js';
import { openKvm } from '../../../src/hypervisor/kvm/kvm.js';
import { openMshv } from '../../../src/hypervisor/mshv/mshv.js';
import { closeAll } from '../../../src/sys/close-all.js';
import { type HostKernel, type HostMapping, type MapOptions, SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { X86Board } from '../../../src/vmm/boards/x86-board.js';
import { SimulatedMshvKernel } from '../../support/mshv/simulated-kernel.js';

const config = vmConfigSchema.parse({ payload: { kernel: 'k' }, cpus: { boot_vcpus: 2, max_vcpus: 2 } });

/** A kernel that counts its calls and fails one of them. */
function failing(kernel: HostKernel, failAt: number) {
  const calls: string[] = [];
  let mappings = 0;
  const fails = (name: string) => calls.push(name) - 1 === failAt;
  const fail = (call: string): never => {
    throw new SystemError('ENOMEM', 12, call, 'not enough memory');
  };
  const wrapped = Object.create(kernel, {
    ioctl: {
      value: (fd: number, request: number, value?: number) =>
        fails(`ioctl ${request}`) ? fail('ioctl') : kernel.ioctl(fd, request, value),
    },
    ioctlBuffer: {
      value: (fd: number, request: number, argument: Uint8Array) =>
        fails(`ioctl ${request}`) ? fail('ioctl') : kernel.ioctlBuffer(fd, request, argument),
    },
    ioctlBufferRaw: {
      value: (fd: number, request: number, argument: Uint8Array) =>
        fails(`raw ${request}`) ? -12 : kernel.ioctlBufferRaw(fd, request, argument),
    },
    eventfd: { value: () => (fails('eventfd') ? fail('eventfd') : kernel.eventfd()) },
    map: {
      value: (options: MapOptions): HostMapping => {
        if (fails(`map ${options.length}`)) fail('mmap');
        const mapping = kernel.map(options);
        mappings++;
        const unmap = () => {
          mapping.unmap();
          mappings--;
        };
        const { handle } = mapping;
        const replace = (fd: number) => mapping.replace(fd);
        return { handle, view: (offset, length) => mapping.view(offset, length), replace, unmap };
      },
    },
    // Methods of the class need its private fields.
    open: { value: kernel.open.bind(kernel) },
    close: { value: kernel.close.bind(kernel) },
    signal: { value: kernel.signal.bind(kernel) },
  }) as HostKernel;
  return { kernel: wrapped, calls, mapped: () => mappings };
}

function descriptors(): number {
  const names = fs.readdirSync('/proc/self/fd').map((fd) => {
    try {
      return fs.readlinkSync(`/proc/self/fd/${fd}`);
    } catch {
      return ''; // the folder's own
    }
  });
  return names.filter((name) => /kvm|eventfd/.test(name)).length;
}

function build(kernel: HostKernel, open: (kernel: HostKernel) => X86Hypervisor): void {
  const undo: (() => void)[] = [];
  try {
    const hypervisor = open(kernel);
    undo.unshift(() => hypervisor.close());
    const board = new X86Board(hypervisor, config);
    undo.unshift(() => board.vm.close());
    const vcpus = board.createVcpus();
    undo.unshift(() => closeAll(vcpus.map((vcpu) => () => vcpu.close())));
    board.createPlatform([]);
  } finally {
    closeAll(undo);
  }
}

const HYPERVISORS: readonly [HypervisorName, () => HostKernel, (kernel: HostKernel) => X86Hypervisor][] = [
  ['kvm', () => new LinuxKernel(), openKvm],
  ['mshv', () => new SimulatedMshvKernel(), openMshv],
];

(fs.existsSync('/dev/kvm') ? test.each(HYPERVISORS) : test.skip.each(HYPERVISORS))(
  '%s',
  (_name, makeKernel, open) => {
    const kernel = makeKernel();
    const whole = failing(kernel, -1);
    build(whole.kernel, open);
    const before = descriptors();
    expect(whole.mapped()).toBe(0);
    // Of each kind of call the first and the last.
    const { calls } = whole;
    const points = new Set(calls.flatMap((name) => [calls.indexOf(name), calls.lastIndexOf(name)]));
    let refused = 0;
    for (const point of points) {
      const attempt = failing(kernel, point);
      try {
        build(attempt.kernel, open);
      } catch {
        refused++;
      }
      expect([calls[point], attempt.mapped(), descriptors()]).toEqual([calls[point], 0, before]);
    }
    // Some calls may fail: a register page, the frequency of the time-stamp counter.
    expect(refused).toBeGreaterThan(points.size / 2);
  },
  300_000,
);
