/** The doctor's judgement: from what was found on a host to what it can do, and what to do about the rest. */
import { KVM_DEVICE } from '../../hypervisor/kvm/device.js';
import { MSHV_DEVICE } from '../../hypervisor/mshv/mshv.js';
import { FAULTS_NEEDED } from '../../vmm/memory/page-faults.js';
import type { DeviceState, Facts } from './facts.js';

export type Status = 'ok' | 'warn' | 'fail';

export interface Check {
  readonly id: string;
  readonly status: Status;
  readonly detail: string;
  /** What to do about it. */
  readonly advice?: string;
}

export interface Report {
  readonly canRunStockGuests: boolean;
  /** Why, or why not, in one line. */
  readonly reason: string;
  readonly checks: readonly Check[];
}

/**
 * Instructions a second, between a KVM that emulates every instruction (1 to 5 million) and one on an emulated processor,
 * the slowest that runs stock kernels (600 million and more).
 */
const EMULATION_LIMIT = 50_000_000;
const MIN_NODE = [20, 19] as const;
const ENOUGH_DESCRIPTORS = 4096;
const GIB = 2 ** 30;

const DEVICE_ADVICE: Readonly<Record<string, { use: string; modules: string }>> = {
  '/dev/net/tun': { use: 'networks over taps', modules: 'tun' },
  '/dev/vhost-net': { use: 'networks in the kernel', modules: 'vhost_net' },
  '/dev/vhost-vsock': { use: 'vsock in the kernel', modules: 'vhost_vsock' },
  '/dev/vfio/vfio': { use: 'passing devices through', modules: 'vfio-pci' },
};

function checkNode({ node }: Facts): Check {
  const [major = 0, minor = 0] = node.split('.').map(Number);
  const enough = major > MIN_NODE[0] || (major === MIN_NODE[0] && minor >= MIN_NODE[1]);
  return enough
    ? { id: 'node', status: 'ok', detail: `Node.js ${node}` }
    : { id: 'node', status: 'fail', detail: `Node.js ${node}`, advice: `install ${MIN_NODE.join('.')} or later` };
}

function checkArchitecture({ architecture }: Facts): Check {
  const name = { x64: 'x86_64', arm64: 'aarch64' }[architecture];
  return name !== undefined
    ? { id: 'architecture', status: 'ok', detail: name }
    : { id: 'architecture', status: 'fail', detail: architecture, advice: 'use an x86_64 or aarch64 host' };
}

const PERMISSION_ADVICE = 'give this user access to it: usually its group (`ls -l` tells), then log in again';

function checkKvm({ devices, kvmProblem }: Facts): Check {
  if (kvmProblem === undefined) return { id: 'kvm', status: 'ok', detail: `${KVM_DEVICE} can be used` };
  const advice =
    devices[KVM_DEVICE] === 'no permission'
      ? PERMISSION_ADVICE
      : 'enable virtualization in the firmware, or nested in the host';
  return { id: 'kvm', status: 'fail', detail: kvmProblem, advice };
}

function checkMshv({ devices, mshvProblem }: Facts): Check {
  // KVM hosts have none, and are none the worse for it.
  const absent = devices[MSHV_DEVICE] === 'absent';
  if (absent && mshvProblem !== undefined) {
    return { id: 'mshv', status: 'ok', detail: `no ${MSHV_DEVICE}: no Microsoft hypervisor root partition` };
  }
  if (mshvProblem === undefined) return { id: 'mshv', status: 'ok', detail: `${MSHV_DEVICE} can be used` };
  const advice =
    devices[MSHV_DEVICE] === 'no permission'
      ? PERMISSION_ADVICE
      : 'use the root partition of a Microsoft hypervisor, with Linux 6.15 or later';
  return { id: 'mshv', status: 'warn', detail: mshvProblem, advice };
}

function checkCapabilities({ capabilities, requiredCapabilities }: Facts): Check[] {
  if (capabilities === undefined) return [];
  return Object.entries(capabilities).map(([name, value]): Check => {
    const id = `kvm.${name}`;
    if (value > 0) return { id, status: 'ok', detail: `KVM_CAP_${name} = ${value}` };
    const required = requiredCapabilities.includes(name);
    const advice = required ? 'use a newer kernel' : 'nothing to do: guests run without it';
    return { id, status: required ? 'fail' : 'ok', detail: `KVM_CAP_${name} is absent`, advice };
  });
}

function checkLive({ live, kvmProblem }: Facts): Check[] {
  if (kvmProblem !== undefined) return [];
  return live.map(({ mode, speed, problem }): Check => {
    const id = `live.${mode}`;
    if (problem !== undefined) {
      return {
        id,
        status: 'fail',
        detail: `${mode} mode: ${problem}`,
        advice: 'use a KVM with hardware virtualization',
      };
    }
    const rate = `${mode} mode: ${(speed / 1e6).toFixed(1)} million instructions a second`;
    if (speed >= EMULATION_LIMIT) return { id, status: 'ok', detail: rate };
    // Older Intel processors need real mode emulated, and protected mode on the way out of it; the others decide.
    if (mode === 'real' || mode === 'protected') return { id, status: 'warn', detail: `${rate}: emulated` };
    const detail = `${rate}: this KVM only emulates, as one nested without hardware support does`;
    return { id, status: 'fail', detail, advice: 'use a KVM with hardware virtualization' };
  });
}

function checkCpu({ architecture, cpu, cpuFlags }: Facts): Check {
  // Whether Linux was started at EL2 is KVM's to tell.
  if (architecture === 'arm64') return { id: 'cpu', status: 'ok', detail: `part ${cpu}: ${cpuFlags.join(' ')}` };
  const has = (flag: string) => cpuFlags.includes(flag);
  const features = [
    'vmx',
    'svm',
    'ept',
    'npt',
    'vpid',
    'avic',
    'x2apic',
    'tsc_deadline_timer',
    'constant_tsc',
    'pdpe1gb',
  ];
  const found = features.filter(has);
  const nested = has('hypervisor') ? '; itself a virtual machine' : '';
  const detail = `${cpu}: ${found.join(' ') || 'no virtualization features'}${nested}`;
  if (has('vmx') || has('svm')) return { id: 'cpu', status: 'ok', detail };
  return { id: 'cpu', status: 'warn', detail, advice: 'enable VT-x or AMD-V in the firmware, or nested in the host' };
}

function checkDevice(path: string, state: DeviceState): Check {
  const { use, modules } = DEVICE_ADVICE[path];
  if (state === 'usable') return { id: path, status: 'ok', detail: `${path}, for ${use}` };
  const advice = state === 'absent' ? `modprobe ${modules}` : PERMISSION_ADVICE;
  return { id: path, status: 'warn', detail: `${path}, for ${use}: ${state}`, advice };
}

function checkFaults({ faultsProblem }: Facts): Check {
  const use = 'page faults, for memory_restore_mode=ondemand';
  if (faultsProblem === undefined) return { id: 'userfaultfd', status: 'ok', detail: `${use}: can be served` };
  return { id: 'userfaultfd', status: 'warn', detail: `${use}: ${faultsProblem}`, advice: `give vmm ${FAULTS_NEEDED}` };
}

function checkHugepages({ hugepages, thp }: Facts): Check[] {
  const free = Object.entries(hugepages).map(([kib, count]) => `${count} of ${Number(kib) / 1024} MiB`);
  const some = Object.values(hugepages).some((count) => count > 0);
  const advice = some ? undefined : 'for hugepages=on: sysctl vm.nr_hugepages=COUNT';
  return [
    { id: 'hugepages', status: 'ok', detail: `free huge pages: ${free.join(', ') || 'none of any size'}`, advice },
    { id: 'thp', status: 'ok', detail: `transparent huge pages: ${thp}` },
  ];
}

function checkLimits({ nofile, memlock, memoryAvailable }: Facts): Check[] {
  const limit = Number.isFinite(memlock) ? `${Math.floor(memlock / 1024)} KiB` : 'unlimited';
  const nofileCheck: Check =
    nofile >= ENOUGH_DESCRIPTORS
      ? { id: 'nofile', status: 'ok', detail: `open files: ${nofile}` }
      : { id: 'nofile', status: 'warn', detail: `open files: ${nofile}`, advice: `ulimit -n ${ENOUGH_DESCRIPTORS}` };
  return [
    nofileCheck,
    { id: 'memlock', status: 'ok', detail: `locked memory: ${limit}` },
    { id: 'memory', status: 'ok', detail: `memory available: ${(memoryAvailable / GIB).toFixed(1)} GiB` },
  ];
}

export function judge(facts: Facts): Report {
  const mshv = facts.mshvProblem === undefined;
  // Where guests run on the other hypervisor, what KVM lacks is told and stops nobody.
  const soften = (check: Check): Check => (mshv && check.status === 'fail' ? { ...check, status: 'warn' } : check);
  const kvm = [checkKvm(facts), ...checkLive(facts)];
  const checks = [
    checkNode(facts),
    checkArchitecture(facts),
    ...kvm.map(soften),
    checkMshv(facts),
    checkCpu(facts),
    ...checkCapabilities(facts).map(soften),
    ...Object.keys(DEVICE_ADVICE).map((path) => checkDevice(path, facts.devices[path] ?? 'absent')),
    checkFaults(facts),
    ...checkHugepages(facts),
    ...checkLimits(facts),
  ];
  const failure = checks.find(({ status }) => status === 'fail');
  const works = kvm.every(({ status }) => status !== 'fail');
  return {
    canRunStockGuests: failure === undefined,
    reason: failure?.detail ?? (works ? 'KVM runs code at the speed of a processor' : 'the Microsoft hypervisor works'),
    checks,
  };
}

export function formatReport({ canRunStockGuests, reason, checks }: Report): string {
  const lines = checks.map(({ status, detail, advice }) => {
    const line = `${status.padEnd(4)}  ${detail}`;
    return advice === undefined ? line : `${line}\n      -> ${advice}`;
  });
  const verdict = canRunStockGuests ? 'This host can run stock guests' : 'This host cannot run stock guests';
  return [...lines, '', `${verdict}: ${reason}.`].join('\n');
}
