/** The page in which the hypervisor shares a processor's registers with the VMM: struct hv_vp_register_page. */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { FPU, KVM_GET_FPU, RUN, SREGS, SYNC } from './kvm-abi.js';
import { GENERAL, type Processor, RFLAGS, RIP } from './processor.js';

const PAGE_CONTROLS = ['cr0', 'cr3', 'cr4', 'cr8', 'efer'] as const;
const PAGE_SEGMENTS = ['es', 'cs', 'ss', 'ds', 'fs', 'gs'] as const;

export class RegisterPage {
  readonly #page: DataView;
  readonly #xmm: Uint8Array;
  readonly #fpu = new Uint8Array(kvm.FPU_SIZE);

  /** @param at where the page is in the buffer */
  constructor(
    private readonly host: HostKernel,
    buffer: ArrayBufferLike,
    at: number,
    private readonly processor: Processor,
  ) {
    this.#page = new DataView(buffer, at, abi.MSHV_HV_PAGE_SIZE);
    this.#xmm = new Uint8Array(buffer, at + abi.REGISTER_PAGE.xmm, abi.REGISTER_PAGE.segments - abi.REGISTER_PAGE.xmm);
  }

  /** While the processor runs. */
  invalidate(): void {
    this.#page.setUint8(abi.REGISTER_PAGE.isValid, 0);
  }

  /** After registers were set by hypercall; a page that is not valid stays so. */
  refresh(): void {
    if (this.#page.getUint8(abi.REGISTER_PAGE.isValid) === 0) return;
    const dirty = this.#page.getUint32(abi.REGISTER_PAGE.dirty, true);
    if (dirty !== 0) this.take();
    this.fill(false);
  }

  /** Puts the registers into the page that the VMM maps. @param vectors with the vector registers */
  fill(vectors: boolean): void {
    const page = this.#page;
    const { processor } = this;
    const at = abi.REGISTER_PAGE;
    GENERAL.forEach((place, index) => processor.copy(RUN.regs + 8 * place, page, at.generalRegisters + 8 * index));
    processor.copy(RUN.regs + 8 * RIP, page, at.rip);
    processor.copy(RUN.regs + 8 * RFLAGS, page, at.rflags);
    PAGE_SEGMENTS.forEach((name, index) =>
      this.processor.readSegment(name, page, at.segments + index * abi.SEGMENT_REGISTER_SIZE),
    );
    for (const name of PAGE_CONTROLS) {
      processor.copy(RUN.sregs + SREGS[name], page, at[name]);
    }
    if (vectors && this.host.ioctlBufferRaw(this.processor.fd, KVM_GET_FPU, this.#fpu) >= 0) {
      this.#xmm.set(this.#fpu.subarray(FPU.xmm, FPU.xmm + this.#xmm.length));
    }
    page.setUint16(at.version, abi.HV_VP_REGISTER_PAGE_VERSION_1, true);
    page.setUint32(at.dirty, 0, true);
    page.setUint8(at.isValid, 1);
  }

  /** Takes what the VMM changed in the page. */
  take(): number {
    const page = this.#page;
    const at = abi.REGISTER_PAGE;
    const dirty = page.getUint8(at.isValid) === 0 ? 0 : page.getUint32(at.dirty, true);
    if (dirty === 0) return 0;
    page.setUint32(at.dirty, 0, true);
    const { regs } = this.processor;
    const has = (name: keyof typeof abi.HV_X64_REGISTER_CLASS) =>
      ((dirty >> abi.HV_X64_REGISTER_CLASS[name]) & 1) !== 0;
    if (has('GENERAL')) {
      GENERAL.forEach((place, index) => (regs[place] = page.getBigUint64(at.generalRegisters + 8 * index, true)));
    }
    if (has('IP')) regs[RIP] = page.getBigUint64(at.rip, true);
    if (has('FLAGS')) regs[RFLAGS] = page.getBigUint64(at.rflags, true);
    if (has('GENERAL') || has('IP') || has('FLAGS')) this.processor.mark(SYNC.REGS);
    if (has('SEGMENT')) {
      PAGE_SEGMENTS.forEach((name, index) =>
        this.processor.writeSegment(name, page, at.segments + index * abi.SEGMENT_REGISTER_SIZE),
      );
    }
    if (!has('XMM')) return 0;
    const result = this.host.ioctlBufferRaw(this.processor.fd, KVM_GET_FPU, this.#fpu);
    if (result < 0) return result;
    this.#fpu.set(this.#xmm, FPU.xmm);
    return this.host.ioctlBufferRaw(this.processor.fd, kvm.KVM_SET_FPU, this.#fpu);
  }
}
