/**
 * KVM: /dev/kvm, the VM and its interrupt controllers.
 *
 * The in-kernel PIC, IOAPIC and PIT are used, not the split irqchip: a guest without ACPI finds its interrupts through the
 * MP table and the PIC, which the split irqchip does not have, and IOAPIC accesses cost no exit to user space.
 */
import { StateBlock } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { SystemError } from '../../sys/host-kernel.js';
import {
  type Hypervisor,
  HypervisorError,
  type InterruptHandle,
  type MemorySlot,
  type Vcpu,
  type VcpuHandle,
  type Vm,
  type VmHandle,
  type VmOptions,
  type VmSignals,
} from '../hypervisor.js';
import type { CpuidEntry } from '../x86-state.js';
import * as abi from './abi.js';
import { IOAPIC_PINS, kvmRoutesLayout, MAX_ROUTES, setRouting, wirePins } from './routes.js';
import { attachKvmSignals } from './signals.js';
import { KvmVcpu } from './vcpu.js';

export const KVM_DEVICE = '/dev/kvm';

/** The capabilities without which no guest can run here. `vmm doctor` reports them one by one. */
export const REQUIRED_CAPABILITIES: readonly abi.KvmCapability[] = [
  'IRQCHIP',
  'USER_MEMORY',
  'SET_TSS_ADDR',
  'EXT_CPUID',
  'MP_STATE',
  'IRQ_ROUTING',
  'IRQFD',
  'SIGNAL_MSI',
  'IOEVENTFD',
  'PIT2',
  'SET_IDENTITY_MAP_ADDR',
  'IMMEDIATE_EXIT',
];

/** KVM_GET_SUPPORTED_CPUID answers E2BIG when the table is too small; hosts of today give fewer than 128 entries. */
const MAX_CPUID_ENTRIES = 256;

/** @throws HypervisorError with a line for the user when the device cannot be used */
export function openKvm(kernel: HostKernel): KvmHypervisor {
  let fd: number;
  try {
    fd = kernel.open(KVM_DEVICE);
  } catch (error) {
    throw new HypervisorError(openAdvice(error));
  }
  try {
    const version = kernel.ioctl(fd, abi.KVM_GET_API_VERSION);
    if (version !== abi.KVM_API_VERSION) {
      throw new HypervisorError(`${KVM_DEVICE} speaks KVM API version ${version}; ${abi.KVM_API_VERSION} is needed`);
    }
    for (const name of REQUIRED_CAPABILITIES) {
      if (kernel.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP[name]) <= 0) {
        throw new HypervisorError(`${KVM_DEVICE} lacks the capability KVM_CAP_${name}; run 'vmm doctor'`);
      }
    }
  } catch (error) {
    kernel.close(fd);
    throw error instanceof SystemError ? new HypervisorError(`${KVM_DEVICE} is not a KVM device`) : error;
  }
  return new KvmHypervisor(kernel, fd);
}

/** Values of capabilities, 0 for one that is absent. @throws SystemError when the device cannot be opened */
export function probeCapabilities<Name extends abi.KvmCapability>(
  kernel: HostKernel,
  names: readonly Name[],
): Record<Name, number> {
  const fd = kernel.open(KVM_DEVICE);
  try {
    const values = names.map((name) => [name, kernel.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP[name])]);
    return Object.fromEntries(values) as Record<Name, number>;
  } finally {
    kernel.close(fd);
  }
}

function openAdvice(error: unknown): string {
  const code = error instanceof SystemError ? error.code : '';
  if (code === 'ENOENT')
    return `No ${KVM_DEVICE} on this host: load the module kvm_intel or kvm_amd, or run 'vmm doctor'`;
  if (code === 'EACCES' || code === 'EPERM') {
    return `No permission for ${KVM_DEVICE}: add this user to the group that owns it (on Debian: kvm)`;
  }
  return `${KVM_DEVICE} cannot be opened: ${error instanceof Error ? error.message : String(error)}`;
}

/** A vCPU that another thread created, on the thread that runs it. The creator closes it. */
export function attachKvmVcpu(kernel: HostKernel, handle: VcpuHandle): Vcpu {
  return new KvmVcpu(kernel, handle, kernel.attach(handle.run));
}

export class KvmHypervisor implements Hypervisor {
  readonly name = 'kvm';
  readonly maxVcpus: number;

  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
  ) {
    this.maxVcpus = kernel.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP.MAX_VCPUS);
  }

  createVm(options: VmOptions): Vm {
    const vm = new KvmVm(this.kernel, this.#create(), this.kernel.ioctl(this.fd, abi.KVM_GET_VCPU_MMAP_SIZE));
    try {
      vm.initialize(options);
    } catch (error) {
      vm.close();
      throw error;
    }
    return vm;
  }

  /** KVM_CREATE_VM is interruptible: a timer's signal makes it fail with EINTR, and asking again is all it takes. */
  #create(): number {
    for (;;) {
      try {
        return this.kernel.ioctl(this.fd, abi.KVM_CREATE_VM);
      } catch (error) {
        if (!(error instanceof SystemError) || error.code !== 'EINTR') throw error;
      }
    }
  }

  supportedCpuid(): CpuidEntry[] {
    const buffer = new Uint8Array(abi.CPUID_HEADER_SIZE + MAX_CPUID_ENTRIES * abi.CPUID_ENTRY_SIZE);
    const view = new DataView(buffer.buffer);
    view.setUint32(0, MAX_CPUID_ENTRIES, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_GET_SUPPORTED_CPUID, buffer);
    const count = Math.min(view.getUint32(0, true), MAX_CPUID_ENTRIES);
    return Array.from({ length: count }, (_, index) => {
      const at = abi.CPUID_HEADER_SIZE + index * abi.CPUID_ENTRY_SIZE;
      return {
        function: view.getUint32(at, true),
        index: view.getUint32(at + 4, true),
        significantIndex: (view.getUint32(at + 8, true) & abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX) !== 0,
        eax: view.getUint32(at + 12, true),
        ebx: view.getUint32(at + 16, true),
        ecx: view.getUint32(at + 20, true),
        edx: view.getUint32(at + 24, true),
      };
    });
  }

  close(): void {
    this.kernel.close(this.fd);
  }
}

class KvmVm implements Vm {
  readonly signals: VmSignals;
  readonly #eventfds: number[] = [];
  readonly #routes = new StateBlock(kvmRoutesLayout);
  #nextRoute = IOAPIC_PINS;

  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
    private readonly runSize: number,
  ) {
    this.signals = attachKvmSignals(kernel, this.handle);
  }

  get handle(): VmHandle {
    return { fd: this.fd, routes: this.#routes.buffer };
  }

  initialize(options: VmOptions): void {
    // Intel hosts without unrestricted guest need three pages and one page of guest addresses: api.rst, 4.35 and 4.41.
    this.kernel.ioctl(this.fd, abi.KVM_SET_TSS_ADDR, options.tssAddress);
    const identity = new Uint8Array(new BigUint64Array([BigInt(options.identityMapAddress)]).buffer);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, identity);
    this.kernel.ioctl(this.fd, abi.KVM_CREATE_IRQCHIP);
    const pit = new Uint8Array(abi.PIT_CONFIG_SIZE);
    new DataView(pit.buffer).setUint32(0, abi.KVM_PIT_SPEAKER_DUMMY, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_CREATE_PIT2, pit);
    wirePins(this.#routes);
    setRouting(this.kernel, this.fd, this.#routes);
    this.#maskPics();
  }

  /**
   * As firmware leaves them. A guest on hardware-reduced ACPI never looks at the PICs, but its first local APIC still takes
   * their interrupts, with whatever vector they have.
   */
  #maskPics(): void {
    for (const chip of [abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE]) {
      const state = new Uint8Array(abi.IRQCHIP_SIZE);
      new DataView(state.buffer).setUint32(0, chip, true);
      this.kernel.ioctlBuffer(this.fd, abi.KVM_GET_IRQCHIP, state);
      state[abi.PIC_IMR_OFFSET] = 0xff;
      this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_IRQCHIP, state);
    }
  }

  addMemory({ slot, guestAddress, mapping }: MemorySlot): void {
    const region = new Uint8Array(abi.USER_MEMORY_REGION_SIZE);
    const view = new DataView(region.buffer);
    view.setUint32(0, slot, true);
    view.setBigUint64(8, BigInt(guestAddress), true);
    view.setBigUint64(16, BigInt(mapping.length), true);
    view.setBigUint64(24, mapping.address, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_USER_MEMORY_REGION, region);
  }

  createVcpu(id: number): Vcpu {
    const fd = this.kernel.ioctl(this.fd, abi.KVM_CREATE_VCPU, id);
    const run = this.kernel.map({ length: this.runSize, fd, shared: true });
    return new KvmVcpu(this.kernel, { id, fd, run: run.handle }, run);
  }

  createInterrupt(pin: number): InterruptHandle {
    const eventfd = this.kernel.eventfd();
    this.#eventfds.push(eventfd);
    const irqfd = new Uint8Array(abi.IRQFD_SIZE);
    const view = new DataView(irqfd.buffer);
    view.setUint32(0, eventfd, true);
    view.setUint32(4, pin, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_IRQFD, irqfd);
    return { eventfd };
  }

  allocateMsiRoute(): number {
    if (this.#nextRoute === MAX_ROUTES) throw new HypervisorError(`More than ${MAX_ROUTES} interrupt routes`);
    return this.#nextRoute++;
  }

  tscKhz(): number | undefined {
    try {
      const khz = this.kernel.ioctl(this.fd, abi.KVM_GET_TSC_KHZ);
      return khz > 0 ? khz : undefined;
    } catch (error) {
      if (error instanceof SystemError) return undefined; // EIO: an unstable host TSC
      throw error;
    }
  }

  close(): void {
    for (const eventfd of this.#eventfds) this.kernel.close(eventfd);
    this.kernel.close(this.fd);
  }
}
