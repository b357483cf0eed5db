/** What the doctor finds on this host, gathered in one place so that its judgement can be tested without a host. */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import * as arm64 from '../../hypervisor/kvm/aarch64/abi.js';
import { REQUIRED_CAPABILITIES as ARM64_REQUIRED } from '../../hypervisor/kvm/aarch64/kvm.js';
import * as x86 from '../../hypervisor/kvm/abi.js';
import { KVM_DEVICE, probeCapabilities } from '../../hypervisor/kvm/device.js';
import { openHostKvm } from '../../hypervisor/kvm/host.js';
import { REQUIRED_CAPABILITIES as X86_REQUIRED } from '../../hypervisor/kvm/kvm.js';
import { MSHV_DEVICE, openMshv } from '../../hypervisor/mshv/mshv.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { liveTestArm64 } from './live-test-arm64.js';
import { type LiveResult, liveTest } from './live-test.js';

export type DeviceState = 'usable' | 'no permission' | 'absent';

export interface Facts {
  readonly node: string;
  readonly architecture: string;
  readonly devices: Readonly<Record<string, DeviceState>>;
  /** Value of each capability; undefined: KVM cannot be asked. */
  readonly capabilities?: Readonly<Record<string, number>>;
  /** Those without which no guest can run. */
  readonly requiredCapabilities: readonly string[];
  /** Why KVM cannot be used. */
  readonly kvmProblem?: string;
  /** Why the Microsoft hypervisor cannot be used. */
  readonly mshvProblem?: string;
  /** Why no memory can be read as it is touched. */
  readonly faultsProblem?: string;
  readonly live: readonly LiveResult[];
  readonly cpu: string;
  readonly cpuFlags: readonly string[];
  /** Huge pages free, by size in KiB. */
  readonly hugepages: Readonly<Record<string, number>>;
  readonly thp: string;
  /** Bytes, and descriptors. */
  readonly memlock: number;
  readonly nofile: number;
  readonly memoryAvailable: number;
}

const ARM64 = process.arch === 'arm64';
const DEVICES = [KVM_DEVICE, MSHV_DEVICE, '/dev/net/tun', '/dev/vhost-net', '/dev/vhost-vsock', '/dev/vfio/vfio'];

/** Set in the child process that runs the live test, whose end the parent does not depend on. */
const PROBE_VARIABLE = 'VMM_DOCTOR_PROBE';
const PROBE_LIMIT_MILLISECONDS = 20_000;

function read(path: string): string {
  try {
    return fs.readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}

function deviceState(path: string): DeviceState {
  if (!fs.existsSync(path)) return 'absent';
  try {
    fs.closeSync(fs.openSync(path, fs.constants.O_RDWR | fs.constants.O_NONBLOCK));
    return 'usable';
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    return code === 'EACCES' || code === 'EPERM' ? 'no permission' : 'absent';
  }
}

/** The selected one of a sysfs list such as `always [madvise] never`. */
function selected(text: string): string {
  return /\[(\w+)\]/.exec(text)?.[1] ?? 'absent';
}

function hugepages(): Record<string, number> {
  const root = '/sys/kernel/mm/hugepages';
  if (!fs.existsSync(root)) return {};
  return Object.fromEntries(
    fs.readdirSync(root).map((name) => {
      const size = /^hugepages-(\d+)kB$/.exec(name)?.[1] ?? name;
      return [size, Number(read(`${root}/${name}/free_hugepages`))];
    }),
  );
}

/** In the child: runs the live test. @returns its results as JSON; undefined: this process is not that child */
export function runProbe(kernel: HostKernel): string | undefined {
  if (process.env[PROBE_VARIABLE] === undefined) return undefined;
  const hypervisor = openHostKvm(kernel);
  const results =
    hypervisor.architecture === 'aarch64' ? liveTestArm64(hypervisor, kernel) : liveTest(hypervisor, kernel);
  hypervisor.close();
  return JSON.stringify(results);
}

/** A guest that never comes back must not take the doctor with it: the test runs in a child with a time limit. */
function liveResults(): LiveResult[] {
  const child = spawnSync(process.execPath, [...process.execArgv, process.argv[1], 'doctor'], {
    env: { ...process.env, [PROBE_VARIABLE]: '1' },
    encoding: 'utf8',
    timeout: PROBE_LIMIT_MILLISECONDS,
    killSignal: 'SIGKILL',
  });
  try {
    return JSON.parse(child.stdout) as LiveResult[];
  } catch {
    const problem = child.signal === null ? child.stderr.trim() : 'the test did not end in time';
    return [{ mode: 'real', speed: 0, problem }];
  }
}

/** @returns what is wrong, if anything @param open opens the hypervisor and closes it again */
function problemOf(open: () => void): string | undefined {
  try {
    open();
    return undefined;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

/** A partition is made and given back: what the driver and the hypervisor refuse shows then. */
function tryMshv(kernel: HostKernel): void {
  const hypervisor = openMshv(kernel);
  try {
    hypervisor.createVm().close();
  } finally {
    hypervisor.close();
  }
}

export function gatherFacts(kernel: HostKernel): Facts {
  const cpuinfo = read('/proc/cpuinfo');
  const devices = Object.fromEntries(DEVICES.map((path) => [path, deviceState(path)]));
  const kvmProblem = problemOf(() => openHostKvm(kernel).close());
  const known = ARM64 ? arm64.KVM_CAP : x86.KVM_CAP;
  return {
    node: process.versions.node,
    architecture: os.arch(),
    devices,
    capabilities:
      devices[KVM_DEVICE] === 'usable' && kvmProblem === undefined ? probeCapabilities(kernel, known) : undefined,
    requiredCapabilities: ARM64 ? ARM64_REQUIRED : X86_REQUIRED,
    kvmProblem,
    mshvProblem: problemOf(() => tryMshv(kernel)),
    faultsProblem: problemOf(() => kernel.close(kernel.userfaultfd())),
    live: kvmProblem === undefined ? liveResults() : [],
    cpu: /^(?:model name|CPU part)\s*: (.*)$/m.exec(cpuinfo)?.[1] ?? 'unknown',
    cpuFlags: /^(?:flags|Features)\s*: (.*)$/m.exec(cpuinfo)?.[1]?.split(' ') ?? [],
    hugepages: hugepages(),
    thp: selected(read('/sys/kernel/mm/transparent_hugepage/enabled')),
    memlock: kernel.resourceLimit('memlock'),
    nofile: kernel.resourceLimit('nofile'),
    memoryAvailable: Number(/^MemAvailable:\s+(\d+)/m.exec(read('/proc/meminfo'))?.[1] ?? 0) * 1024,
  };
}
