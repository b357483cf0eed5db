/** What of a configuration may be another where a machine is restored. */
import { expect, test } from '@jest/globals';
import type { VmConfig } from '../../../../src/config/vm-config.js';
import { RequestError } from '../../../../src/vmm/machine/machine-error.js';
import { configAnew, type GivenAnew } from '../../../../src/vmm/snapshot/given-anew.js';
import { savedConfig } from '../../../support/saved-machines.js';

const devices = {
  net: [
    { id: 'lan', tap: 'tap0', mac: '02:00:00:00:00:01' },
    { id: 'given', fds: [40, 41], num_queues: 4 },
  ],
  vsock: { cid: 3, socket: '/old' },
  serial: { mode: 'File', file: '/log' },
};
const saved = savedConfig(2, devices);
const NONE = new Map<string, number[]>();
const anew = (more: Partial<GivenAnew>, config: VmConfig = savedConfig(1, { ...devices, net: [devices.net[0]] })) =>
  configAnew(config, { descriptors: NONE, ...more });

test('nothing is another where nothing is given', () => {
  const config = savedConfig(1, { ...devices, net: [devices.net[0]] });
  expect(anew({}, config)).toEqual(config);
});

test('each that is given is in its place, and all else stays', () => {
  const config = savedConfig(1, { ...devices, net: [devices.net[0]] });
  const [lan] = config.net;
  const [disk] = config.disks;
  const net = [{ id: 'lan', tap: 'tap9', mac: '02:00:00:00:00:09' }];
  expect(anew({ net }).net).toEqual([{ ...lan, ...net[0] }]);
  expect(anew({ net: [{ id: 'lan', tap: 'tap9' }] }).net).toEqual([{ ...lan, tap: 'tap9' }]);
  expect(anew({ disks: [{ id: 'disk', path: '/copy' }] }).disks).toEqual([{ ...disk, path: '/copy' }]);
  expect(anew({ vsock: { cid: 9 } }).vsock).toMatchObject({ cid: 9, socket: '/old' });
  expect(anew({ vsock: { socket: '/new' } }).vsock).toMatchObject({ cid: 3, socket: '/new' });
  expect(anew({ serial: { mode: 'Null' } }).serial).toEqual({ mode: 'Null' });
  expect({ ...anew({ serial: { mode: 'Null' } }), serial: config.serial }).toEqual(config);
});

test('descriptors are for networks that had some, as many', () => {
  const descriptors = new Map([['given', [7, 8]]]);
  expect(anew({ descriptors }, saved).net.map(({ fds }) => fds)).toEqual([undefined, [7, 8]]);
  const line = 'net_fds: accepted are 2 descriptors for given, as many as it had';
  expect(() => anew({}, saved)).toThrow(line);
  expect(() => anew({ descriptors: new Map([['given', [7]]]) }, saved)).toThrow(line);
});

test('more queues than there are vCPUs now, and vCPUs that came meanwhile', () => {
  const config = savedConfig(3);
  const now = { ...config, cpus: { ...config.cpus, boot_vcpus: 2 } };
  const [disk] = config.disks;
  const queues = { ...now, disks: [{ ...disk, num_queues: 3 }] };
  expect(anew({}, queues)).toEqual(queues);
});

test.each<readonly [string, Partial<GivenAnew>, RegExp]>([
  ['a network that it has not', { net: [{ id: 'wan' }] }, /^net: the snapshot has no wan$/],
  ['a disk that it has not', { disks: [{ id: 'lan', path: '/x' }] }, /^disks: the snapshot has no lan$/],
  ['descriptors for none', { descriptors: new Map([['wan', [5]]]) }, /^net_fds: the snapshot has no wan$/],
  ['a serial port that it has and shall not', { serial: { mode: 'Off' } }, /^serial: accepted is another place/],
  ['a console that it has not', { console: { mode: 'Null' } }, /^console: accepted is another place/],
  ['an address of many', { net: [{ id: 'lan', mac: '01:00:00:00:00:00' }] }, /^net\.0\.mac: accepted is /],
])('%s is refused in one line', (_name, given, line) => {
  expect(() => anew(given)).toThrow(line);
  expect(() => anew(given)).toThrow(RequestError);
});

test('a vsock device that it has not', () => {
  expect(() => anew({ vsock: { cid: 9 } }, savedConfig(1))).toThrow('vsock: the snapshot has none');
});
