/** Virtual processor registers by the hypervisor's names, as KVM has them: TLFS 7.9. */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import { HV_REGISTER as R, HV_X64_REGISTER as X } from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import type { Clocks } from './clocks.js';
import * as k from './kvm-abi.js';
import { GENERAL, type Processor, RFLAGS, RIP, type SegmentName } from './processor.js';
import { V } from './shared.js';
import { keepRegister, keptRegister, SYNIC_REGISTERS } from './synic.js';
import type { VirtualProcessor } from './vp.js';

/** A register's value: 16 bytes. */
type Value = DataView;
interface Access {
  readonly get: (vp: Target, value: Value) => boolean;
  /** @returns whether the value is taken; left out: read-only */
  readonly set?: (vp: Target, value: Value) => boolean;
}

/** A processor with the buffers for KVM's structures. */
export class Target {
  readonly fpu = new DataView(new ArrayBuffer(kvm.FPU_SIZE));
  readonly #msr = new DataView(new ArrayBuffer(kvm.MSRS_HEADER_SIZE + kvm.MSR_ENTRY_SIZE));
  readonly xcrs = new DataView(new ArrayBuffer(0x188));
  readonly debug = new DataView(new ArrayBuffer(0x80));
  readonly mpState = new DataView(new ArrayBuffer(4));

  constructor(
    private readonly host: HostKernel,
    readonly vp: VirtualProcessor,
    readonly clocks: Clocks,
  ) {}

  get processor(): Processor {
    return this.vp.processor;
  }

  ioctl(request: number, buffer: DataView): boolean {
    return this.host.ioctlBufferRaw(this.processor.fd, request, new Uint8Array(buffer.buffer)) >= 0;
  }

  msr(index: number, value: Value, write: boolean): boolean {
    // Which addresses are canonical, KVM looks up in CR4, which may have been set just now.
    if (write && this.processor.flush() < 0) return false;
    const msr = this.#msr;
    msr.setUint32(0, 1, true);
    msr.setUint32(kvm.MSRS_HEADER_SIZE, index, true);
    if (write) msr.setBigUint64(kvm.MSRS_HEADER_SIZE + 8, value.getBigUint64(0, true), true);
    const bytes = new Uint8Array(msr.buffer);
    if (this.host.ioctlBufferRaw(this.processor.fd, write ? kvm.KVM_SET_MSRS : k.KVM_GET_MSRS, bytes) !== 1)
      return false;
    if (!write) value.setBigUint64(0, msr.getBigUint64(kvm.MSRS_HEADER_SIZE + 8, true), true);
    return true;
  }
}

const quad = (value: Value) => value.getBigUint64(0, true);

function general(index: number): Access {
  return {
    get: ({ processor }, value) => (value.setBigUint64(0, processor.regs[index], true), true),
    set: ({ processor }, value) => {
      processor.regs[index] = quad(value);
      processor.mark(k.SYNC.REGS);
      return true;
    },
  };
}

function control(name: 'cr0' | 'cr2' | 'cr3' | 'cr4' | 'cr8' | 'efer' | 'apicBase'): Access {
  return {
    get: ({ processor }, value) => (value.setBigUint64(0, processor.get(name), true), true),
    set: ({ processor }, value) => (processor.set(name, quad(value)), true),
  };
}

function segment(name: SegmentName): Access {
  return {
    get: ({ processor }, value) => (processor.readSegment(name, value, 0), true),
    set: ({ processor }, value) => (processor.writeSegment(name, value, 0), true),
  };
}

/** struct hv_x64_table_register has its limit before its base, struct kvm_dtable the other way round. */
function table(name: 'gdt' | 'idt'): Access {
  const at = k.RUN.sregs + k.SREGS[name];
  return {
    get: ({ processor }, value) => {
      value.setUint16(6, processor.view.getUint16(at + 8, true), true);
      value.setBigUint64(8, processor.view.getBigUint64(at, true), true);
      return true;
    },
    set: ({ processor }, value) => {
      processor.view.setUint16(at + 8, value.getUint16(6, true), true);
      processor.view.setBigUint64(at, value.getBigUint64(8, true), true);
      processor.mark(k.SYNC.SREGS);
      return true;
    },
  };
}

const msr = (index: number): Access => ({
  get: (target, value) => target.msr(index, value, false),
  set: (target, value) => target.msr(index, value, true),
});
/** One that not every processor has: KVM gives it to all, and takes it only from those that have it. */
const featureMsr = (index: number): Access => ({
  ...msr(index),
  get: (target, value) => target.msr(index, value, false) && target.msr(index, value, true),
});
const readOnlyMsr = (index: number): Access => ({ get: (target, value) => target.msr(index, value, false) });

/** Bytes of struct kvm_fpu. */
function fpu(parts: readonly (readonly [from: number, to: number, length: number])[]): Access {
  const copy = (from: DataView, to: DataView, out: boolean) => {
    for (const [inFpu, inValue, length] of parts) {
      for (let index = 0; index < length; index++) {
        if (out) to.setUint8(inValue + index, from.getUint8(inFpu + index));
        else to.setUint8(inFpu + index, from.getUint8(inValue + index));
      }
    }
  };
  return {
    get: (target, value) => target.ioctl(k.KVM_GET_FPU, target.fpu) && (copy(target.fpu, value, true), true),
    set: (target, value) => {
      if (!target.ioctl(k.KVM_GET_FPU, target.fpu)) return false;
      copy(value, target.fpu, false);
      return target.ioctl(kvm.KVM_SET_FPU, target.fpu);
    },
  };
}

/** struct kvm_debugregs: DR0 to DR3, DR6, DR7. */
function debug(at: number): Access {
  return {
    get: (target, value) =>
      target.ioctl(k.KVM_GET_DEBUGREGS, target.debug) &&
      (value.setBigUint64(0, target.debug.getBigUint64(at, true), true), true),
    set: (target, value) => {
      if (!target.ioctl(k.KVM_GET_DEBUGREGS, target.debug)) return false;
      target.debug.setBigUint64(at, quad(value), true);
      return target.ioctl(k.KVM_SET_DEBUGREGS, target.debug);
    },
  };
}

/** struct kvm_xcrs with XCR0 alone. */
const XFEM: Access = {
  get: (target, value) =>
    target.ioctl(k.KVM_GET_XCRS, target.xcrs) &&
    (value.setBigUint64(0, target.xcrs.getBigUint64(16, true), true), true),
  set: (target, value) => {
    target.xcrs.setUint32(0, 1, true);
    target.xcrs.setUint32(8, 0, true);
    target.xcrs.setBigUint64(16, quad(value), true);
    return target.ioctl(k.KVM_SET_XCRS, target.xcrs);
  },
};

const event = (name: keyof typeof k.EVENTS) => k.RUN.events + k.EVENTS[name];
const KIND = { interrupt: 0, nmi: 2, exception: 3 };
const PAGE_FAULT = 14;

function injectException({ processor }: Target, vector: number, hasError: boolean, error: number): void {
  const { view, bytes } = processor;
  bytes[event('exceptionInjected')] = 1;
  bytes[event('exceptionVector')] = vector;
  bytes[event('exceptionHasError')] = hasError ? 1 : 0;
  bytes[event('exceptionPending')] = 0;
  view.setUint32(event('exceptionError'), error, true);
  processor.mark(k.SYNC.EVENTS);
}

/** What is to be delivered when the processor runs next. */
const PENDING_INTERRUPTION: Access = {
  get: ({ processor: { bytes, view } }, value) => {
    let low = 0;
    let error = 0;
    if (bytes[event('exceptionInjected')] !== 0) {
      low =
        1 | (KIND.exception << 1) | (bytes[event('exceptionHasError')] << 4) | (bytes[event('exceptionVector')] << 16);
      error = view.getUint32(event('exceptionError'), true);
    } else if (bytes[event('interruptInjected')] !== 0) low = 1 | (bytes[event('interruptVector')] << 16);
    else if (bytes[event('nmiInjected')] !== 0) low = 1 | (KIND.nmi << 1) | (2 << 16);
    value.setUint32(0, low, true);
    value.setUint32(4, error, true);
    return true;
  },
  set: (target, value) => {
    const { processor } = target;
    const low = value.getUint32(0, true);
    const vector = low >>> 16;
    const { bytes } = processor;
    for (const name of ['exceptionInjected', 'interruptInjected', 'nmiInjected'] as const) bytes[event(name)] = 0;
    processor.mark(k.SYNC.EVENTS);
    if ((low & 1) === 0) return true;
    const kind = (low >> 1) & 7;
    if (kind === KIND.exception) injectException(target, vector, (low & 0x10) !== 0, value.getUint32(4, true));
    else if (kind === KIND.nmi) bytes[event('nmiInjected')] = 1;
    else if (kind === KIND.interrupt && vector <= 255) {
      bytes[event('interruptInjected')] = 1;
      bytes[event('interruptVector')] = vector;
    } else return false;
    return true;
  },
};

/** union hv_x64_pending_exception_event; of other kinds of events there are none here. */
const PENDING_EVENT: Access = {
  get: () => true,
  set: (target, value) => {
    const low = value.getUint32(0, true);
    if ((low & 1) === 0) return true;
    if (((low >> 1) & 7) !== 0 || low >>> 16 > 31) return false;
    if (low >>> 16 === PAGE_FAULT) target.processor.set('cr2', value.getBigUint64(8, true));
    injectException(target, low >>> 16, (low & 0x100) !== 0, value.getUint32(4, true));
    return true;
  },
};

/** Zero, whatever happens. */
const NOTHING: Access = { get: () => true, set: (_target, value) => quad(value) === 0n };

const INTERRUPT_STATE: Access = {
  get: ({ processor: { bytes } }, value) => {
    const shadow = bytes[event('interruptShadow')] !== 0 ? 1 : 0;
    value.setUint32(0, shadow | (bytes[event('nmiMasked')] !== 0 ? 2 : 0), true);
    return true;
  },
  set: ({ processor }, value) => {
    const state = value.getUint32(0, true);
    processor.bytes[event('interruptShadow')] = state & 1;
    processor.bytes[event('nmiMasked')] = (state >> 1) & 1;
    processor.mark(k.SYNC.EVENTS);
    return true;
  },
};

/** KVM_MP_STATE_: 0 runs, 1 waits for INIT, 2 has had it and waits for a start-up message, 3 is halted. */
const ACTIVITY: Access = {
  get: (target, value) => {
    if (!target.ioctl(k.KVM_GET_MP_STATE, target.mpState)) return false;
    // KVM takes INIT and start-up messages that have come as it is asked, which changes registers.
    target.processor.refresh();
    const state = target.mpState.getUint32(0, true);
    value.setUint32(0, state === 1 || state === 2 ? 1 : state === 3 ? 2 : 0, true);
    return true;
  },
  set: (target, value) => {
    const state = value.getUint32(0, true);
    if ((state & ~7) !== 0) return false;
    target.mpState.setUint32(0, (state & 1) !== 0 ? 2 : (state & 2) !== 0 ? 3 : 0, true);
    return target.ioctl(k.KVM_SET_MP_STATE, target.mpState);
  },
};

/** A bit of the processor's control page. */
function suspend(word: number): Access {
  return {
    get: ({ vp }, value) => (value.setUint32(0, vp.word(word), true), true),
    set: ({ vp }, value) => {
      if (quad(value) > 1n) return false;
      vp.setWord(word, value.getUint32(0, true));
      return true;
    },
  };
}

const TSC: Access = {
  get: ({ clocks, vp }, value) => (value.setBigUint64(0, clocks.get(vp.index), true), true),
  set: ({ clocks, vp }, value) => (clocks.set(vp.index, quad(value)), true),
};

const TIME_REF_COUNT: Access = {
  get: ({ clocks }, value) => (value.setBigUint64(0, clocks.reference, true), true),
};

const synic = (name: number): Access => ({
  get: ({ vp }, value) => (value.setBigUint64(0, keptRegister(vp.shared, vp.partition, vp.index, name), true), true),
  set: ({ vp }, value) => (keepRegister(vp.shared, vp.partition, vp.index, name, quad(value)), true),
});

const enlightenment = (name: number, index: number): Access => {
  const kept = synic(name);
  return {
    get: (target, value) => target.msr(index, value, false) || kept.get(target, value),
    set: (target, value) => target.msr(index, value, true) || kept.set!(target, value),
  };
};

function build(): Map<number, Access> {
  const all = new Map<number, Access>();
  GENERAL.forEach((place, index) => all.set(X.RAX + index, general(place)));
  all.set(X.RIP, general(RIP)).set(X.RFLAGS, general(RFLAGS));
  for (let index = 0; index < 16; index++) all.set(X.XMM0 + index, fpu([[k.FPU.xmm + 16 * index, 0, 16]]));
  for (let index = 0; index < 8; index++) all.set(X.FP_MMX0 + index, fpu([[16 * index, 0, 16]]));
  // union hv_x64_fp_control_status_register: control, status, tag, reserved, opcode, instruction pointer.
  const { fcw, fsw, ftwx, opcode, ip, dp, mxcsr } = k.FPU;
  all.set(
    X.FP_CONTROL_STATUS,
    fpu([
      [fcw, 0, 2],
      [fsw, 2, 2],
      [ftwx, 4, 1],
      [opcode, 6, 2],
      [ip, 8, 8],
    ]),
  );
  all.set(
    X.XMM_CONTROL_STATUS,
    fpu([
      [dp, 0, 8],
      [mxcsr, 8, 4],
    ]),
  );
  const controls = {
    CR0: 'cr0',
    CR2: 'cr2',
    CR3: 'cr3',
    CR4: 'cr4',
    CR8: 'cr8',
    EFER: 'efer',
    APIC_BASE: 'apicBase',
  } as const;
  for (const [name, field] of Object.entries(controls)) all.set(X[name as keyof typeof controls], control(field));
  all.set(X.XFEM, XFEM);
  [X.DR0, X.DR1, X.DR2, X.DR3, X.DR6, X.DR7].forEach((name, index) => all.set(name, debug(8 * index)));
  const segments = { ES: 'es', CS: 'cs', SS: 'ss', DS: 'ds', FS: 'fs', GS: 'gs', LDTR: 'ldt', TR: 'tr' } as const;
  for (const [name, field] of Object.entries(segments)) all.set(X[name as keyof typeof segments], segment(field));
  all.set(X.GDTR, table('gdt')).set(X.IDTR, table('idt'));
  const msrs = {
    KERNEL_GS_BASE: 0xc000_0102,
    PAT: 0x277,
    SYSENTER_CS: 0x174,
    SYSENTER_ESP: 0x175,
    SYSENTER_EIP: 0x176,
    STAR: 0xc000_0081,
    LSTAR: 0xc000_0082,
    CSTAR: 0xc000_0083,
    SFMASK: 0xc000_0084,
    MSR_MTRR_DEF_TYPE: 0x2ff,
    MSR_MTRR_FIX64K00000: 0x250,
    MSR_MTRR_FIX16K80000: 0x258,
    MSR_MTRR_FIX16KA0000: 0x259,
    DEBUG_CTL: 0x1d9,
    MSR_IA32_MISC_ENABLE: 0x1a0,
  } as const;
  for (const [name, index] of Object.entries(msrs)) all.set(X[name as keyof typeof msrs], msr(index));
  const features = { TSC_AUX: 0xc000_0103, SPEC_CTRL: 0x48, TSC_ADJUST: 0x3b, U_XSS: 0xda0 } as const;
  for (const [name, index] of Object.entries(features)) all.set(X[name as keyof typeof features], featureMsr(index));
  all.set(X.TSC, TSC);
  all.set(X.MSR_MTRR_CAP, readOnlyMsr(0xfe));
  for (let index = 0; index < 8; index++) {
    all
      .set(X.MSR_MTRR_PHYS_BASE0 + index, msr(0x200 + 2 * index))
      .set(X.MSR_MTRR_PHYS_MASK0 + index, msr(0x201 + 2 * index));
    all.set(X.MSR_MTRR_FIX4KC0000 + index, msr(0x268 + index));
  }
  all.set(X.INITIAL_APIC_ID, { get: ({ vp }, value) => (value.setUint32(0, vp.index, true), true) });
  all.set(R.PENDING_INTERRUPTION, PENDING_INTERRUPTION).set(R.INTERRUPT_STATE, INTERRUPT_STATE);
  all.set(R.PENDING_EVENT0, PENDING_EVENT).set(R.PENDING_EVENT1, NOTHING);
  all.set(R.INTERNAL_ACTIVITY_STATE, ACTIVITY);
  all.set(R.EXPLICIT_SUSPEND, suspend(V.explicitSuspend)).set(R.INTERCEPT_SUSPEND, suspend(V.interceptSuspend));
  all.set(R.DISPATCH_SUSPEND, { get: () => true, set: () => true });
  // Nothing here is ever waited for: the local APIC delivers by itself.
  all.set(R.DELIVERABILITY_NOTIFICATIONS, { get: () => true, set: () => true });
  all.set(X.PENDING_DEBUG_EXCEPTION, { get: () => true, set: () => true });
  all.set(R.VP_INDEX, { get: ({ vp }, value) => (value.setUint32(0, vp.index, true), true) });
  all.set(R.HYPERVISOR_VERSION, { get: () => true });
  const synthetic = { GUEST_OS_ID: 0x4000_0000, VP_ASSIST_PAGE: 0x4000_0073, REFERENCE_TSC: 0x4000_0021 } as const;
  for (const [name, index] of Object.entries(synthetic)) {
    const number = R[name as keyof typeof synthetic];
    all.set(number, enlightenment(number, index));
  }
  all.set(X.HYPERCALL, enlightenment(X.HYPERCALL, 0x4000_0001));
  all.set(R.VP_RUNTIME, readOnlyMsr(0x4000_0010)).set(R.TIME_REF_COUNT, TIME_REF_COUNT);
  for (const name of SYNIC_REGISTERS) all.set(name, synic(name));
  return all;
}

const REGISTERS = build();

/** @returns false: there is no such register */
export function getRegister(target: Target, name: number, value: Value): boolean {
  value.setBigUint64(0, 0n, true);
  value.setBigUint64(8, 0n, true);
  return REGISTERS.get(name)?.get(target, value) ?? false;
}

/** @returns undefined: there is no such register; false: it does not take the value */
export function setRegister(target: Target, name: number, value: Value): boolean | undefined {
  const access = REGISTERS.get(name);
  return access === undefined ? undefined : (access.set?.(target, value) ?? false);
}
