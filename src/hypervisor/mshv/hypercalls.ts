/** Hypercalls that the driver passes through (MSHV_ROOT_HVCALL), with their input and output in pages of the caller's. */
import os from 'node:os';
import { errnoName, type HostKernel, type HostMapping } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import * as abi from './abi.js';
import type { RegisterValue } from './registers.js';

const { EAGAIN } = os.constants.errno;

/** A page for the input and one for the output. Bytes. */
export const HYPERCALL_PAGES_SIZE = 2 * abi.MSHV_HV_PAGE_SIZE;

export class Hypercalls {
  readonly input: DataView;
  readonly output: DataView;
  readonly #arguments = new Uint8Array(abi.ROOT_HVCALL_SIZE);
  readonly #view = new DataView(this.#arguments.buffer);
  readonly #inputBytes: Uint8Array;
  readonly #inputAddress: bigint;

  /** @param fd of the partition or the VP @param offset of the two pages in the mapping */
  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
    pages: HostMapping,
    offset = 0,
  ) {
    const page = abi.MSHV_HV_PAGE_SIZE;
    this.input = new DataView(pages.view(offset, page));
    this.output = new DataView(pages.view(offset + page, page));
    this.#inputBytes = new Uint8Array(this.input.buffer);
    this.#inputAddress = pages.handle.address + BigInt(offset);
  }

  /** Sets the input to zeros. */
  clear(size: number): void {
    this.#inputBytes.fill(0, 0, size);
  }

  /**
   * @param inputSize bytes of `input` in use @param outputSize bytes that come back in `output`
   * @param reps elements of a call that takes several
   * @throws HypervisorError naming the call and the status
   */
  call(name: keyof typeof abi.HVCALL, inputSize: number, outputSize = 0, reps = 0): void {
    const result = this.callRaw(abi.HVCALL[name], inputSize, outputSize, reps);
    if (result === 0) return;
    const status = this.#view.getUint16(abi.ROOT_HVCALL.status, true);
    throw new HypervisorError(
      `The Microsoft hypervisor refuses ${name}: ${status === 0 ? errnoName(-result) : statusName(status)}`,
    );
  }

  /** As {@link call}; never throws. @returns 0 or the negated errno */
  callRaw(code: number, inputSize: number, outputSize: number, reps: number): number {
    const view = this.#view;
    for (;;) {
      view.setUint16(abi.ROOT_HVCALL.code, code, true);
      view.setUint16(abi.ROOT_HVCALL.reps, reps, true);
      view.setUint16(abi.ROOT_HVCALL.inSize, inputSize, true);
      view.setUint16(abi.ROOT_HVCALL.outSize, outputSize, true);
      view.setUint16(abi.ROOT_HVCALL.status, 0, true);
      view.setBigUint64(abi.ROOT_HVCALL.inPointer, this.#inputAddress, true);
      const output = outputSize === 0 ? 0n : this.#inputAddress + BigInt(abi.MSHV_HV_PAGE_SIZE);
      view.setBigUint64(abi.ROOT_HVCALL.outPointer, output, true);
      const result = this.kernel.ioctlBufferRaw(this.fd, abi.MSHV_ROOT_HVCALL, this.#arguments);
      // The driver has given the hypervisor more memory: the call is to be made again.
      if (result !== -EAGAIN) return Math.min(result, 0);
    }
  }

  getProperty(code: number): bigint {
    this.clear(abi.GET_PARTITION_PROPERTY_SIZE);
    this.input.setUint32(abi.PARTITION_PROPERTY.code, code, true);
    this.call('GET_PARTITION_PROPERTY', abi.GET_PARTITION_PROPERTY_SIZE, 8);
    return this.output.getBigUint64(0, true);
  }

  setProperty(code: number, value: bigint): void {
    this.clear(abi.SET_PARTITION_PROPERTY_SIZE);
    this.input.setUint32(abi.PARTITION_PROPERTY.code, code, true);
    this.input.setBigUint64(abi.PARTITION_PROPERTY.value, value, true);
    this.call('SET_PARTITION_PROPERTY', abi.SET_PARTITION_PROPERTY_SIZE);
  }

  /** Sets 128-bit registers; at most 127. @param registers name, low and high half */
  setRegisters(vp: number, registers: readonly RegisterValue[]): void {
    const { input } = this;
    const size = abi.SET_VP_REGISTERS.elements + registers.length * abi.REGISTER_ASSOC_SIZE;
    this.clear(size);
    input.setUint32(abi.SET_VP_REGISTERS.vpIndex, vp, true);
    registers.forEach(([name, low, high = 0n], index) => {
      const at = abi.SET_VP_REGISTERS.elements + index * abi.REGISTER_ASSOC_SIZE;
      input.setUint32(at + abi.REGISTER_ASSOC.name, name, true);
      input.setBigUint64(at + abi.REGISTER_ASSOC.value, low, true);
      input.setBigUint64(at + abi.REGISTER_ASSOC.value + 8, high, true);
    });
    this.call('SET_VP_REGISTERS', size, 0, registers.length);
  }

  /** Reads registers into `output`, 16 bytes each, in the order of their names; at most 256. */
  getRegisters(vp: number, names: readonly number[]): DataView {
    const { input } = this;
    const size = abi.GET_VP_REGISTERS.names + names.length * 4;
    this.clear(size);
    input.setUint32(abi.GET_VP_REGISTERS.vpIndex, vp, true);
    names.forEach((name, index) => input.setUint32(abi.GET_VP_REGISTERS.names + index * 4, name, true));
    this.call('GET_VP_REGISTERS', size, names.length * abi.REGISTER_VALUE_SIZE, names.length);
    return this.output;
  }

  /** As {@link getRegisters}, in the form that {@link setRegisters} takes. */
  readRegisters(vp: number, names: readonly number[]): Required<RegisterValue>[] {
    const view = this.getRegisters(vp, names);
    return names.map((name, index) => {
      const at = index * abi.REGISTER_VALUE_SIZE;
      return [name, view.getBigUint64(at, true), view.getBigUint64(at + 8, true)];
    });
  }

  /** @returns undefined: the hypervisor refuses it, as it does where the processor has no such register */
  readFeatureRegister(vp: number, name: number): bigint | undefined {
    try {
      return this.getRegisters(vp, [name]).getBigUint64(0, true);
    } catch (error) {
      if (error instanceof HypervisorError) return undefined;
      throw error;
    }
  }
}

function statusName(status: number): string {
  const known = Object.entries(abi.HV_STATUS).find(([, value]) => value === status)?.[0];
  return known === undefined ? `status 0x${status.toString(16)}` : `HV_STATUS_${known}`;
}
