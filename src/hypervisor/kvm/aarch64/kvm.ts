/** KVM on aarch64: the VM with its GICv3 and ITS. 64-bit guests alone; nested virtualization and MTE are not given. */
import { closeAll, undoAll } from '../../../sys/close-all.js';
import type { HostKernel } from '../../../sys/host-kernel.js';
import {
  type Arm64Hypervisor,
  type Arm64Vcpu,
  type Arm64Vm,
  type Arm64VmOptions,
  HypervisorError,
  type Vcpu,
  type VcpuHandle,
} from '../../hypervisor.js';
import type { Arm64VmState } from '../../saved-state.js';
import { createKvmVm, openedWith, openKvmDevice } from '../device.js';
import { setRouting, wireSpis } from '../routes.js';
import { KvmVmBase } from '../vm.js';
import * as abi from './abi.js';
import { setAttribute } from '../attribute.js';

import { register, setRegister } from './attributes.js';
import { type CounterLook, lookAt, mayBe, measureFrequency } from './counter-frequency.js';
import { createGic, requireGic } from './gic.js';
import { type Gic, loadGic, saveGic } from './gic-state.js';
import { affinity, hostFeatures, initializeVcpu, KvmArm64Vcpu } from './vcpu.js';

/** The capabilities without which no guest can run here. `vmm doctor` reports them one by one. */
export const REQUIRED_CAPABILITIES = [
  ...(['USER_MEMORY', 'IRQ_ROUTING', 'IRQFD', 'IOEVENTFD', 'ONE_REG', 'SIGNAL_MSI', 'DEVICE_CTRL'] as const),
  ...(['ARM_PSCI_0_2', 'IMMEDIATE_EXIT'] as const),
];

/** Where KVM_CAP_ARM_VM_IPA_SIZE is not there, every VM has this size. */
const DEFAULT_IPA_BITS = 40;
/** The PMU's interrupt, a PPI: 7, as Arm's Base System Architecture (DEN 0094) names it. */
const PMU_INTID = 16 + 7;

/** @throws HypervisorError with a line for the user when the device cannot be used */
export function openKvmArm64(kernel: HostKernel): KvmArm64Hypervisor {
  const required = Object.fromEntries(REQUIRED_CAPABILITIES.map((name) => [name, abi.KVM_CAP[name]]));
  const fd = openKvmDevice(kernel, required, 'the processor has to start Linux at EL2, and Linux to have CONFIG_KVM');
  return new KvmArm64Hypervisor(kernel, fd);
}

/** A vCPU that another thread created, on the thread that runs it. The creator closes it. */
export function attachKvmArm64Vcpu(kernel: HostKernel, handle: VcpuHandle): Vcpu {
  return new KvmArm64Vcpu(kernel, handle, kernel.attach(handle.run));
}

export class KvmArm64Hypervisor implements Arm64Hypervisor {
  readonly name = 'kvm';
  readonly architecture = 'aarch64';
  readonly maxVcpus: number;
  readonly ipaBits: number;

  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
  ) {
    const capability = (number: number) => kernel.ioctl(fd, abi.KVM_CHECK_EXTENSION, number);
    [this.maxVcpus, this.ipaBits] = openedWith(kernel, fd, () => [
      capability(abi.KVM_CAP.MAX_VCPUS),
      capability(abi.KVM_CAP.ARM_VM_IPA_SIZE) || DEFAULT_IPA_BITS,
    ]);
  }

  createVm(options: Arm64VmOptions): Arm64Vm {
    const { ipaBits } = options;
    if (ipaBits > this.ipaBits) {
      throw new HypervisorError(`The guest needs ${ipaBits} bits of physical address; this host gives ${this.ipaBits}`);
    }
    // 0 stands for the default, also where KVM knows no other.
    const type = ipaBits === DEFAULT_IPA_BITS ? 0 : ipaBits;
    const { kernel, maxVcpus } = this;
    const fd = createKvmVm(kernel, this.fd, type);
    const vm = openedWith(kernel, fd, () => new KvmArm64Vm(kernel, this.fd, fd, options, maxVcpus));
    try {
      vm.initialize();
    } catch (error) {
      undoAll(error, [() => vm.close()]);
    }
    return vm;
  }

  close(): void {
    this.kernel.close(this.fd);
  }
}

class KvmArm64Vm extends KvmVmBase implements Arm64Vm {
  readonly #features: number;
  readonly #vcpus: number[] = [];
  /** The virtual counter as it was when it was stopped. */
  #stopped: bigint | undefined;
  /** Since then the counter has run on undisturbed. */
  #look: CounterLook | undefined;
  readonly #gic: number[] = [];

  constructor(
    kernel: HostKernel,
    device: number,
    fd: number,
    private readonly options: Arm64VmOptions,
    private readonly maxVcpus: number,
  ) {
    super(kernel, device, fd, options.gic.spis);
    this.#features = hostFeatures(kernel, device);
  }

  initialize(): void {
    requireGic(this.kernel, this.fd);
    const has = (number: number) => this.kernel.ioctl(this.device, abi.KVM_CHECK_EXTENSION, number) > 0;
    // Else KVM_RUN itself fails at an access that KVM cannot describe: see vcpu.ts.
    if (has(abi.KVM_CAP.ARM_NISV_TO_USER) && has(abi.KVM_CAP.ARM_INJECT_EXT_DABT)) {
      const capability = new Uint8Array(abi.ENABLE_CAP_SIZE);
      new DataView(capability.buffer).setUint32(0, abi.KVM_CAP.ARM_NISV_TO_USER, true);
      this.kernel.ioctlBuffer(this.fd, abi.KVM_ENABLE_CAP, capability);
    }
  }

  createVcpu(id: number, poweredOff: boolean): Arm64Vcpu {
    if (this.#vcpus.length >= this.maxVcpus) {
      throw new HypervisorError(`KVM on this host gives a guest at most ${this.maxVcpus} vCPUs`);
    }
    const vcpu = this.openVcpu(id, (handle, run) => {
      const off = poweredOff ? 1 << abi.KVM_ARM_VCPU_POWER_OFF : 0;
      initializeVcpu(this.kernel, this.fd, handle.fd, this.#features | off);
      return new KvmArm64Vcpu(this.kernel, handle, run);
    });
    this.#vcpus.push(vcpu.handle.fd);
    return vcpu;
  }

  startTime(passed = 0n): void {
    const [first] = this.#vcpus;
    if (this.#stopped !== undefined) {
      const ticks = passed === 0n ? 0 : Math.round((Number(passed) * this.#frequency()) / 1e9);
      setRegister(this.kernel, first, abi.REG_TIMER_CNT, this.#stopped + BigInt(ticks));
    }
    this.#stopped = undefined;
    this.#look = lookAt(this.#counter);
  }

  stopTime(): void {
    this.#stopped ??= this.#counter();
  }

  /** CNTVCT_EL0 of all vCPUs. */
  readonly #counter = () => register(this.kernel, this.#vcpus[0], abi.REG_TIMER_CNT);

  save(): Arm64VmState {
    if (this.#stopped === undefined)
      throw new HypervisorError("The machine's time has to stand still while it is saved");
    const gic = saveGic(this.kernel, this.#savedGic());
    return { counter: this.#stopped, counterFrequency: Math.round(this.#frequency()), gic };
  }

  /** Hz. */
  #frequency(): number {
    const { least, most } = measureFrequency(this.#look!, this.#counter);
    return (least + most) / 2;
  }

  load({ counter, counterFrequency, gic }: Arm64VmState): void {
    loadGic(this.kernel, this.#savedGic(), gic);
    this.#stopped = counter;
    const here = measureFrequency(this.#look!, this.#counter);
    if (!mayBe(here, counterFrequency)) {
      const mhz = (frequency: number) => `${(frequency / 1e6).toFixed(1)} MHz`;
      throw new HypervisorError(
        `The machine was saved with a counter of about ${mhz(counterFrequency)}; this host's has about ${mhz(here.least)}`,
      );
    }
  }

  #savedGic(): Gic {
    const [gic, its] = this.#gic;
    return { gic, its, spis: this.options.gic.spis, processors: this.#vcpus.map((fd) => affinity(this.kernel, fd)) };
  }

  finishVcpus(): void {
    this.#look = lookAt(this.#counter);
    createGic(this.kernel, this.fd, this.options.gic, this.#vcpus.length, this.#gic);
    wireSpis(this.routes, this.options.gic.spis);
    setRouting(this.kernel, this.fd, this.routes);
    if ((this.#features & (1 << abi.KVM_ARM_VCPU_PMU_V3)) === 0) return;
    // After the GIC: virt/kvm/devices/vcpu.rst, 1.2.
    for (const fd of this.#vcpus) {
      const group = abi.KVM_ARM_VCPU_PMU_V3_CTRL;
      setAttribute(this.kernel, fd, group, abi.KVM_ARM_VCPU_PMU_V3_IRQ, BigInt(PMU_INTID));
      setAttribute(this.kernel, fd, group, abi.KVM_ARM_VCPU_PMU_V3_INIT);
    }
  }

  override close(): void {
    closeAll([...this.#gic.map((fd) => () => this.kernel.close(fd)), () => super.close()]);
  }
}
