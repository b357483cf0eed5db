import { describe, expect, test } from '@jest/globals';
import type { Facts } from '../../../src/cli/doctor/facts.js';
import { formatReport, judge } from '../../../src/cli/doctor/judge.js';
import { KVM_CAP } from '../../../src/hypervisor/kvm/abi.js';
import { REQUIRED_CAPABILITIES } from '../../../src/hypervisor/kvm/kvm.js';

/** A host where everything is as it should be. */
const GOOD: Facts = {
  node: '20.20.2',
  architecture: 'x64',
  devices: {
    '/dev/kvm': 'usable',
    '/dev/mshv': 'absent',
    '/dev/net/tun': 'usable',
    '/dev/vhost-net': 'usable',
    '/dev/vhost-vsock': 'usable',
    '/dev/vfio/vfio': 'usable',
  },
  capabilities: Object.fromEntries(Object.keys(KVM_CAP).map((name) => [name, 1])),
  requiredCapabilities: REQUIRED_CAPABILITIES,
  mshvProblem: 'No /dev/mshv on this host',
  live: (['real', 'protected', 'long'] as const).map((mode) => ({ mode, speed: 2_000_000_000 })),
  cpu: 'A processor',
  cpuFlags: ['vmx', 'ept'],
  hugepages: { '2048': 10 },
  thp: 'madvise',
  memlock: Infinity,
  nofile: 20_000,
  memoryAvailable: 2 ** 34,
};

function statuses(facts: Facts): Record<string, string> {
  return Object.fromEntries(judge(facts).checks.map(({ id, status }) => [id, status]));
}

describe('the doctor', () => {
  test('has no complaint about a good host', () => {
    const report = judge(GOOD);
    expect(report.canRunStockGuests).toBe(true);
    expect(report.checks.every(({ status }) => status === 'ok')).toBe(true);
    expect(formatReport(report)).toMatch(/This host can run stock guests/);
  });

  test('recognises a KVM that only emulates, by long mode alone', () => {
    const slow = (mode: string) => ({
      ...GOOD,
      live: GOOD.live.map((r) => (r.mode === mode ? { ...r, speed: 5e6 } : r)),
    });
    expect(judge(slow('long'))).toMatchObject({
      canRunStockGuests: false,
      reason: expect.stringMatching(/only emulates/),
    });
    expect(judge(slow('real'))).toMatchObject({ canRunStockGuests: true });
    expect(statuses(slow('real'))['live.real']).toBe('warn');
  });

  test('accepts an Arm host, whose loop runs at EL1', () => {
    const arm = {
      ...GOOD,
      architecture: 'arm64',
      cpuFlags: ['fp', 'asimd'],
      live: [{ mode: 'EL1' as const, speed: 6e8 }],
    };
    expect(judge(arm)).toMatchObject({ canRunStockGuests: true });
    expect(judge({ ...arm, live: [{ mode: 'EL1', speed: 5e6 }] })).toMatchObject({ canRunStockGuests: false });
  });

  test('takes the Microsoft hypervisor where KVM does not work', () => {
    const azure = {
      ...GOOD,
      devices: { ...GOOD.devices, '/dev/kvm': 'absent' as const, '/dev/mshv': 'usable' as const },
    };
    const facts = { ...azure, live: [], capabilities: undefined, kvmProblem: 'No /dev/kvm', mshvProblem: undefined };
    expect(judge(facts)).toMatchObject({ canRunStockGuests: true, reason: 'the Microsoft hypervisor works' });
    expect(statuses(facts)).toMatchObject({ kvm: 'warn', mshv: 'ok' });
    const old = { ...facts, mshvProblem: '/dev/mshv creates no partition' };
    expect(judge(old)).toMatchObject({ canRunStockGuests: false, reason: 'No /dev/kvm' });
    expect(statuses(old)).toMatchObject({ kvm: 'fail', mshv: 'warn' });
  });

  test('accepts an emulated processor that really runs KVM guests', () => {
    expect(judge({ ...GOOD, live: GOOD.live.map((r) => ({ ...r, speed: 600e6 })) }).canRunStockGuests).toBe(true);
  });

  test('fails where code does not come back, or computes wrongly', () => {
    const live = [{ mode: 'long' as const, speed: 0, problem: 'the sum is wrong' }];
    expect(judge({ ...GOOD, live })).toMatchObject({ canRunStockGuests: false, reason: 'long mode: the sum is wrong' });
  });

  test('says what is wrong with a KVM that cannot be opened, and asks no further', () => {
    const facts = { ...GOOD, kvmProblem: 'No /dev/kvm on this host', capabilities: undefined, live: [] };
    expect(judge(facts)).toMatchObject({ canRunStockGuests: false, reason: 'No /dev/kvm on this host' });
    expect(Object.keys(statuses(facts)).some((id) => id.startsWith('kvm.'))).toBe(false);
  });

  test('tells a user who may not use a device whom to ask, not to look into the firmware', () => {
    const devices = { ...GOOD.devices, '/dev/kvm': 'no permission', '/dev/mshv': 'no permission' } as const;
    const refused = { ...GOOD, devices, kvmProblem: 'No permission for /dev/kvm', live: [] };
    const { checks } = judge({ ...refused, mshvProblem: 'No permission for /dev/mshv' });
    for (const id of ['kvm', 'mshv']) {
      expect(checks.find((check) => check.id === id)?.advice).toMatch(/^give this user access to it/);
    }
    const absent = judge({ ...GOOD, kvmProblem: 'No /dev/kvm', devices: { ...devices, '/dev/kvm': 'absent' } });
    expect(absent.checks.find(({ id }) => id === 'kvm')?.advice).toMatch(/firmware/);
  });

  test('tells needed capabilities from useful ones', () => {
    const without = (name: string) => ({ ...GOOD, capabilities: { ...GOOD.capabilities, [name]: 0 } });
    expect(statuses(without('IRQFD'))['kvm.IRQFD']).toBe('fail');
    expect(judge(without('TSC_CONTROL')).canRunStockGuests).toBe(true);
  });

  test.each<[string, Partial<Facts>, string, string]>([
    ['an old Node.js', { node: '18.19.0' }, 'node', 'fail'],
    ['another architecture', { architecture: 'riscv64' }, 'architecture', 'fail'],
    ['few descriptors', { nofile: 1024 }, 'nofile', 'warn'],
    ['no tun', { devices: { ...GOOD.devices, '/dev/net/tun': 'absent' } }, '/dev/net/tun', 'warn'],
    ['no page faults', { faultsProblem: 'open /dev/userfaultfd: permission denied (EACCES)' }, 'userfaultfd', 'warn'],
    ['no virtualization features', { cpuFlags: ['hypervisor'] }, 'cpu', 'warn'],
  ])('notices %s, and says what to do', (_, change, id, status) => {
    const check = judge({ ...GOOD, ...change }).checks.find((each) => each.id === id);
    expect(check).toMatchObject({ status, advice: expect.any(String) });
  });
});
