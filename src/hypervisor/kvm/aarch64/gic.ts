/**
 * KVM's GICv3 and its ITS (Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic-its.rst; Arm IHI 0069).
 * GICv2, and nested virtualization's maintenance interrupt, are not used.
 */
import type { HostKernel } from '../../../sys/host-kernel.js';
import { type Arm64VmOptions, HypervisorError } from '../../hypervisor.js';
import * as abi from './abi.js';
import { setAttribute } from '../attribute.js';
import { createDevice, hasDevice } from './attributes.js';

const DISTRIBUTOR_SIZE = 0x1_0000;
const REDISTRIBUTOR_SIZE = 0x2_0000;
const ITS_SIZE = 0x2_0000;
/** Interrupts 0 to 31 are each processor's own. */
const FIRST_SPI = 32;

type Gic = Arm64VmOptions['gic'];

/** @throws HypervisorError where KVM has no GICv3, or no ITS */
export function requireGic(kernel: HostKernel, vm: number): void {
  for (const [type, name] of [
    [abi.KVM_DEV_TYPE_ARM_VGIC_V3, 'a GICv3'],
    [abi.KVM_DEV_TYPE_ARM_VGIC_ITS, 'an ITS'],
  ] as const) {
    if (!hasDevice(kernel, vm, type))
      throw new HypervisorError(`KVM on this host cannot give a guest ${name}, which is needed`);
  }
}

/**
 * Makes both for the vCPUs that are there.
 *
 * @param fds gets their descriptors
 * @throws HypervisorError when they have no room
 */
export function createGic(kernel: HostKernel, vm: number, gic: Gic, vcpus: number, fds: number[]): void {
  checkRoom(gic, vcpus);
  const make = (type: number) => {
    const fd = createDevice(kernel, vm, type);
    fds.push(fd);
    return (group: number, attribute: number, value = 0) => setAttribute(kernel, fd, group, attribute, BigInt(value));
  };
  const setGic = make(abi.KVM_DEV_TYPE_ARM_VGIC_V3);
  setGic(abi.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, FIRST_SPI + gic.spis);
  setGic(abi.KVM_DEV_ARM_VGIC_GRP_ADDR, abi.KVM_VGIC_V3_ADDR_TYPE_DIST, gic.distributor);
  // One row for all vCPUs, as long as there are vCPUs.
  setGic(abi.KVM_DEV_ARM_VGIC_GRP_ADDR, abi.KVM_VGIC_V3_ADDR_TYPE_REDIST, gic.redistributors);
  setGic(abi.KVM_DEV_ARM_VGIC_GRP_CTRL, abi.KVM_DEV_ARM_VGIC_CTRL_INIT);
  const setIts = make(abi.KVM_DEV_TYPE_ARM_VGIC_ITS);
  setIts(abi.KVM_DEV_ARM_VGIC_GRP_ADDR, abi.KVM_VGIC_ITS_ADDR_TYPE, gic.its);
  setIts(abi.KVM_DEV_ARM_VGIC_GRP_CTRL, abi.KVM_DEV_ARM_VGIC_CTRL_INIT);
}

/** The row of redistributors grows with the vCPUs and must not reach what lies behind it. */
function checkRoom(gic: Gic, vcpus: number): void {
  const end = gic.redistributors + vcpus * REDISTRIBUTOR_SIZE;
  const behind = [
    [gic.distributor, DISTRIBUTOR_SIZE],
    [gic.its, ITS_SIZE],
  ].some(([start, size]) => gic.redistributors < start + size && start < end);
  if (behind) throw new HypervisorError(`The interrupt controller has no room for ${vcpus} vCPUs`);
}
