/** The interface between the machine and its hypervisors: what is on which side of it. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from '@jest/globals';
import * as arm from '../../../src/hypervisor/kvm/aarch64/abi.js';
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import * as mshv from '../../../src/hypervisor/mshv/abi.js';

/** The type field of an ioctl's number: asm-generic/ioctl.h; KVMIO and MSHV_IOCTL. */
const IOCTL_TYPES = [0xae, 0xb8];

/** Names of the requests in a list of constants. */
function requests(abi: Readonly<Record<string, unknown>>): string[] {
  return Object.entries(abi)
    .filter(([name, value]) => /^(KVM|MSHV)_/.test(name) && typeof value === 'number' && value > 0xff)
    .filter(([, value]) => IOCTL_TYPES.includes(((value as number) >>> 8) & 0xff))
    .map(([name]) => name);
}

test('no file outside the folders of the backends names a request of KVM or of the Microsoft hypervisor', () => {
  const names = [kvm, arm, mshv].flatMap(requests);
  expect(names).toEqual(expect.arrayContaining(['KVM_RUN', 'KVM_CREATE_VM', 'MSHV_RUN_VP', 'MSHV_CREATE_PARTITION']));
  const pattern = new RegExp(`\\b(${names.join('|')})\\b`);
  const files = fs.readdirSync('src', { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.ts'));
  const outside = files.filter((name) => !/^hypervisor\/(kvm|mshv)\//.test(name));
  expect(outside.length).toBeGreaterThan(100);
  const found = outside.filter((name) => pattern.test(fs.readFileSync(path.join('src', name), 'utf8')));
  expect(found).toEqual([]);
});
