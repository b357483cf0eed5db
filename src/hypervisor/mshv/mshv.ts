/**
 * The Microsoft hypervisor: /dev/mshv of a root partition, guest partitions and their virtual processors.
 *
 * The hypervisor has the local APICs, its own CPUID leaves and its enlightenments (synthetic timers, reference TSC); it has no
 * IOAPIC and no PIC. Accesses to ports and to memory that is not there come to the VP's thread (vcpu.ts).
 */
import { StateBlock } from '../../state/state-block.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import { type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import {
  HypervisorError,
  type InterruptHandle,
  type MemorySlot,
  type VcpuHandle,
  type VmHandle,
  type VmSignals,
  type X86Hypervisor,
  type X86Vcpu,
  type X86Vm,
} from '../hypervisor.js';
import type { X86VmState } from '../saved-state.js';
import type { CpuidEntry } from '../x86-state.js';
import * as abi from './abi.js';
import { setAhead } from './clocks.js';
import { readCpuid } from './cpuid.js';
import { driverRequest } from './driver-request.js';
import { HYPERCALL_PAGES_SIZE, Hypercalls } from './hypercalls.js';
import { mshvRoutesLayout } from './routes.js';
import { loadPartition, savePartition } from './saved-partition.js';
import { attachMshvSignals, setIrqfd, SIGNAL_SLOTS_SIZE } from './signals.js';
import { MshvVcpu, VP_PAGES_SIZE } from './vcpu.js';
import { WrittenPages } from './written-pages.js';

export const MSHV_DEVICE = abi.MSHV_DEVICE;

/** Pins of the IOAPIC that the machine brings: their routes come first. */
const IOAPIC_PINS = 24;

/**
 * A feature that guests are not offered: the hypervisor's local APIC has no timer of that mode, whatever its CPUID says (Cloud
 * Hypervisor hides it for that), and no register's name for its deadline, so that an armed one could not be saved.
 */
const WITHHELD_FEATURE = abi.PROCESSOR_FEATURE_BIT.tsc_deadline_tmr_support;
/** CPUID leaf 1, ECX. */
const TSC_DEADLINE = 1 << 24;

/** What a guest may use beyond hardware: what Linux and Windows guests of this hypervisor expect of it. */
const SYNTHETIC_FEATURES: readonly (keyof typeof abi.SYNTHETIC_FEATURE_BIT)[] = [
  'hypervisor_present',
  'hv1',
  'access_vp_run_time_reg',
  'access_partition_reference_counter',
  'access_synic_regs',
  'access_synthetic_timer_regs',
  'access_intr_ctrl_regs',
  'access_hypercall_regs',
  'access_vp_index',
  'access_partition_reference_tsc',
  'access_guest_idle_reg',
  'access_frequency_regs',
  'direct_synthetic_timers',
  'extended_processor_masks',
  'tb_flush_hypercalls',
  'synthetic_cluster_ipi',
];

/** @throws HypervisorError with a line for the user when the device cannot be used */
export function openMshv(kernel: HostKernel): MshvHypervisor {
  try {
    return new MshvHypervisor(kernel, kernel.open(MSHV_DEVICE));
  } catch (error) {
    throw new HypervisorError(openAdvice(error));
  }
}

function openAdvice(error: unknown): string {
  const code = error instanceof SystemError ? error.code : '';
  if (code === 'ENOENT' || code === 'ENODEV' || code === 'ENXIO') {
    return `No ${MSHV_DEVICE} on this host: it is not the root partition of a Microsoft hypervisor, or the module mshv_root is not loaded`;
  }
  if (code === 'EACCES' || code === 'EPERM') {
    return `No permission for ${MSHV_DEVICE}: run as root, or give this user access to it`;
  }
  return `${MSHV_DEVICE} cannot be opened: ${error instanceof Error ? error.message : String(error)}`;
}

export class MshvHypervisor implements X86Hypervisor {
  readonly name = 'mshv';
  readonly architecture = 'x86_64';
  readonly maxVcpus = abi.MAX_VPS;

  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
  ) {}

  createVm(): X86Vm {
    const fd = this.#createPartition();
    const undo = [() => this.kernel.close(fd)];
    try {
      const vm = new MshvVm(this.kernel, fd);
      undo[0] = () => vm.close();
      vm.initialize();
      return vm;
    } catch (error) {
      return undoAll(error, undo);
    }
  }

  /** With the arguments of newer drivers, or else of the first ones. */
  #createPartition(): number {
    const { LAPIC, X2APIC, GPA_SUPER_PAGES, CPU_AND_XSAVE_FEATURES } = abi.MSHV_PT_BIT;
    const flags = (1 << LAPIC) | (1 << X2APIC) | (1 << GPA_SUPER_PAGES);
    const create = (size: number, bits: number) => {
      const argument = new Uint8Array(size);
      const view = new DataView(argument.buffer);
      view.setBigUint64(abi.CREATE_PARTITION.flags, BigInt(bits), true);
      view.setBigUint64(abi.CREATE_PARTITION.isolation, BigInt(abi.MSHV_PT_ISOLATION_NONE), true);
      if (size === abi.CREATE_PARTITION_V2_SIZE) {
        view.setUint16(abi.CREATE_PARTITION_V2.featureBanks, abi.MSHV_NUM_CPU_FEATURES_BANKS, true);
        view.setUint8(abi.CREATE_PARTITION_V2.disabledFeatures + (WITHHELD_FEATURE >> 3), 1 << (WITHHELD_FEATURE & 7));
      }
      return this.kernel.ioctlBuffer(this.fd, abi.MSHV_CREATE_PARTITION, argument);
    };
    try {
      try {
        return create(abi.CREATE_PARTITION_V2_SIZE, flags | (1 << CPU_AND_XSAVE_FEATURES));
      } catch (error) {
        if (!(error instanceof SystemError) || error.code !== 'EINVAL') throw error;
        return create(abi.CREATE_PARTITION_SIZE, flags);
      }
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      const advice =
        error.code === 'ENOTTY' || error.code === 'EINVAL'
          ? 'its driver is too old or of another kind: Linux 6.15 or later is needed'
          : error.reason;
      throw new HypervisorError(`${MSHV_DEVICE} creates no partition: ${advice}`, { cause: error });
    }
  }

  close(): void {
    this.kernel.close(this.fd);
  }
}

class MshvVm implements X86Vm {
  readonly ioapic = false;
  readonly #pages: HostMapping;
  readonly #slots: HostMapping;
  readonly #hypercalls: Hypercalls;
  readonly #routes = new StateBlock(mshvRoutesLayout);
  readonly #eventfds: number[] = [];
  #signals: VmSignals | undefined;
  #nextRoute = IOAPIC_PINS;
  readonly #freeRoutes: number[] = [];
  /** By slot. */
  readonly #memory = new Map<number, MemorySlot>();
  readonly #written: WrittenPages;
  /** Indexes of all VPs. */
  readonly #vps: number[] = [];
  /** VP 0, which answers what CPUID is before anybody asked for it. */
  #first: MshvVcpu | undefined;
  #cpuid: CpuidEntry[] = [];

  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
  ) {
    this.#pages = kernel.map({ length: HYPERCALL_PAGES_SIZE, shared: false });
    try {
      this.#slots = kernel.map({ length: SIGNAL_SLOTS_SIZE, shared: false });
      this.#hypercalls = new Hypercalls(kernel, fd, this.#pages);
      this.#written = new WrittenPages(kernel, fd, this.#hypercalls);
    } catch (error) {
      undoAll(error, [() => this.#pages.unmap()]);
    }
  }

  initialize(): void {
    const { SYNTHETIC_PROC_FEATURES, TIME_FREEZE, UNIMPLEMENTED_MSR_ACTION } = abi.HV_PARTITION_PROPERTY;
    const features = SYNTHETIC_FEATURES.reduce(
      (sum, name) => sum | (1n << BigInt(abi.SYNTHETIC_FEATURE_BIT[name])),
      0n,
    );
    this.#hypercalls.setProperty(SYNTHETIC_PROC_FEATURES, features);
    driverRequest('INITIALIZE_PARTITION', () => this.kernel.ioctl(this.fd, abi.MSHV_INITIALIZE_PARTITION));
    // It has begun to run: until the vCPUs do, it stands still.
    this.#hypercalls.setProperty(TIME_FREEZE, 1n);
    // As KVM does for what it does not know; guests probe for much.
    const action = BigInt(abi.HV_UNIMPLEMENTED_MSR_ACTION.IGNORE_WRITE_READ_ZERO);
    this.#hypercalls.setProperty(UNIMPLEMENTED_MSR_ACTION, action);
    this.#first = this.#createVp(0);
    this.#cpuid = readCpuid(this.#first.hypercalls, 0);
  }

  get handle(): VmHandle {
    return { fd: this.fd, routes: this.#routes.buffer, slots: this.#slots.handle };
  }

  get signals(): VmSignals {
    return (this.#signals ??= attachMshvSignals(this.kernel, this.handle));
  }

  supportedCpuid(): CpuidEntry[] {
    return this.#cpuid.map((entry) =>
      entry.function === 1 ? { ...entry, ecx: (entry.ecx & ~TSC_DEADLINE) >>> 0 } : entry,
    );
  }

  /** The slot's number is KVM's business: the driver knows a region by where it is. */
  addMemory(slot: MemorySlot): void {
    const { WRITABLE, EXECUTABLE } = abi.MSHV_SET_MEM_BIT;
    this.#setMemory(slot, (1 << WRITABLE) | (1 << EXECUTABLE));
    this.#memory.set(slot.slot, slot);
  }

  removeMemory(slot: number): void {
    this.#setMemory(this.#memory.get(slot)!, 1 << abi.MSHV_SET_MEM_BIT.UNMAP);
    this.#memory.delete(slot);
    this.#written.removed(slot);
  }

  trackWrites(slot: MemorySlot, on: boolean): void {
    if (on) this.#written.track(slot);
    else this.#written.untrack(slot);
  }

  takeWritten(slot: MemorySlot, into: Uint32Array): void {
    this.#written.take(slot, into);
  }

  #setMemory({ guestAddress, mapping }: MemorySlot, flags: number): void {
    const region = new Uint8Array(abi.MEM_REGION_SIZE);
    const view = new DataView(region.buffer);
    view.setBigUint64(abi.MEM_REGION.size, BigInt(mapping.length), true);
    view.setBigUint64(abi.MEM_REGION.guestPfn, BigInt(guestAddress / abi.MSHV_HV_PAGE_SIZE), true);
    view.setBigUint64(abi.MEM_REGION.userspaceAddress, mapping.address, true);
    region[abi.MEM_REGION.flags] = flags;
    driverRequest('SET_GUEST_MEMORY', () => this.kernel.ioctlBuffer(this.fd, abi.MSHV_SET_GUEST_MEMORY, region));
  }

  /** @param id also the VP's index: the driver takes a message's destination for it */
  createVcpu(id: number): X86Vcpu {
    const first = this.#first;
    if (id !== 0 || first === undefined) return this.#createVp(id);
    this.#first = undefined; // its new owner closes it
    return first;
  }

  #createVp(id: number): MshvVcpu {
    const argument = new Uint8Array(new Uint32Array([id]).buffer);
    const fd = driverRequest('CREATE_VP', () => this.kernel.ioctlBuffer(this.fd, abi.MSHV_CREATE_VP, argument));
    const undo: (() => void)[] = [() => this.kernel.close(fd)];
    try {
      const pages = this.kernel.map({ length: VP_PAGES_SIZE, shared: false });
      undo.push(() => pages.unmap());
      const registerPage = this.#mapRegisterPage(fd);
      undo.push(() => registerPage?.unmap());
      const handle: VcpuHandle = { id, fd, run: pages.handle, registerPage: registerPage?.handle };
      const vcpu = new MshvVcpu(this.kernel, handle, pages, registerPage, { cpuid: () => this.#cpuid });
      this.#vps.push(id);
      return vcpu;
    } catch (error) {
      return undoAll(error, undo);
    }
  }

  /** The driver of an older hypervisor has none. */
  #mapRegisterPage(fd: number): HostMapping | undefined {
    try {
      const offset = abi.MSHV_VP_MMAP_OFFSET.REGISTERS * abi.MSHV_HV_PAGE_SIZE;
      return this.kernel.map({ length: abi.MSHV_HV_PAGE_SIZE, fd, offset, shared: true });
    } catch (error) {
      if (error instanceof SystemError) return undefined;
      throw error;
    }
  }

  createInterrupt(pin: number): InterruptHandle {
    const eventfd = this.kernel.eventfd();
    this.#eventfds.push(eventfd);
    driverRequest('IRQFD', () => setIrqfd(this.kernel, this.fd, pin, eventfd, 0));
    return { eventfd };
  }

  startTime(passed = 0n): void {
    if (passed > 0n) setAhead(this.#hypercalls, this.#vps, passed);
    this.#hypercalls.setProperty(abi.HV_PARTITION_PROPERTY.TIME_FREEZE, 0n);
  }

  stopTime(): void {
    this.#hypercalls.setProperty(abi.HV_PARTITION_PROPERTY.TIME_FREEZE, 1n);
  }

  allocateMsiRoute(): number {
    const free = this.#freeRoutes.pop();
    if (free !== undefined) return free;
    if (this.#nextRoute === abi.MAX_GUEST_IRQS) {
      throw new HypervisorError(`More than ${abi.MAX_GUEST_IRQS} interrupt routes`);
    }
    return this.#nextRoute++;
  }

  freeMsiRoute(route: number): void {
    this.signals.clearMsiRoute(route);
    this.#freeRoutes.push(route);
  }

  save(): X86VmState {
    return savePartition(this.#hypercalls);
  }

  load(state: X86VmState): void {
    loadPartition(this.#hypercalls, state);
  }

  /** The guest reads it from the hypervisor's own MSR. */
  tscKhz(): undefined {
    return undefined;
  }

  close(): void {
    closeAll([
      () => this.#first?.close(),
      ...[...this.#eventfds, this.fd].map((fd) => () => this.kernel.close(fd)),
      () => this.#slots.unmap(),
      () => this.#pages.unmap(),
    ]);
  }
}
