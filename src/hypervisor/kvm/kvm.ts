/**
 * KVM on x86_64: the VM and its interrupt controllers.
 *
 * The in-kernel PIC, IOAPIC and PIT are used, not the split irqchip: a guest without ACPI finds its interrupts through the
 * MP table and the PIC, which the split irqchip does not have, and IOAPIC accesses cost no exit to user space.
 */
import { undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { SystemError } from '../../sys/host-kernel.js';
import {
  HypervisorError,
  type Vcpu,
  type VcpuHandle,
  type X86Hypervisor,
  type X86Vcpu,
  type X86Vm,
  type X86VmOptions,
} from '../hypervisor.js';
import type { X86VmState } from '../saved-state.js';
import type { CpuidEntry } from '../x86-state.js';
import * as abi from './abi.js';
import { withoutAmx } from './cpuid.js';
import { createKvmVm, openedWith, openKvmDevice } from './device.js';
import { IOAPIC_PINS, setRouting, wirePins } from './routes.js';
import { KvmTime } from './time.js';
import { KvmVcpu, type VcpuOwner } from './vcpu.js';
import type { EventAbilities } from './vcpu-events.js';
import { FOREIGN, type StateAbilities, stateAbilities } from './vcpu-state.js';
import { KvmVmBase } from './vm.js';
import { loadControllers, saveControllers } from './vm-state.js';
import { KvmX86Runner } from './x86-runner.js';

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
  const required = Object.fromEntries(REQUIRED_CAPABILITIES.map((name) => [name, abi.KVM_CAP[name]]));
  return new KvmHypervisor(kernel, openKvmDevice(kernel, required, 'load the module kvm_intel or kvm_amd'));
}

/**
 * CPUID 1 ECX: x2APIC and the TSC deadline timer, which the in-kernel APIC has whatever the processor has.
 * KVM_GET_SUPPORTED_CPUID leaves the latter out, not knowing which APIC a VM uses (api.rst, 4.46).
 */
const IN_KERNEL_APIC_FEATURES = (1 << 21) | (1 << 24);

/** A vCPU that another thread created, on the thread that runs it. The creator closes it. */
export function attachKvmVcpu(kernel: HostKernel, handle: VcpuHandle): Vcpu {
  return new KvmX86Runner(kernel, handle, kernel.attach(handle.run));
}

export class KvmHypervisor implements X86Hypervisor {
  readonly name = 'kvm';
  readonly architecture = 'x86_64';
  readonly maxVcpus: number;

  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
  ) {
    this.maxVcpus = openedWith(kernel, fd, () => kernel.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP.MAX_VCPUS));
  }

  createVm(options: X86VmOptions): X86Vm {
    const fd = createKvmVm(this.kernel, this.fd);
    const vm = openedWith(this.kernel, fd, () => new KvmVm(this.kernel, this.fd, fd, IOAPIC_PINS));
    try {
      vm.initialize(options);
    } catch (error) {
      undoAll(error, [() => vm.close()]);
    }
    return vm;
  }

  close(): void {
    this.kernel.close(this.fd);
  }
}

class KvmVm extends KvmVmBase implements X86Vm, VcpuOwner {
  readonly ioapic = true;
  readonly #vcpus: KvmVcpu[] = [];
  readonly time = new KvmTime(this.kernel, this.device, this.fd, this.#vcpus);
  #events: EventAbilities = { payload: false, tripleFault: false };
  #abilities: StateAbilities | undefined;

  initialize(options: X86VmOptions): void {
    // Intel hosts without unrestricted guest need three pages and one page of guest addresses: api.rst, 4.35 and 4.41.
    this.kernel.ioctl(this.fd, abi.KVM_SET_TSS_ADDR, options.tssAddress);
    const identity = new Uint8Array(new BigUint64Array([BigInt(options.identityMapAddress)]).buffer);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, identity);
    this.kernel.ioctl(this.fd, abi.KVM_CREATE_IRQCHIP);
    const pit = new Uint8Array(abi.PIT_CONFIG_SIZE);
    new DataView(pit.buffer).setUint32(0, abi.KVM_PIT_SPEAKER_DUMMY, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_CREATE_PIT2, pit);
    wirePins(this.routes);
    setRouting(this.kernel, this.fd, this.routes);
    this.#initializePics(options.levelPins ?? []);
    this.#events = {
      payload: this.#enable('EXCEPTION_PAYLOAD'),
      tripleFault: this.#enable('X86_TRIPLE_FAULT_EVENT'),
    };
  }

  /** @returns whether it could be: an older KVM does not know it */
  #enable(capability: abi.KvmCapability): boolean {
    const view = new DataView(new ArrayBuffer(abi.ENABLE_CAP_SIZE));
    view.setUint32(0, abi.KVM_CAP[capability], true);
    view.setBigUint64(8, 1n, true);
    return this.kernel.ioctlBufferRaw(this.fd, abi.KVM_ENABLE_CAP, new Uint8Array(view.buffer)) >= 0;
  }

  /**
   * As firmware leaves them: masked, as a guest on hardware-reduced ACPI never looks at the PICs, but its first local APIC still
   * takes their interrupts, with whatever vector they have; and the lines of PCI level-triggered.
   */
  #initializePics(levelPins: readonly number[]): void {
    for (const chip of [abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE]) {
      const state = new Uint8Array(abi.IRQCHIP_SIZE);
      new DataView(state.buffer).setUint32(0, chip, true);
      this.kernel.ioctlBuffer(this.fd, abi.KVM_GET_IRQCHIP, state);
      state[abi.PIC_IMR_OFFSET] = 0xff;
      for (const pin of levelPins) if (pin >> 3 === chip) state[abi.PIC_ELCR_OFFSET] |= 1 << (pin & 7);
      this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_IRQCHIP, state);
    }
  }

  supportedCpuid(): CpuidEntry[] {
    const buffer = new Uint8Array(abi.CPUID_HEADER_SIZE + MAX_CPUID_ENTRIES * abi.CPUID_ENTRY_SIZE);
    const view = new DataView(buffer.buffer);
    view.setUint32(0, MAX_CPUID_ENTRIES, true);
    this.kernel.ioctlBuffer(this.device, abi.KVM_GET_SUPPORTED_CPUID, buffer);
    const count = Math.min(view.getUint32(0, true), MAX_CPUID_ENTRIES);
    const entries = Array.from({ length: count }, (_, index) => {
      const at = abi.CPUID_HEADER_SIZE + index * abi.CPUID_ENTRY_SIZE;
      const leaf = view.getUint32(at, true);
      return {
        function: leaf,
        index: view.getUint32(at + 4, true),
        significantIndex: (view.getUint32(at + 8, true) & abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX) !== 0,
        eax: view.getUint32(at + 12, true),
        ebx: view.getUint32(at + 16, true),
        ecx: (view.getUint32(at + 20, true) | (leaf === 1 ? IN_KERNEL_APIC_FEATURES : 0)) >>> 0,
        edx: view.getUint32(at + 24, true),
      };
    });
    return withoutAmx(entries);
  }

  createVcpu(id: number): X86Vcpu {
    const vcpu = this.openVcpu(id, (handle, run) => new KvmVcpu(this.kernel, handle, run, this));
    try {
      this.time.join(vcpu);
    } catch (error) {
      undoAll(error, [() => vcpu.close()]);
    }
    this.#vcpus.push(vcpu);
    return vcpu;
  }

  /** Asked for when the first vCPU is saved or loaded. */
  abilities(): StateAbilities {
    return (this.#abilities ??= stateAbilities(this.kernel, this.device, this.fd, this.#events));
  }

  startTime(passed = 0n): void {
    this.time.start(passed);
  }

  stopTime(): void {
    this.time.stop();
  }

  save(): X86VmState {
    return { clock: this.time.clock, controllers: saveControllers(this.kernel, this.fd) };
  }

  load({ clock, controllers, synthetic }: X86VmState): void {
    if (synthetic !== undefined) throw new HypervisorError(FOREIGN);
    loadControllers(this.kernel, this.fd, controllers);
    this.time.loadClock(clock);
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
}
