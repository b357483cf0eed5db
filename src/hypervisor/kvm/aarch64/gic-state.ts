/**
 * What is kept of KVM's GICv3 and ITS, in the order that Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic-its.rst ask for.
 *
 * Which LPIs are pending, and the ITS's tables, KVM puts into the guest's memory where the guest has said that these tables lie, and
 * reads them from there.
 */
import { type HostKernel, SystemError } from '../../../sys/host-kernel.js';
import { HypervisorError } from '../../hypervisor.js';
import { deviceAttribute, setAttribute, withBuffer } from '../attribute.js';
import type { Arm64VmState } from '../../saved-state.js';
import * as abi from './abi.js';
import {
  distributor,
  type GicGroup,
  type GicRegister,
  its,
  itsControl,
  lines,
  processorInterfaces,
  redistributors,
} from './gic-registers.js';
import { loadRegisters, type RegisterFile, saveRegisters } from './register-file.js';

type GicState = Arm64VmState['gic'];

/** The two devices' descriptors, and what they were made for. */
export interface Gic {
  readonly gic: number;
  readonly its: number;
  readonly spis: number;
  /** Affinities of all processors. */
  readonly processors: readonly number[];
}

const VALUE_BYTES = 8;

/** No vCPU runs, and the guest's memory is kept afterwards. @throws HypervisorError */
export function saveGic(kernel: HostKernel, gic: Gic): GicState {
  control(kernel, gic.gic, abi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, 'save the pending interrupts to');
  control(kernel, gic.its, abi.KVM_DEV_ARM_ITS_SAVE_TABLES, 'save the tables of the ITS to');
  const groups = Object.entries(groupsOf(gic));
  return Object.fromEntries(
    groups.map(([name, group]) => [name, withGroup(kernel, deviceOf(gic, name), group, saveRegisters)]),
  );
}

/**
 * The interrupt controller is new, all vCPUs are there and the guest's memory has its content.
 *
 * @throws HypervisorError with one line when it cannot be the saved one
 */
export function loadGic(kernel: HostKernel, gic: Gic, state: GicState): void {
  const groups = groupsOf(gic);
  const unknown = Object.keys(state).find((name) => !Object.hasOwn(groups, name));
  if (unknown !== undefined)
    throw new HypervisorError(`The saved interrupt controller has an unknown part, ${unknown}`);
  const lacking = Object.keys(groups).find((name) => !Object.hasOwn(state, name));
  if (lacking !== undefined) throw new HypervisorError(`The saved interrupt controller lacks its part ${lacking}`);
  const spis = state['lines'].length * 32;
  if (spis !== gic.spis) {
    throw new HypervisorError(
      `The saved interrupt controller has ${spis} shared interrupts; this machine's has ${gic.spis}`,
    );
  }
  for (const [name, group] of Object.entries(groups)) {
    if (name === 'itsControl') {
      control(kernel, gic.its, abi.KVM_DEV_ARM_ITS_RESTORE_TABLES, 'restore the tables of the ITS from');
    }
    withGroup(kernel, deviceOf(gic, name), group, (file) => loadRegisters(file, state[name]));
  }
}

/** In the order in which they are set; arm-vgic-its.rst, "ITS Restore Sequence". */
function groupsOf({ spis, processors }: Gic) {
  return {
    distributor: distributor(spis),
    redistributors: redistributors(processors),
    lines: lines(spis),
    processorInterfaces: processorInterfaces(processors),
    its: its(),
    itsControl: itsControl(),
  };
}

function deviceOf(gic: Gic, name: string): number {
  return name.startsWith('its') ? gic.its : gic.gic;
}

/** @param what it is to do, for a message */
function control(kernel: HostKernel, fd: number, attribute: number, what: string): void {
  try {
    setAttribute(kernel, fd, abi.KVM_DEV_ARM_VGIC_GRP_CTRL, attribute);
  } catch (error) {
    if (!(error instanceof SystemError)) throw error;
    throw new HypervisorError(`KVM cannot ${what} the guest's memory: ${error.reason}`, { cause: error });
  }
}

function withGroup<T>(kernel: HostKernel, fd: number, group: GicGroup, use: (file: RegisterFile) => T): T {
  const byId = new Map<bigint, GicRegister>(group.registers.map((register) => [register.id, register]));
  return withBuffer(kernel, VALUE_BYTES, (bytes, address) => {
    const value = bytes.subarray(0, group.size);
    const request = (code: number, id: bigint) =>
      kernel.ioctlBuffer(fd, code, deviceAttribute(group.group, id, address));
    return use({
      ids: [...byId.keys()],
      name: (id) => byId.get(id)?.name ?? `a GIC's register 0x${id.toString(16)}`,
      size: () => group.size,
      fixed: (id) => byId.get(id)?.fixed === true,
      optional: (id) => byId.get(id)?.optional === true,
      read: (id) => {
        try {
          request(abi.KVM_GET_DEVICE_ATTR, id);
        } catch (error) {
          if (error instanceof SystemError && byId.get(id)?.optional === true) return undefined;
          throw error;
        }
        return value;
      },
      write: (id, saved) => {
        const clearedAt = byId.get(id)?.clearedAt;
        if (clearedAt !== undefined) {
          value.fill(0xff);
          request(abi.KVM_SET_DEVICE_ATTR, clearedAt);
        }
        value.set(saved);
        request(abi.KVM_SET_DEVICE_ATTR, id);
      },
    });
  });
}
