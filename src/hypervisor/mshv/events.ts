/** A processor's activity and the events that are under way, by the names that the architecture has for them. */
import type { X86Activity, X86Events } from '../saved-state.js';
import * as abi from './abi.js';

const H = abi.HV_REGISTER;

/** The registers that tell of them. */
export const EVENT_REGISTERS = [
  H.INTERNAL_ACTIVITY_STATE,
  H.PENDING_INTERRUPTION,
  H.INTERRUPT_STATE,
  H.PENDING_EVENT0,
  H.PENDING_EVENT1,
];

/** Values of registers by name, low and high half. */
type Values = ReadonlyMap<number, readonly [low: bigint, high: bigint]>;

const bits = (value: bigint, first: number, mask = 1) => Number((value >> BigInt(first)) & BigInt(mask));
const has = (value: bigint, bit: number) => bits(value, bit) !== 0;

export function activityOf(values: Values): X86Activity {
  const [activity] = values.get(H.INTERNAL_ACTIVITY_STATE)!;
  const { startupSuspend, haltSuspend, idleSuspend } = abi.INTERNAL_ACTIVITY;
  if (has(activity, startupSuspend)) return 'wait-for-init';
  return has(activity, haltSuspend) || has(activity, idleSuspend) ? 'halted' : 'running';
}

/** @param nmi one is pending, which is told elsewhere */
export function eventsOf(values: Values, nmi: boolean): X86Events {
  const [interruption] = values.get(H.PENDING_INTERRUPTION)!;
  const [state] = values.get(H.INTERRUPT_STATE)!;
  const at = abi.PENDING_INTERRUPTION;
  const { INTERRUPT, NMI, SOFTWARE_INTERRUPT } = abi.HV_X64_PENDING;
  const type = has(interruption, at.pending) ? bits(interruption, at.type, 7) : undefined;
  const interrupt = type === INTERRUPT || type === SOFTWARE_INTERRUPT;
  return {
    exception: exceptionOf(values, type === undefined || interrupt || type === NMI ? undefined : interruption),
    interrupt: {
      injected: interrupt,
      vector: interrupt ? bits(interruption, at.vector, 0xff) : 0,
      soft: type === SOFTWARE_INTERRUPT,
      shadow: bits(state, abi.INTERRUPT_STATE.interruptShadow),
    },
    nmi: { injected: type === NMI, pending: nmi, masked: has(state, abi.INTERRUPT_STATE.nmiMasked) },
    sipiVector: 0,
    smi: { active: false, pending: false, insideNmi: false, latchedInit: false },
    tripleFault: false,
  };
}

/** @param begun the interruption, if it is an exception whose delivery has begun */
function exceptionOf(values: Values, begun: bigint | undefined): X86Events['exception'] {
  const [event, parameter] = values.get(H.PENDING_EVENT0)!;
  const at = abi.PENDING_EXCEPTION;
  const pending = has(event, at.pending) && bits(event, at.type, 7) === abi.HV_X64_PENDING_EVENT.EXCEPTION;
  if (!pending && begun === undefined) {
    return { pending, injected: false, vector: 0, hasErrorCode: false, errorCode: 0, payload: undefined };
  }
  const value = pending ? event : begun!;
  const { vector, deliverErrorCode } = pending ? at : abi.PENDING_INTERRUPTION;
  return {
    pending,
    injected: !pending,
    vector: bits(value, vector, 0xff),
    hasErrorCode: has(value, deliverErrorCode),
    errorCode: Number(value >> 32n),
    payload: pending ? parameter : undefined,
  };
}
