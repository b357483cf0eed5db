/**
 * The parts of a virtual processor's state that move as a whole (mshv.h, MSHV_VP_STATE): its local APIC, the XSAVE area, and the
 * synthetic interrupt controller's pages and timers.
 */
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import * as abi from './abi.js';

/** Holds an XSAVE area with all that processors have today; the driver asks for whole pages. Bytes. */
const BUFFER_SIZE = 4 * abi.MSHV_HV_PAGE_SIZE;
/** Of all other parts. */
const PAGE = abi.MSHV_HV_PAGE_SIZE;
export const VP_STATE_PAGES_SIZE = BUFFER_SIZE;

export class VpState {
  /** The state that was read, and that will be written. */
  readonly view: DataView;
  readonly #address: bigint;
  readonly #argument = new Uint8Array(abi.VP_STATE_SIZE);
  readonly #arguments = new DataView(this.#argument.buffer);

  /** @param fd of the VP @param offset of the pages in the mapping */
  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
    pages: HostMapping,
    offset: number,
  ) {
    this.view = new DataView(pages.view(offset, BUFFER_SIZE));
    this.#address = pages.handle.address + BigInt(offset);
  }

  /** @param type one of MSHV_VP_STATE */
  read(type: number): DataView {
    this.#request(abi.MSHV_GET_VP_STATE, type);
    return this.view;
  }

  write(type: number): void {
    this.#request(abi.MSHV_SET_VP_STATE, type);
  }

  /** Bytes of what was read or written last, as the driver has it. */
  get size(): number {
    return this.#arguments.getUint32(abi.VP_STATE.bufferSize, true);
  }

  /** @returns a copy */
  copy(type: number): Uint8Array {
    const { buffer, byteOffset } = this.read(type);
    return new Uint8Array(buffer, byteOffset, this.size).slice();
  }

  /** @param bytes those that follow are zeros */
  set(type: number, bytes: Uint8Array): void {
    const { buffer, byteOffset } = this.view;
    const into = new Uint8Array(buffer, byteOffset, BUFFER_SIZE);
    into.fill(0);
    into.set(bytes);
    this.write(type);
  }

  #request(request: number, type: number): void {
    const view = this.#arguments;
    view.setUint8(abi.VP_STATE.type, type);
    // All of the buffer's pages are given to the hypervisor: no more than it asks for.
    view.setUint32(abi.VP_STATE.bufferSize, type === abi.MSHV_VP_STATE.XSAVE ? BUFFER_SIZE : PAGE, true);
    view.setBigUint64(abi.VP_STATE.buffer, this.#address, true);
    const result = this.kernel.ioctlBufferRaw(this.fd, request, this.#argument);
    if (result < 0) throw new HypervisorError(`The Microsoft hypervisor refuses a processor's state: errno ${-result}`);
  }
}
