/** struct kvm_vcpu_events: what is under way in a vCPU (Documentation/virt/kvm/api.rst, 4.31 and 4.32). */
import { HypervisorError } from '../hypervisor.js';
import type { X86Events } from '../saved-state.js';
import * as abi from './abi.js';
import { viewOf } from './state-requests.js';

const AT = abi.VCPU_EVENTS;

/** What the VM was told to tell, where its KVM can. */
export interface EventAbilities {
  /** An exception that is pending, apart from one whose delivery has begun, and with its payload. */
  readonly payload: boolean;
  readonly tripleFault: boolean;
}

export function readEvents(view: DataView): X86Events {
  const is = (at: number) => view.getUint8(at) !== 0;
  const tells = (flag: number) => (view.getUint32(AT.flags, true) & flag) !== 0;
  const hasPayload = tells(abi.KVM_VCPUEVENT_VALID_PAYLOAD) && is(AT.exceptionHasPayload);
  return {
    exception: {
      pending: is(AT.exceptionPending),
      injected: is(AT.exceptionInjected),
      vector: view.getUint8(AT.exceptionVector),
      hasErrorCode: is(AT.exceptionHasCode),
      errorCode: view.getUint32(AT.exceptionCode, true),
      payload: hasPayload ? view.getBigUint64(AT.exceptionPayload, true) : undefined,
    },
    interrupt: {
      injected: is(AT.interruptInjected),
      vector: view.getUint8(AT.interruptVector),
      soft: is(AT.interruptSoft),
      shadow: view.getUint8(AT.interruptShadow),
    },
    nmi: { injected: is(AT.nmiInjected), pending: is(AT.nmiPending), masked: is(AT.nmiMasked) },
    sipiVector: view.getUint32(AT.sipiVector, true),
    smi: {
      active: is(AT.smm),
      pending: is(AT.smiPending),
      insideNmi: is(AT.smmInsideNmi),
      latchedInit: is(AT.latchedInit),
    },
    tripleFault: tells(abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && is(AT.tripleFault),
  };
}

/**
 * @param sipi the vector counts: a SIPI has been received
 * @throws HypervisorError when this host's KVM is too old for what was under way
 */
export function writeEvents(events: X86Events, abilities: EventAbilities, sipi: boolean): DataView {
  const { exception, interrupt, nmi, smi } = events;
  if ((exception.payload !== undefined && !abilities.payload) || (events.tripleFault && !abilities.tripleFault)) {
    throw new HypervisorError(
      "The processor was saved between an exception and its delivery: this host's KVM is too old",
    );
  }
  const view = viewOf(abi.VCPU_EVENTS_SIZE);
  const set = (at: number, value: boolean) => view.setUint8(at, value ? 1 : 0);
  // Without the payload's flag KVM knows no pending exception, and injects it.
  set(AT.exceptionInjected, exception.injected || (exception.pending && !abilities.payload));
  view.setUint8(AT.exceptionVector, exception.vector);
  set(AT.exceptionHasCode, exception.hasErrorCode);
  set(AT.exceptionPending, exception.pending);
  view.setUint32(AT.exceptionCode, exception.errorCode, true);
  set(AT.exceptionHasPayload, exception.payload !== undefined);
  view.setBigUint64(AT.exceptionPayload, exception.payload ?? 0n, true);
  set(AT.interruptInjected, interrupt.injected);
  view.setUint8(AT.interruptVector, interrupt.vector);
  set(AT.interruptSoft, interrupt.soft);
  view.setUint8(AT.interruptShadow, interrupt.shadow);
  set(AT.nmiInjected, nmi.injected);
  set(AT.nmiPending, nmi.pending);
  set(AT.nmiMasked, nmi.masked);
  view.setUint32(AT.sipiVector, events.sipiVector, true);
  set(AT.smm, smi.active);
  set(AT.smiPending, smi.pending);
  set(AT.smmInsideNmi, smi.insideNmi);
  set(AT.latchedInit, smi.latchedInit);
  set(AT.tripleFault, events.tripleFault);
  const flags =
    abi.KVM_VCPUEVENT_VALID_NMI_PENDING |
    abi.KVM_VCPUEVENT_VALID_SHADOW |
    abi.KVM_VCPUEVENT_VALID_SMM |
    (sipi ? abi.KVM_VCPUEVENT_VALID_SIPI_VECTOR : 0) |
    (abilities.payload ? abi.KVM_VCPUEVENT_VALID_PAYLOAD : 0) |
    (abilities.tripleFault ? abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT : 0);
  view.setUint32(AT.flags, flags, true);
  return view;
}
