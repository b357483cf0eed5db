import { describe, expect, test } from '@jest/globals';
import type { Arm64VmOptions } from '../../../src/hypervisor/hypervisor.js';
import * as abi from '../../../src/hypervisor/kvm/aarch64/abi.js';
import { openKvmArm64 } from '../../../src/hypervisor/kvm/aarch64/kvm.js';
import { msiDeviceId } from '../../../src/hypervisor/kvm/routes.js';
import { type HostKernel, type MapOptions, SystemError } from '../../../src/sys/host-kernel.js';

const { KVM_CAP } = abi;
const GIC = { distributor: 0x0800_0000, its: 0x0808_0000, redistributors: 0x080a_0000, spis: 96 };
const OPTIONS: Arm64VmOptions = { ipaBits: 40, gic: GIC };
const RUN_BYTES = 4096;

/** A host whose KVM says yes to everything, but for the capabilities and devices that a test takes away. */
class FakeKernel {
  readonly capabilities = new Map<number, number>([
    [KVM_CAP.MAX_VCPUS, 3],
    [KVM_CAP.ARM_VM_IPA_SIZE, 44],
  ]);
  readonly missingDevices = new Set<number>();
  readonly features: number[] = [];
  readonly finalized: number[] = [];
  readonly vmTypes: number[] = [];
  readonly open = () => this.#open();
  readonly eventfd = () => this.#open();
  readonly fds = new Set<number>();
  mappings = 0;
  #next = 10;

  #open(): number {
    this.fds.add(++this.#next);
    return this.#next;
  }

  close(fd: number): void {
    expect(this.fds.delete(fd)).toBe(true);
  }

  ioctl(_fd: number, request: number, value = 0): number {
    switch (request) {
      case abi.KVM_GET_API_VERSION:
        return abi.KVM_API_VERSION;
      case abi.KVM_CHECK_EXTENSION:
        return this.capabilities.get(value) ?? 1;
      case abi.KVM_GET_VCPU_MMAP_SIZE:
        return RUN_BYTES;
      case abi.KVM_CREATE_VM:
        this.vmTypes.push(value);
        return this.#open();
      case abi.KVM_CREATE_VCPU:
        return this.#open();
      default:
        throw new Error(`ioctl 0x${request.toString(16)}`);
    }
  }

  ioctlBuffer(_fd: number, request: number, argument: Uint8Array): number {
    const words = new Uint32Array(argument.buffer);
    if (request === abi.KVM_CREATE_DEVICE) {
      if (this.missingDevices.has(words[0])) throw new SystemError('ENODEV', 19, 'ioctl', 'no such device');
      if (words[2] !== abi.KVM_CREATE_DEVICE_TEST) words[1] = this.#open();
    }
    if (request === abi.KVM_ARM_VCPU_INIT) this.features.push(words[abi.VCPU_INIT_FEATURES_OFFSET / 4]);
    if (request === abi.KVM_ARM_VCPU_FINALIZE) this.finalized.push(words[0]);
    return 0;
  }

  map({ length }: MapOptions) {
    this.mappings++;
    const buffer = new ArrayBuffer(length);
    const unmap = () => {
      this.mappings--;
    };
    return { handle: { address: 0n, length }, view: () => buffer, unmap };
  }
}

function host() {
  const fake = new FakeKernel();
  return { fake, kernel: fake as unknown as HostKernel };
}

describe('KVM on aarch64', () => {
  test.each([
    ['no capability', (fake: FakeKernel) => fake.capabilities.set(KVM_CAP.ARM_PSCI_0_2, 0), /KVM_CAP_ARM_PSCI_0_2/],
    [
      'no GICv3',
      (fake: FakeKernel) => fake.missingDevices.add(abi.KVM_DEV_TYPE_ARM_VGIC_V3),
      /^KVM on this host cannot give a guest a GICv3, which is needed$/,
    ],
    ['no ITS', (fake: FakeKernel) => fake.missingDevices.add(abi.KVM_DEV_TYPE_ARM_VGIC_ITS), /an ITS/],
    [
      'a small address space',
      (fake: FakeKernel) => fake.capabilities.set(KVM_CAP.ARM_VM_IPA_SIZE, 36),
      /^The guest needs 40 bits of physical address; this host gives 36$/,
    ],
  ])('says in one line that there is %s, and leaves nothing open', (_name, take, line) => {
    const { fake, kernel } = host();
    take(fake);
    const use = () => {
      const hypervisor = openKvmArm64(kernel);
      try {
        hypervisor.createVm(OPTIONS).close();
      } finally {
        hypervisor.close();
      }
    };
    expect(use).toThrow(line);
    expect(fake.fds.size).toBe(0);
  });

  test('says that there are more vCPUs than KVM has', () => {
    const { kernel } = host();
    const vm = openKvmArm64(kernel).createVm(OPTIONS);
    [0, 1, 2].forEach((id) => vm.createVcpu(id, id > 0));
    expect(() => vm.createVcpu(3, true)).toThrow(/^KVM on this host gives a guest at most 3 vCPUs$/);
  });

  test.each([
    ['distributor', { distributor: GIC.redistributors + 0x2_0000 }],
    ['ITS', { its: GIC.redistributors + 0x2_0000 }],
  ])('says that the redistributors of two vCPUs would reach the %s', (_name, behind) => {
    const { kernel } = host();
    const vm = openKvmArm64(kernel).createVm({ ipaBits: 40, gic: { ...GIC, ...behind } });
    vm.createVcpu(0, false);
    vm.createVcpu(1, true);
    expect(() => vm.finishVcpus()).toThrow(/^The interrupt controller has no room for 2 vCPUs$/);
  });

  test('takes room that is just enough', () => {
    const { kernel } = host();
    const vm = openKvmArm64(kernel).createVm({ ipaBits: 40, gic: { ...GIC, its: GIC.redistributors + 0x2_0000 } });
    vm.createVcpu(0, false);
    expect(() => vm.finishVcpus()).not.toThrow();
  });

  test('gives the default size of the address space no number, and any other its own', () => {
    const { fake, kernel } = host();
    const hypervisor = openKvmArm64(kernel);
    expect(hypervisor.ipaBits).toBe(44);
    [40, 44].forEach((ipaBits) => hypervisor.createVm({ ...OPTIONS, ipaBits }));
    expect(fake.vmTypes).toEqual([0, 44]);
  });

  test('gives a vCPU what the host has, and starts the others powered off', () => {
    const { fake, kernel } = host();
    const vm = openKvmArm64(kernel).createVm(OPTIONS);
    vm.createVcpu(0, false);
    vm.createVcpu(1, true);
    // POWER_OFF 0, PSCI_0_2 2, PMU_V3 3, SVE 4, PTRAUTH_ADDRESS 5, PTRAUTH_GENERIC 6
    expect(fake.features).toEqual([0b111_1100, 0b111_1101]);
    expect(fake.finalized).toEqual([abi.KVM_ARM_VCPU_SVE, abi.KVM_ARM_VCPU_SVE]);
    [KVM_CAP.ARM_PMU_V3, KVM_CAP.ARM_SVE, KVM_CAP.ARM_PTRAUTH_GENERIC].forEach((capability) =>
      fake.capabilities.set(capability, 0),
    );
    openKvmArm64(kernel).createVm(OPTIONS).createVcpu(0, false);
    expect(fake.features[2]).toBe(0b100);
    expect(fake.finalized).toHaveLength(2);
  });

  test('leaves nothing open or mapped when all is closed', () => {
    const { fake, kernel } = host();
    const hypervisor = openKvmArm64(kernel);
    const vm = hypervisor.createVm(OPTIONS);
    const vcpus = [0, 1].map((id) => vm.createVcpu(id, id > 0));
    vm.finishVcpus();
    vm.createInterrupt(1);
    vcpus[0].setBootState(0x4000_0000n, 0n);
    for (const vcpu of vcpus) vcpu.close();
    vm.close();
    hypervisor.close();
    expect([fake.fds.size, fake.mappings]).toEqual([0, 0]);
  });
});

test('an ITS knows a PCI function by segment, slot and function, in 16 bits', () => {
  expect([0x0008, 0x00ff, 0x0003_0010, 0x00ff_00f8].map(msiDeviceId)).toEqual([0x08, 0xff, 0x310, 0xfff8]);
});
