/** MSHV_ROOT_HVCALL: the hypercalls that the driver passes through, as the simulated hypervisor answers them. */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { HVCALL, HV_INTERCEPT_TYPE, HV_PARTITION_PROPERTY, HV_STATUS } from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { EFAULT, EINVAL, errnoOfStatus } from './errno.js';
import { KVM_X86_SET_MSR_FILTER } from './kvm-abi.js';
import type { Partition } from './partition.js';
import { getRegister, setRegister, Target } from './registers.js';
import { P, V } from './shared.js';
import type { VirtualProcessor } from './vp.js';

const PAGE = abi.MSHV_HV_PAGE_SIZE;
const MAX_MSR_INTERCEPTS = 16;
/** Those that may be made on the device's descriptor, about the host's own partition. */
const OF_HOST: readonly number[] = [HVCALL.GET_PARTITION_PROPERTY, HVCALL.GET_PARTITION_PROPERTY_EX];

export interface Call {
  readonly host: HostKernel;
  readonly device: number;
  /** undefined: the host's own partition. */
  readonly partition: Partition | undefined;
  /** Whether the descriptor is a partition's: some calls need that. */
  readonly onPartition: boolean;
  readonly vp: (index: number) => VirtualProcessor | undefined;
  readonly bytesAt: (address: bigint, length: number) => Uint8Array | undefined;
}

interface Result {
  readonly status: number;
  readonly reps?: number;
}

const ok: Result = { status: HV_STATUS.SUCCESS };
const refuse = (status: number, reps = 0): Result => ({ status, reps });

/** @param argument struct mshv_root_hvcall, written in place @returns 0 or the negated errno */
export function rootHypercall(call: Call, argument: DataView): number {
  const at = abi.ROOT_HVCALL;
  const code = argument.getUint16(at.code, true);
  const reps = argument.getUint16(at.reps, true);
  const inSize = argument.getUint16(at.inSize, true);
  const outSize = argument.getUint16(at.outSize, true);
  const inPointer = argument.getBigUint64(at.inPointer, true);
  const outPointer = argument.getBigUint64(at.outPointer, true);
  for (let byte = at.status + 2; byte < at.inPointer; byte++) if (argument.getUint8(byte) !== 0) return -EINVAL;
  if (argument.getUint16(at.status, true) !== 0 || inPointer === 0n || inSize < 8 || inSize > PAGE) return -EINVAL;
  if (outPointer !== 0n && (outSize === 0 || outSize > PAGE)) return -EINVAL;
  const known =
    call.partition === undefined ? OF_HOST.includes(code) : (Object.values(HVCALL) as number[]).includes(code);
  if (!known) return -EINVAL;
  // Asynchronous: the partition's descriptor alone.
  if (code === HVCALL.SET_PARTITION_PROPERTY && !call.onPartition) return -EINVAL;
  const from = call.bytesAt(inPointer, inSize);
  const into = outPointer === 0n ? new Uint8Array(0) : call.bytesAt(outPointer, outSize);
  if (from === undefined || into === undefined) return -EFAULT;
  // The hypervisor works on the driver's copies, each of a page.
  const input = new DataView(new ArrayBuffer(PAGE));
  new Uint8Array(input.buffer).set(from);
  const output = new DataView(new ArrayBuffer(PAGE));
  const result = perform(call, code, reps, input, inSize, output);
  argument.setUint16(at.status, result.status, true);
  argument.setUint16(at.reps, reps === 0 ? 0 : (result.reps ?? 0), true);
  into.set(new Uint8Array(output.buffer, 0, into.length));
  return errnoOfStatus(result.status);
}

function perform(call: Call, code: number, reps: number, input: DataView, size: number, output: DataView): Result {
  if (call.partition === undefined) return hostProperty(call, code, input, output);
  const partition = call.partition;
  switch (code) {
    case HVCALL.GET_PARTITION_PROPERTY:
      return getProperty(call, partition, input, size, output);
    case HVCALL.GET_PARTITION_PROPERTY_EX:
      return refuse(HV_STATUS.ACCESS_DENIED);
    case HVCALL.SET_PARTITION_PROPERTY:
      return setProperty(partition, input, size);
    case HVCALL.INSTALL_INTERCEPT:
      return installIntercept(call, partition, input, size);
    case HVCALL.ASSERT_VIRTUAL_INTERRUPT:
      return assertInterrupt(partition, input, size);
    case HVCALL.CLEAR_VIRTUAL_INTERRUPT:
      return ok;
    case HVCALL.GET_VP_REGISTERS:
    case HVCALL.SET_VP_REGISTERS:
    case HVCALL.TRANSLATE_VIRTUAL_ADDRESS:
    case HVCALL.REGISTER_INTERCEPT_RESULT:
    case HVCALL.GET_VP_CPUID_VALUES:
      return ofVp(call, partition, code, reps, input, size, output);
    default:
      // No SynIC of the VMM's and no access states by this way.
      return refuse(HV_STATUS.OPERATION_DENIED);
  }
}

function ofVp(
  call: Call,
  partition: Partition,
  code: number,
  reps: number,
  input: DataView,
  size: number,
  output: DataView,
): Result {
  if (size < 16) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  const index = input.getUint32(8, true);
  const vp = partition.hasVp(index) ? call.vp(index) : undefined;
  if (vp === undefined) return refuse(HV_STATUS.INVALID_VP_INDEX);
  const registers = code === HVCALL.GET_VP_REGISTERS || code === HVCALL.SET_VP_REGISTERS;
  if (registers && vp.word(V.running) !== 0) return refuse(HV_STATUS.INVALID_VP_STATE);
  switch (code) {
    case HVCALL.GET_VP_REGISTERS:
      return getRegisters(call, vp, reps, input, size, output);
    case HVCALL.SET_VP_REGISTERS:
      return setRegisters(call, vp, reps, input, size);
    case HVCALL.TRANSLATE_VIRTUAL_ADDRESS:
      return translate(vp, input, size, output);
    case HVCALL.REGISTER_INTERCEPT_RESULT:
      return registerResult(partition, vp, index, input, size);
    default:
      return cpuidValues(partition, index, reps, input, size, output);
  }
}

/** The header's VTL and reserved bytes. */
function headerIsValid(input: DataView): boolean {
  return input.getUint32(12, true) === 0;
}

function getRegisters(
  call: Call,
  vp: VirtualProcessor,
  reps: number,
  input: DataView,
  size: number,
  output: DataView,
): Result {
  const at = abi.GET_VP_REGISTERS;
  if (reps === 0 || size < at.names + 4 * reps || reps * 16 > PAGE) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  if (!headerIsValid(input)) return refuse(HV_STATUS.INVALID_PARAMETER);
  const target = new Target(call.host, vp, call.partition!.clocks);
  for (let index = 0; index < reps; index++) {
    const value = new DataView(output.buffer, index * abi.REGISTER_VALUE_SIZE, abi.REGISTER_VALUE_SIZE);
    const name = input.getUint32(at.names + 4 * index, true);
    if (!getRegister(target, name, value)) return refuse(HV_STATUS.INVALID_PARAMETER, index);
  }
  return { status: HV_STATUS.SUCCESS, reps };
}

function setRegisters(call: Call, vp: VirtualProcessor, reps: number, input: DataView, size: number): Result {
  const at = abi.SET_VP_REGISTERS;
  if (reps === 0 || size < at.elements + abi.REGISTER_ASSOC_SIZE * reps)
    return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  if (!headerIsValid(input)) return refuse(HV_STATUS.INVALID_PARAMETER);
  const target = new Target(call.host, vp, call.partition!.clocks);
  let result: Result = { status: HV_STATUS.SUCCESS, reps };
  for (let index = 0; index < reps; index++) {
    const element = at.elements + index * abi.REGISTER_ASSOC_SIZE;
    const reserved = input.getUint32(element + 4, true) !== 0 || input.getBigUint64(element + 8, true) !== 0n;
    const value = new DataView(input.buffer, element + abi.REGISTER_ASSOC.value, abi.REGISTER_VALUE_SIZE);
    const taken = reserved ? undefined : setRegister(target, input.getUint32(element, true), value);
    if (taken === true) continue;
    result = refuse(taken === false ? HV_STATUS.INVALID_REGISTER_VALUE : HV_STATUS.INVALID_PARAMETER, index);
    break;
  }
  vp.refreshRegisterPage();
  return result;
}

function translate(vp: VirtualProcessor, input: DataView, size: number, output: DataView): Result {
  if (size < abi.TRANSLATE_GVA_SIZE) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  const linear = input.getBigUint64(abi.TRANSLATE_GVA.gvaPage, true) << 12n;
  const address = vp.processor.translate(BigInt.asUintN(64, linear));
  const { PAGE_NOT_PRESENT, GPA_UNMAPPED, SUCCESS } = abi.HV_TRANSLATE_GVA_RESULT;
  const code = address === undefined ? PAGE_NOT_PRESENT : vp.memory.has(address) ? SUCCESS : GPA_UNMAPPED;
  output.setUint32(abi.TRANSLATE_GVA_OUTPUT.resultCode, code, true);
  if (address !== undefined) output.setBigUint64(abi.TRANSLATE_GVA_OUTPUT.gpaPage, BigInt(address) >> 12n, true);
  return ok;
}

function registerResult(
  partition: Partition,
  vp: VirtualProcessor,
  index: number,
  input: DataView,
  size: number,
): Result {
  const at = abi.CPUID_RESULT;
  if (size < abi.CPUID_RESULT_SIZE) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  if (input.getUint32(at.interceptType, true) !== HV_INTERCEPT_TYPE.X64_CPUID)
    return refuse(HV_STATUS.INVALID_PARAMETER);
  const flags = [input.getUint8(at.subleafSpecific), input.getUint8(at.alwaysOverride)];
  if (flags.some((flag) => flag > 1) || input.getUint16(at.alwaysOverride + 1, true) !== 0) {
    return refuse(HV_STATUS.INVALID_PARAMETER);
  }
  // KVM takes CPUID only before a processor's first run.
  if (vp.word(V.ran) !== 0) return refuse(HV_STATUS.INVALID_VP_STATE);
  const words = [at.eaxIn, at.ecxIn].map((offset) => input.getUint32(offset, true));
  const results = Array.from({ length: 8 }, (_, word) => input.getUint32(at.eax + 4 * word, true));
  return { status: partition.registerCpuid(index, [...words, flags[0], ...results]) };
}

function cpuidValues(
  partition: Partition,
  vp: number,
  reps: number,
  input: DataView,
  size: number,
  output: DataView,
): Result {
  const at = abi.GET_VP_CPUID_VALUES;
  const needed = at.leaves + reps * abi.CPUID_LEAF_INFO_SIZE;
  if (reps === 0 || size < needed || reps * 16 > PAGE) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  const flags = input.getUint32(at.flags, true);
  if ((flags & ~3) !== 0 || input.getBigUint64(at.flags + 4, true) !== 0n) return refuse(HV_STATUS.INVALID_PARAMETER);
  const leaves = partition.cpuid(vp, (flags & abi.CPUID_VALUES_APPLY_REGISTERED_VALUES) !== 0);
  for (let index = 0; index < reps; index++) {
    const info = at.leaves + index * abi.CPUID_LEAF_INFO_SIZE;
    const [eax, ecx] = [input.getUint32(info, true), input.getUint32(info + 4, true)];
    const found = leaves.find((entry) => entry.leaf === eax && (!entry.indexed || entry.subleaf === ecx));
    const values = found === undefined ? [0, 0, 0, 0] : [found.eax, found.ebx, found.ecx, found.edx];
    values.forEach((value, word) => output.setUint32(index * 16 + 4 * word, value >>> 0, true));
  }
  return { status: HV_STATUS.SUCCESS, reps };
}

function assertInterrupt(partition: Partition, input: DataView, size: number): Result {
  const at = abi.ASSERT_INTERRUPT;
  if (size < abi.ASSERT_INTERRUPT_SIZE) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  if (input.getUint32(at.targetVtl, true) !== 0) return refuse(HV_STATUS.INVALID_PARAMETER);
  if (!partition.initialized) return refuse(HV_STATUS.INVALID_PARTITION_STATE);
  const status = partition.interrupts.assert(
    input.getUint32(at.interruptType, true),
    input.getUint32(at.controlFlags, true),
    input.getBigUint64(at.destination, true),
    input.getUint32(at.vector, true),
  );
  return { status };
}

/** CPUID leaves KVM for no VMM; ports and memory that is not there always come. */
function installIntercept(call: Call, partition: Partition, input: DataView, size: number): Result {
  const at = abi.INSTALL_INTERCEPT;
  if (size < abi.INSTALL_INTERCEPT_SIZE) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  const mask = input.getUint32(at.accessType, true);
  if ((mask & ~7) !== 0) return refuse(HV_STATUS.INVALID_PARAMETER);
  switch (input.getUint32(at.interceptType, true)) {
    case HV_INTERCEPT_TYPE.X64_IO_PORT:
      return ok;
    case HV_INTERCEPT_TYPE.X64_MSR:
      partition.setWord(P.msrIntercepts, mask);
      return ok;
    case HV_INTERCEPT_TYPE.X64_MSR_INDEX:
      return interceptMsr(call, partition, input.getUint32(at.parameter, true), mask);
    default:
      return refuse(HV_STATUS.OPERATION_DENIED);
  }
}

function interceptMsr(call: Call, partition: Partition, index: number, mask: number): Result {
  const count = partition.word(P.msrs);
  let slot = 0;
  while (slot < count && partition.word(P.msrs + 1 + 2 * slot) >>> 0 !== index) slot++;
  if (slot === MAX_MSR_INTERCEPTS) return refuse(HV_STATUS.INSUFFICIENT_MEMORY);
  partition.setWord(P.msrs, Math.max(count, slot + 1));
  partition.setWord(P.msrs + 1 + 2 * slot, index);
  partition.setWord(P.msrs + 2 + 2 * slot, mask);
  // struct kvm_msr_filter: allow by default; ranges of one MSR whose bitmap denies it, which sends it to user space.
  const filter = new Uint8Array(0x188);
  const view = new DataView(filter.buffer);
  const bitmap = call.host.map({ length: PAGE, shared: false });
  for (let range = 0; range <= Math.max(count - 1, slot); range++) {
    const at = 8 + 24 * range;
    // KVM_MSR_FILTER_READ is 1 and _WRITE 2, as in the mask.
    view.setUint32(at, partition.word(P.msrs + 2 + 2 * range) & 3, true);
    view.setUint32(at + 4, 1, true);
    view.setUint32(at + 8, partition.word(P.msrs + 1 + 2 * range), true);
    view.setBigUint64(at + 16, bitmap.handle.address, true);
  }
  const result = call.host.ioctlBufferRaw(partition.word(P.fd), KVM_X86_SET_MSR_FILTER, filter);
  bitmap.unmap();
  return result < 0 ? refuse(HV_STATUS.OPERATION_FAILED) : ok;
}

const EARLY: readonly number[] = [
  HV_PARTITION_PROPERTY.SYNTHETIC_PROC_FEATURES,
  HV_PARTITION_PROPERTY.PROCESSOR_XSAVE_FEATURES,
];
const SETTABLE: readonly number[] = [
  ...EARLY,
  HV_PARTITION_PROPERTY.SUSPEND,
  HV_PARTITION_PROPERTY.TIME_FREEZE,
  HV_PARTITION_PROPERTY.REFERENCE_TIME,
  HV_PARTITION_PROPERTY.PROCESSORS_PER_SOCKET,
  HV_PARTITION_PROPERTY.GPA_PAGE_ACCESS_TRACKING,
  HV_PARTITION_PROPERTY.UNIMPLEMENTED_MSR_ACTION,
];
const FLAGS: readonly number[] = [
  HV_PARTITION_PROPERTY.SUSPEND,
  HV_PARTITION_PROPERTY.TIME_FREEZE,
  HV_PARTITION_PROPERTY.GPA_PAGE_ACCESS_TRACKING,
  HV_PARTITION_PROPERTY.UNIMPLEMENTED_MSR_ACTION,
];

function setProperty(partition: Partition, input: DataView, size: number): Result {
  const at = abi.PARTITION_PROPERTY;
  if (size < abi.SET_PARTITION_PROPERTY_SIZE || input.getUint32(at.code + 4, true) !== 0) {
    return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  }
  const code = input.getUint32(at.code, true);
  const value = input.getBigUint64(at.value, true);
  if (!SETTABLE.includes(code)) return refuse(HV_STATUS.UNKNOWN_PROPERTY);
  if (EARLY.includes(code) && partition.initialized) return refuse(HV_STATUS.INVALID_PARTITION_STATE);
  if (FLAGS.includes(code) && value > 1n) return refuse(HV_STATUS.PROPERTY_VALUE_OUT_OF_RANGE);
  if (code === HV_PARTITION_PROPERTY.TIME_FREEZE) partition.clocks.freeze(value === 1n);
  if (code === HV_PARTITION_PROPERTY.REFERENCE_TIME) {
    return partition.clocks.setReference(value) ? ok : refuse(HV_STATUS.INVALID_PARTITION_STATE);
  }
  partition.setProperty(code, value);
  if (code === HV_PARTITION_PROPERTY.UNIMPLEMENTED_MSR_ACTION) partition.setWord(P.unimplementedMsr, Number(value));
  if (code === HV_PARTITION_PROPERTY.GPA_PAGE_ACCESS_TRACKING && partition.track(value === 1n) < 0) {
    return refuse(HV_STATUS.OPERATION_FAILED);
  }
  return ok;
}

function getProperty(call: Call, partition: Partition, input: DataView, size: number, output: DataView): Result {
  if (size < abi.GET_PARTITION_PROPERTY_SIZE) return refuse(HV_STATUS.INVALID_HYPERCALL_INPUT);
  const code = input.getUint32(abi.PARTITION_PROPERTY.code, true);
  if (code === HV_PARTITION_PROPERTY.REFERENCE_TIME) {
    output.setBigUint64(0, partition.clocks.reference, true);
    return ok;
  }
  const stored = partition.property(code);
  if (stored === undefined && !SETTABLE.includes(code))
    return hostProperty(call, HVCALL.GET_PARTITION_PROPERTY, input, output);
  output.setBigUint64(0, stored ?? 0n, true);
  return ok;
}

/** What the host's own partition has: nothing of the processor is withheld. */
function hostProperty(call: Call, code: number, input: DataView, output: DataView): Result {
  const property = input.getUint32(abi.PARTITION_PROPERTY.code, true);
  const all = 0xffff_ffff_ffff_ffffn;
  if (code === HVCALL.GET_PARTITION_PROPERTY_EX) {
    if (property === HV_PARTITION_PROPERTY.ASSIGNABLE_SYNTHETIC_PROC_FEATURES) output.setBigUint64(8, all, true);
    else if (property !== HV_PARTITION_PROPERTY.VMM_CAPABILITIES) return refuse(HV_STATUS.UNKNOWN_PROPERTY);
    output.setUint16(0, 1, true);
    return ok;
  }
  const partition = call.partition;
  switch (property) {
    case HV_PARTITION_PROPERTY.PROCESSOR_FEATURES0:
    case HV_PARTITION_PROPERTY.PROCESSOR_FEATURES1:
    case HV_PARTITION_PROPERTY.PROCESSOR_XSAVE_FEATURES:
      output.setBigUint64(0, all, true);
      return ok;
    case HV_PARTITION_PROPERTY.PHYSICAL_ADDRESS_WIDTH:
      output.setBigUint64(0, 40n, true);
      return ok;
    case HV_PARTITION_PROPERTY.PROCESSOR_CLOCK_FREQUENCY: {
      // KVM tells a virtual machine's frequency by its first processor.
      const vp = partition?.hasVp(0) === true ? call.vp(0) : undefined;
      const khz = vp === undefined ? 0 : call.host.ioctlRaw(vp.processor.fd, kvm.KVM_GET_TSC_KHZ, 0);
      output.setBigUint64(0, BigInt(Math.max(khz, 0)) * 1000n, true);
      return ok;
    }
    case HV_PARTITION_PROPERTY.XSAVE_STATES:
      output.setBigUint64(0, 7n, true);
      return ok;
    case HV_PARTITION_PROPERTY.MAX_XSAVE_DATA_SIZE:
      output.setBigUint64(0, BigInt(PAGE), true);
      return ok;
    case HV_PARTITION_PROPERTY.PRIVILEGE_FLAGS:
    case HV_PARTITION_PROPERTY.PROCESSOR_VENDOR:
    case HV_PARTITION_PROPERTY.GUEST_OS_ID:
      output.setBigUint64(0, 0n, true);
      return ok;
    default:
      return refuse(HV_STATUS.UNKNOWN_PROPERTY);
  }
}
