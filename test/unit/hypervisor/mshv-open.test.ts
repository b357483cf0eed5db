import { expect, test } from '@jest/globals';
import { HypervisorError } from '../../../src/hypervisor/hypervisor.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { openMshv } from '../../../src/hypervisor/mshv/mshv.js';
import { type HostKernel, SystemError } from '../../../src/sys/host-kernel.js';

const fail = (code: string, reason: string) => (): never => {
  throw new SystemError(code, 1, 'call', reason);
};

/** A kernel whose device behaves as told; what it opened and closed. */
function kernelWith(open: () => number, createPartition: (argument: Uint8Array) => number) {
  const closed: number[] = [];
  const kernel = {
    open,
    close: (fd: number) => void closed.push(fd),
    ioctlBuffer: (_fd: number, request: number, argument: Uint8Array) => {
      expect(request).toBe(abi.MSHV_CREATE_PARTITION);
      return createPartition(argument);
    },
  } as unknown as HostKernel;
  return { kernel, closed };
}

function messageOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(HypervisorError);
    return (error as Error).message;
  }
  throw new Error('It worked');
}

test.each([
  ['ENOENT', 'no such file or directory', /^No \/dev\/mshv on this host: it is not the root partition/],
  ['ENODEV', 'no such device', /^No \/dev\/mshv on this host: it is not the root partition/],
  ['EACCES', 'permission denied', /^No permission for \/dev\/mshv: /],
  ['EMFILE', 'too many open files', /^\/dev\/mshv cannot be opened: .*too many open files/],
])('a device that cannot be opened with %s is one line', (code, reason, line) => {
  const { kernel } = kernelWith(fail(code, reason), () => 0);
  const message = messageOf(() => openMshv(kernel));
  expect(message).toMatch(line);
  expect(message).not.toContain('\n');
});

test.each([
  ['ENOTTY', 'not supported by this device', /too old or of another kind: Linux 6\.15 or later is needed$/],
  ['ENOMEM', 'not enough memory', /^\/dev\/mshv creates no partition: not enough memory$/],
])('a driver that refuses a partition with %s is one line, and nothing stays open', (code, reason, line) => {
  const { kernel, closed } = kernelWith(() => 7, fail(code, reason));
  const hypervisor = openMshv(kernel);
  expect(messageOf(() => hypervisor.createVm())).toMatch(line);
  hypervisor.close();
  expect(closed).toEqual([7]);
});

test('a driver that knows the first arguments alone gets those', () => {
  const sizes: number[] = [];
  const { kernel } = kernelWith(
    () => 7,
    (argument) => {
      sizes.push(argument.length);
      return argument.length === abi.CREATE_PARTITION_SIZE
        ? fail('ENOMEM', 'not enough memory')()
        : fail('EINVAL', '')();
    },
  );
  messageOf(() => openMshv(kernel).createVm());
  expect(sizes).toEqual([abi.CREATE_PARTITION_V2_SIZE, abi.CREATE_PARTITION_SIZE]);
});

test('partitions are made without the TSC deadline timer, for which the hypervisor has no register', () => {
  let argument = new Uint8Array(0);
  const { kernel } = kernelWith(
    () => 7,
    (given) => {
      argument = given.slice();
      return fail('ENOMEM', 'not enough memory')();
    },
  );
  messageOf(() => openMshv(kernel).createVm());
  const banks = new DataView(argument.buffer, abi.CREATE_PARTITION_V2.disabledFeatures);
  const second = 1n << BigInt(abi.PROCESSOR_FEATURE_BIT.tsc_deadline_tmr_support - 64);
  expect([banks.getBigUint64(0, true), banks.getBigUint64(8, true)]).toEqual([0n, second]);
});
