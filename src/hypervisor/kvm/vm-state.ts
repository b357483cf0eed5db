/** The interrupt controllers and the timer of KVM, each as KVM has it (struct kvm_irqchip, struct kvm_pit_state2). */
import type { HostKernel } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import type { X86VmState } from '../saved-state.js';
import * as abi from './abi.js';
import { bytesOf, loadingInto, savingFrom, sized, viewOf } from './state-requests.js';

const CHIPS = {
  'pic-master': abi.KVM_IRQCHIP_PIC_MASTER,
  'pic-slave': abi.KVM_IRQCHIP_PIC_SLAVE,
  ioapic: abi.KVM_IRQCHIP_IOAPIC,
} as const;
const TIMER = 'pit';
const DATA_SIZE = abi.IRQCHIP_SIZE - abi.IRQCHIP_DATA_OFFSET;

/** @param fd of the VM, of which nothing runs */
export function saveControllers(kernel: HostKernel, fd: number): X86VmState['controllers'] {
  const request = savingFrom(kernel, fd);
  const chips = Object.entries(CHIPS).map(([name, chip]) => {
    const view = viewOf(abi.IRQCHIP_SIZE);
    view.setUint32(0, chip, true);
    request(name, abi.KVM_GET_IRQCHIP, view);
    return [name, bytesOf(view).slice(abi.IRQCHIP_DATA_OFFSET)] as const;
  });
  const timer = viewOf(abi.PIT_STATE_SIZE);
  request(TIMER, abi.KVM_GET_PIT2, timer);
  return { ...Object.fromEntries(chips), [TIMER]: bytesOf(timer) };
}

/**
 * After the vCPUs: what the IOAPIC holds pending it sends to their local APICs at once.
 *
 * @param fd of the VM @throws HypervisorError
 */
export function loadControllers(kernel: HostKernel, fd: number, controllers: X86VmState['controllers']): void {
  const request = loadingInto(kernel, fd);
  const wanted = [...Object.keys(CHIPS), TIMER];
  const names = Object.keys(controllers);
  if (names.length !== wanted.length || !wanted.every((name) => names.includes(name))) {
    throw new HypervisorError(
      `The saved machine has ${names.join(', ') || 'none'} of the controllers ${wanted.join(', ')}`,
    );
  }
  for (const [name, chip] of Object.entries(CHIPS)) {
    const view = viewOf(abi.IRQCHIP_SIZE);
    view.setUint32(0, chip, true);
    bytesOf(view).set(bytesOf(sized(name, controllers[name], DATA_SIZE)), abi.IRQCHIP_DATA_OFFSET);
    request(name, abi.KVM_SET_IRQCHIP, view);
  }
  request(TIMER, abi.KVM_SET_PIT2, sized(TIMER, controllers[TIMER], abi.PIT_STATE_SIZE));
}
