/** The Microsoft hypervisor's driver as far as a VP's record is concerned: it keeps what it is given, and tells in which order that came. */
import * as abi from '../../src/hypervisor/mshv/abi.js';
import { MshvVcpu, VP_PAGES_SIZE } from '../../src/hypervisor/mshv/vcpu.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';

const { HVCALL, MSHV_VP_STATE, ROOT_HVCALL } = abi;
const EIO = 5;

export class MshvDriver extends LinuxKernel {
  /** Low and high half. */
  readonly registers = new Map<number, readonly [bigint, bigint]>();
  /** By type. */
  readonly parts = new Map<number, Uint8Array>();
  readonly properties = new Map<number, bigint>();
  /** Of the XSAVE area, in bytes. */
  xsaveSize = 0x340;
  /** What was set: registers and properties by their numbers, parts by their types. */
  readonly set: string[] = [];
  /** Registers that the processor does not have. */
  readonly refused = new Set<number>();

  /** Of its callers' memory: they use the same few pages. */
  readonly #views = new Map<bigint, Uint8Array>();

  override ioctlBufferRaw(_fd: number, request: number, argument: Uint8Array): number {
    const view = new DataView(argument.buffer, argument.byteOffset);
    if (request === abi.MSHV_ROOT_HVCALL) return this.#hypercall(view);
    const type = view.getUint8(abi.VP_STATE.type);
    const sizes: Readonly<Record<number, number>> = {
      [MSHV_VP_STATE.XSAVE]: this.xsaveSize,
      [MSHV_VP_STATE.SYNTHETIC_TIMERS]: abi.SYNTHETIC_TIMERS_STATE_SIZE,
    };
    const size = sizes[type] ?? abi.MSHV_HV_PAGE_SIZE;
    const length = view.getUint32(abi.VP_STATE.bufferSize, true);
    view.setUint32(abi.VP_STATE.bufferSize, size, true);
    const bytes = this.#bytes(view.getBigUint64(abi.VP_STATE.buffer, true), length);
    if (request === abi.MSHV_GET_VP_STATE) bytes.set(this.parts.get(type) ?? new Uint8Array(size));
    else {
      this.parts.set(type, bytes.slice(0, size));
      this.set.push(`part ${type}`);
    }
    return 0;
  }

  #bytes(address: bigint, length: number): Uint8Array {
    const known = this.#views.get(address);
    if (known?.length === length) return known;
    const bytes = new Uint8Array(this.attach({ address, length }).view(0, length));
    this.#views.set(address, bytes);
    return bytes;
  }

  #page(view: DataView, at: number): DataView {
    const { buffer, byteOffset } = this.#bytes(view.getBigUint64(at, true), abi.MSHV_HV_PAGE_SIZE);
    return new DataView(buffer, byteOffset);
  }

  #hypercall(view: DataView): number {
    const input = this.#page(view, ROOT_HVCALL.inPointer);
    const reps = view.getUint16(ROOT_HVCALL.reps, true);
    switch (view.getUint16(ROOT_HVCALL.code, true)) {
      case HVCALL.GET_PARTITION_PROPERTY: {
        const value = this.properties.get(input.getUint32(abi.PARTITION_PROPERTY.code, true)) ?? 0n;
        this.#page(view, ROOT_HVCALL.outPointer).setBigUint64(0, value, true);
        return 0;
      }
      case HVCALL.SET_PARTITION_PROPERTY: {
        const code = input.getUint32(abi.PARTITION_PROPERTY.code, true);
        this.properties.set(code, input.getBigUint64(abi.PARTITION_PROPERTY.value, true));
        this.set.push(`property ${code}`);
        return 0;
      }
      case HVCALL.GET_VP_REGISTERS:
        return this.#getRegisters(input, reps, this.#page(view, ROOT_HVCALL.outPointer));
      default:
        return this.#setRegisters(input, reps);
    }
  }

  #getRegisters(input: DataView, reps: number, output: DataView): number {
    for (let index = 0; index < reps; index++) {
      const name = input.getUint32(abi.GET_VP_REGISTERS.names + 4 * index, true);
      if (this.refused.has(name)) return -EIO;
      const [low, high] = this.registers.get(name) ?? [0n, 0n];
      output.setBigUint64(16 * index, low, true);
      output.setBigUint64(16 * index + 8, high, true);
    }
    return 0;
  }

  #setRegisters(input: DataView, reps: number): number {
    for (let index = 0; index < reps; index++) {
      const at = abi.SET_VP_REGISTERS.elements + index * abi.REGISTER_ASSOC_SIZE;
      const name = input.getUint32(at, true);
      if (this.refused.has(name)) return -EIO;
      const value = at + abi.REGISTER_ASSOC.value;
      this.registers.set(name, [input.getBigUint64(value, true), input.getBigUint64(value + 8, true)]);
      this.set.push(`register ${name}`);
    }
    return 0;
  }
}

/** @param page the register page that the hypervisor shares; left out: it shares none */
export function vpOf(driver: MshvDriver, page?: (view: DataView) => void): MshvVcpu {
  const pages = driver.map({ length: VP_PAGES_SIZE, shared: false });
  const registerPage = page === undefined ? undefined : driver.map({ length: abi.MSHV_HV_PAGE_SIZE, shared: false });
  if (registerPage !== undefined) page!(new DataView(registerPage.view(0, abi.MSHV_HV_PAGE_SIZE)));
  return new MshvVcpu(driver, { id: 0, fd: -1, run: pages.handle }, pages, registerPage, {});
}
