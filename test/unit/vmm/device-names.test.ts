import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { type DeviceKind, deviceNames, DeviceNames, nameOf } from '../../../src/vmm/devices/device-names.js';

const config = (devices: object) => vmConfigSchema.parse({ payload: { kernel: 'k' }, ...devices });

describe('names of devices', () => {
  test('that nobody gave run across kinds, in the order of their slots', () => {
    const named = config({
      disks: [{ path: 'a' }, { path: 'b', id: 'mine' }, { path: 'c' }],
      net: [{}],
      pmem: [{ file: 'd' }],
      vsock: { cid: 3, socket: 's' },
    });
    new DeviceNames().nameAll(named);
    const { disks, net, pmem, vsock } = named;
    expect([...disks, ...net, ...pmem, vsock].map((device) => device?.id)).toEqual([
      ...['_disk0', 'mine', '_disk1', '_net2', '_pmem3', '_vsock4'],
    ]);
  });

  test('are those that no other device has, the fixed ones too', () => {
    const named = config({
      disks: [{ path: 'a' }, { path: 'b', id: '_disk1' }, { path: 'c' }],
      rng: { id: '_disk0' },
      balloon: { id: '_disk2' },
      rate_limit_groups: [{ id: '_disk5', rate_limiter_config: { ops: { size: 1, refill_time: 1 } } }],
    });
    named.disks.push(...config({ disks: [{ path: 'd' }] }).disks);
    expect(deviceNames(named)).toEqual(new Set(['_disk0', '_disk1', '_disk2', '_disk5']));
    new DeviceNames().nameAll(named);
    expect(named.disks.map(nameOf)).toEqual(['_disk3', '_disk1', '_disk4', '_disk6']);
  });

  test('are never given twice, whoever is gone', () => {
    const kind = fc.constantFrom<DeviceKind>('disk', 'net', 'pmem', 'vsock', 'module');
    const step = fc.record({ kind, own: fc.option(fc.nat(12), { nil: undefined }), gone: fc.boolean() });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 40 }), (steps) => {
        const names = new DeviceNames();
        const taken = new Set<string>();
        const given = new Set<string>();
        for (const { kind: of, own, gone } of steps) {
          const mine = own === undefined ? undefined : `_${of}${own}`;
          if (mine !== undefined && taken.has(mine)) continue;
          const device: { id?: string | undefined } = { id: mine };
          names.name(of, device as never, taken);
          const name = nameOf(device);
          if (mine === undefined) {
            expect(name).toMatch(new RegExp(`^_${of}\\d+$`));
            expect([...taken, ...given]).not.toContain(name);
            given.add(name);
          } else expect(name).toBe(mine);
          if (!gone) taken.add(name);
        }
      }),
    );
  });

  test('that a device lacks are an error of the VMM', () => {
    expect(() => nameOf({})).toThrow('A device without a name');
  });
});
