/**
 * What the doctor looks at, gathered in one place: the checks (checks.ts) are a function of these facts alone.
 *
 * Sources: proc(5); Linux Documentation/admin-guide/mm/hugetlbpage.rst and transhuge.rst; KVM's api.rst, 4.4.
 * Nothing here changes the host, but that opening a device node may load its module, as using it would.
 */
import fs from 'node:fs';
import { HypervisorError } from '../../hypervisor/hypervisor.js';
import { KVM_CAP, KVM_CHECK_EXTENSION, KVM_GET_API_VERSION, type KvmCapability } from '../../hypervisor/kvm/abi.js';
import { KVM_DEVICE, openKvm } from '../../hypervisor/kvm/kvm.js';
import { type HostKernel, SystemError } from '../../sys/host-kernel.js';
import { type LiveTest, runLiveTest } from './live-test.js';

/** `ok`: opens for reading and writing. Else the errno's name, such as `ENOENT`. */
export type Access = string;

export interface CpuFacts {
  readonly vendor: string;
  readonly model: string;
  /** The lines `flags` and `vmx flags` of /proc/cpuinfo together. */
  readonly flags: readonly string[];
}

export interface HugepagePool {
  /** Bytes. */
  readonly size: number;
  /** Pages. */
  readonly total: number;
  readonly free: number;
}

export interface DoctorFacts {
  /** As `process.version`. */
  readonly node: string;
  /** As `process.arch`. */
  readonly architecture: string;
  readonly cpu: CpuFacts;
  readonly kvm: Access;
  /** Undefined: the device is no KVM, or does not open. */
  readonly kvmVersion?: number;
  /** What KVM_CHECK_EXTENSION answers: 0 is absent. Undefined as above. */
  readonly capabilities?: Readonly<Record<KvmCapability, number>>;
  /** Undefined: the architecture has none. A text: why no guest could be tried at all. */
  readonly live?: LiveTest | string;
  /** Of the KVM module that drives this processor, by name, such as `kvm_amd.npt`. */
  readonly moduleParameters: Readonly<Record<string, string>>;
  readonly mshv: Access;
  /** By path. */
  readonly devices: Readonly<Record<string, Access>>;
  readonly hugepages: readonly HugepagePool[];
  /** `always`, `madvise` or `never`. Undefined: the kernel has no transparent huge pages. */
  readonly transparentHugepages?: string;
  /** Bytes that new processes can have without swapping. */
  readonly memoryAvailable: number;
  /** Bytes; Infinity when unlimited. */
  readonly memlock: number;
  readonly openFiles: number;
}

export const MSHV_DEVICE = '/dev/mshv';
const OTHER_DEVICES = ['/dev/net/tun', '/dev/vhost-net', '/dev/vhost-vsock', '/dev/vfio/vfio'];
const MODULE_PARAMETERS = {
  kvm_intel: ['ept', 'nested', 'unrestricted_guest', 'enable_apicv'],
  kvm_amd: ['npt', 'nested', 'avic'],
};

/** A file's text without the newline at its end; undefined when it cannot be read. */
function readText(path: string): string | undefined {
  try {
    return fs.readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}

/** Opening tells more than a permission check: a container may refuse a device, or its driver be missing. */
function access(path: string): Access {
  try {
    fs.closeSync(fs.openSync(path, 'r+'));
    return 'ok';
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? 'unknown';
  }
}

/** @param text /proc/cpuinfo */
export function parseCpuinfo(text: string): CpuFacts {
  const field = (name: string) => new RegExp(`^${name}\\s*: (.*)$`, 'm').exec(text)?.[1] ?? '';
  return {
    vendor: field('vendor_id'),
    model: field('model name'),
    flags: `${field('flags')} ${field('vmx flags')}`.split(' ').filter((flag) => flag !== ''),
  };
}

function moduleParameters(): Record<string, string> {
  const found = Object.entries(MODULE_PARAMETERS).flatMap(([module, names]) =>
    names.map((name) => [`${module}.${name}`, readText(`/sys/module/${module}/parameters/${name}`)] as const),
  );
  return Object.fromEntries(found.filter((entry): entry is [string, string] => entry[1] !== undefined));
}

function hugepagePools(): HugepagePool[] {
  const folder = '/sys/kernel/mm/hugepages';
  const names = fs.existsSync(folder) ? fs.readdirSync(folder) : [];
  return names
    .map((name) => ({
      size: Number(/^hugepages-(\d+)kB$/.exec(name)?.[1]) * 1024,
      total: Number(readText(`${folder}/${name}/nr_hugepages`)),
      free: Number(readText(`${folder}/${name}/free_hugepages`)),
    }))
    .sort((a, b) => a.size - b.size);
}

/** Asks without openKvm, which ends at the first capability that is missing. */
function askKvm(kernel: HostKernel): Pick<DoctorFacts, 'kvmVersion' | 'capabilities'> {
  const fd = kernel.open(KVM_DEVICE);
  try {
    const kvmVersion = kernel.ioctl(fd, KVM_GET_API_VERSION);
    const answers = Object.entries(KVM_CAP).map(([name, cap]) => [name, kernel.ioctl(fd, KVM_CHECK_EXTENSION, cap)]);
    return { kvmVersion, capabilities: Object.fromEntries(answers) as Record<KvmCapability, number> };
  } catch (error) {
    if (error instanceof SystemError) return {};
    throw error;
  } finally {
    kernel.close(fd);
  }
}

function tryGuests(kernel: HostKernel): LiveTest | string {
  try {
    const hypervisor = openKvm(kernel);
    try {
      return runLiveTest(kernel, hypervisor);
    } finally {
      hypervisor.close();
    }
  } catch (error) {
    if (error instanceof HypervisorError) return error.message;
    throw error;
  }
}

export function gatherFacts(kernel: HostKernel): DoctorFacts {
  const kvm = access(KVM_DEVICE);
  const memoryKib = /^MemAvailable:\s+(\d+) kB$/m.exec(readText('/proc/meminfo') ?? '')?.[1];
  return {
    node: process.version,
    architecture: process.arch,
    cpu: parseCpuinfo(readText('/proc/cpuinfo') ?? ''),
    kvm,
    ...(kvm === 'ok' ? askKvm(kernel) : {}),
    live: kvm === 'ok' && process.arch === 'x64' ? tryGuests(kernel) : undefined,
    moduleParameters: moduleParameters(),
    mshv: access(MSHV_DEVICE),
    devices: Object.fromEntries(OTHER_DEVICES.map((path) => [path, access(path)])),
    hugepages: hugepagePools(),
    transparentHugepages: /\[(\w+)\]/.exec(readText('/sys/kernel/mm/transparent_hugepage/enabled') ?? '')?.[1],
    memoryAvailable: Number(memoryKib ?? 0) * 1024,
    memlock: kernel.resourceLimit('memlock'),
    openFiles: kernel.resourceLimit('nofile'),
  };
}
