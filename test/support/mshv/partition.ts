/** A simulated guest partition: a KVM virtual machine with its memory and processors. */
import fs from 'node:fs';
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel, HostMapping } from '../../../src/sys/host-kernel.js';
import { baseCpuid, type Leaf, setCpuid } from './cpuid.js';
import { Clocks } from './clocks.js';
import { DirtyPages } from './dirty-pages.js';
import { EEXIST, EFAULT, EINVAL, EIO, ENOMEM } from './errno.js';
import { Interrupts, PINS } from './irq.js';
import * as k from './kvm-abi.js';
import { LocalApic } from './local-apic.js';
import { REGION } from './memory.js';
import { Processor } from './processor.js';
import { Kind, MAX_PARTITIONS, MAX_REGIONS, P, PartitionState, REGION_WORDS, type Shared, V } from './shared.js';
import { resetSynic } from './synic.js';

const PAGE = abi.MSHV_HV_PAGE_SIZE;
/** Guest addresses that KVM wants for itself on some processors. */
const TSS_ADDRESS = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS = 0xfffb_c000;
/** KVM_X2APIC_API_USE_32BIT_IDS and _DISABLE_BROADCAST_QUIRK. */
const X2APIC_API_FLAGS = 3;
const CPUID_WORDS = 12;
const MAX_CPUID_RESULTS = Math.floor((PAGE - 4) / (CPUID_WORDS * 4));

export interface Region {
  /** Offset in the shared table. */
  readonly at: number;
  readonly slot: number;
  readonly used: boolean;
  readonly guest: bigint;
  readonly size: bigint;
  readonly user: bigint;
  readonly flags: number;
}

/** run mappings that this thread made, by descriptor. */
const runMappings = new Map<number, HostMapping>();

export class Partition {
  readonly interrupts: Interrupts;
  readonly dirtyPages: DirtyPages;
  readonly clocks: Clocks;
  readonly #control: number;

  constructor(
    private readonly host: HostKernel,
    readonly shared: Shared,
    readonly index: number,
  ) {
    this.#control = shared.partition(index) / 4;
    this.interrupts = new Interrupts(host, shared, index);
    this.clocks = new Clocks(host, shared, index);
    this.dirtyPages = new DirtyPages(host, shared, this);
  }

  word(index: number): number {
    return this.shared.words[this.#control + index];
  }

  setWord(index: number, value: number): void {
    this.shared.words[this.#control + index] = value;
  }

  locked<T>(work: () => T): T {
    return this.shared.locked(this.#control + P.lock, work);
  }

  /** MSHV_CREATE_PARTITION. @returns a descriptor or the negated errno */
  static create(host: HostKernel, shared: Shared, device: number, argument: DataView): number {
    const flags = argument.getBigUint64(abi.CREATE_PARTITION.flags, true);
    const known = (1n << BigInt(Object.keys(abi.MSHV_PT_BIT).length)) - 1n;
    if ((flags & ~known) !== 0n || argument.getBigUint64(abi.CREATE_PARTITION.isolation, true) !== 0n) return -EINVAL;
    const version2 = (flags & (1n << BigInt(abi.MSHV_PT_BIT.CPU_AND_XSAVE_FEATURES))) !== 0n;
    if (version2) {
      if (argument.byteLength < abi.CREATE_PARTITION_V2_SIZE) return -EFAULT;
      const at = abi.CREATE_PARTITION_V2;
      if (argument.getUint16(at.featureBanks, true) !== abi.MSHV_NUM_CPU_FEATURES_BANKS) return -EINVAL;
      for (let byte = at.featureBanks + 2; byte < at.disabledFeatures; byte++)
        if (argument.getUint8(byte) !== 0) return -EINVAL;
      for (let byte = at.disabledFeatures + 16; byte < at.disabledXsave; byte++)
        if (argument.getUint8(byte) !== 0) return -EINVAL;
    }
    let vm: number;
    do vm = host.ioctlRaw(device, kvm.KVM_CREATE_VM, 0);
    while (vm === -4);
    if (vm < 0) return vm;
    const index = shared.locked(0, () => {
      for (let slot = 0; slot < MAX_PARTITIONS; slot++) {
        const control = shared.partition(slot) / 4;
        if (shared.words[control + P.state] !== PartitionState.Free) continue;
        shared.clearPartition(slot);
        shared.words[control + P.state] = PartitionState.Created;
        return slot;
      }
      return -1;
    });
    if (index < 0) {
      host.close(vm);
      return -ENOMEM;
    }
    const partition = new Partition(host, shared, index);
    partition.setWord(P.fd, vm);
    partition.setWord(P.device, device);
    partition.setWord(P.flags, Number(flags));
    if (version2) {
      const { disabledFeatures, disabledXsave } = abi.CREATE_PARTITION_V2;
      const words = [disabledFeatures, disabledFeatures + 8, disabledXsave].map((at) =>
        argument.getBigUint64(at, true),
      );
      [P.disabledFeatures, P.disabledFeatures + 2, P.disabledXsave].forEach((at, index) =>
        shared.view.setBigUint64(4 * (partition.#control + at), words[index], true),
      );
    }
    const result = partition.#setUp();
    if (result < 0) {
      partition.setWord(P.state, PartitionState.Free);
      host.close(vm);
      return result;
    }
    shared.setDescriptor(vm, Kind.Partition, index);
    return vm;
  }

  #has(bit: keyof typeof abi.MSHV_PT_BIT): boolean {
    return (this.word(P.flags) & (1 << abi.MSHV_PT_BIT[bit])) !== 0;
  }

  #setUp(): number {
    const fd = this.word(P.fd);
    let result = this.host.ioctlRaw(fd, kvm.KVM_SET_TSS_ADDR, TSS_ADDRESS);
    const identity = new Uint8Array(new BigUint64Array([BigInt(IDENTITY_MAP_ADDRESS)]).buffer);
    if (result >= 0) result = this.host.ioctlBufferRaw(fd, kvm.KVM_SET_IDENTITY_MAP_ADDR, identity);
    if (this.#has('LAPIC')) {
      if (result >= 0) result = this.#enable(k.CAP.SPLIT_IRQCHIP, PINS);
      if (result >= 0 && this.#has('X2APIC')) result = this.#enable(k.CAP.X2APIC_API, X2APIC_API_FLAGS);
    }
    const reasons = k.MSR_EXIT_UNKNOWN | k.MSR_EXIT_FILTER;
    if (result >= 0) result = this.#enable(k.CAP.X86_USER_SPACE_MSR, reasons);
    return result;
  }

  #enable(capability: number, argument: number): number {
    const buffer = new Uint8Array(0x68);
    const view = new DataView(buffer.buffer);
    view.setUint32(0, capability, true);
    view.setBigUint64(8, BigInt(argument), true);
    return this.host.ioctlBufferRaw(this.word(P.fd), k.KVM_ENABLE_CAP, buffer);
  }

  /** MSHV_INITIALIZE_PARTITION. */
  initialize(): number {
    this.setWord(P.state, PartitionState.Initialized);
    return 0;
  }

  get initialized(): boolean {
    return this.word(P.state) === PartitionState.Initialized;
  }

  // Partition properties are pairs in the control page, after those that have a word of their own.

  property(code: number): bigint | undefined {
    for (
      let at = this.#control + P.properties;
      at < this.#control + P.levels - 2 && this.shared.words[at] !== 0;
      at += 3
    ) {
      if (this.shared.words[at] !== code) continue;
      return BigInt(this.shared.words[at + 1] >>> 0) | (BigInt(this.shared.words[at + 2] >>> 0) << 32n);
    }
    return undefined;
  }

  setProperty(code: number, value: bigint): void {
    let at = this.#control + P.properties;
    while (this.shared.words[at] !== 0 && this.shared.words[at] !== code) at += 3;
    this.shared.words[at] = code;
    this.shared.words[at + 1] = Number(BigInt.asIntN(32, value));
    this.shared.words[at + 2] = Number(BigInt.asIntN(32, value >> 32n));
  }

  /** MSHV_SET_GUEST_MEMORY. */
  setMemory(argument: DataView): number {
    const at = abi.MEM_REGION;
    const size = argument.getBigUint64(at.size, true);
    const user = argument.getBigUint64(at.userspaceAddress, true);
    const flags = argument.getUint8(at.flags);
    for (let byte = at.flags + 1; byte < abi.MEM_REGION_SIZE; byte++) if (argument.getUint8(byte) !== 0) return -EINVAL;
    if (size === 0n || size % BigInt(PAGE) !== 0n || user % BigInt(PAGE) !== 0n || (flags & ~7) !== 0) return -EINVAL;
    const guest = argument.getBigUint64(at.guestPfn, true) * BigInt(PAGE);
    return this.locked(() => {
      const unmap = (flags & (1 << abi.MSHV_SET_MEM_BIT.UNMAP)) !== 0;
      return unmap ? this.#unmap(guest, size, user) : this.#map(guest, size, user, flags);
    });
  }

  regions(): Region[] {
    return Array.from({ length: MAX_REGIONS }, (_, slot) => {
      const at = this.shared.regions(this.index) + slot * REGION_WORDS * 4;
      const { view } = this.shared;
      const word = (field: number) => view.getBigUint64(at + field, true);
      const used = view.getUint32(at + REGION.used, true) !== 0;
      const flags = view.getUint32(at + REGION.flags, true);
      return { at, slot, used, guest: word(REGION.guest), size: word(REGION.size), user: word(REGION.user), flags };
    });
  }

  #map(guest: bigint, size: bigint, user: bigint, flags: number): number {
    if (!isMapped(user)) return -EINVAL;
    const regions = this.regions();
    const touches = (start: bigint, length: bigint, address: bigint) => address >= start && address < start + length;
    for (const region of regions.filter(({ used }) => used)) {
      const inGuest =
        touches(region.guest, region.size, guest) || touches(region.guest, region.size, guest + size - 1n);
      const inUser = touches(region.user, region.size, user) || touches(region.user, region.size, user + size - 1n);
      if (inGuest || inUser) return -EEXIST;
    }
    // The hypervisor maps memory of initialized partitions alone: HV_STATUS_INVALID_PARTITION_STATE.
    if (!this.initialized) return -EIO;
    const free = regions.find(({ used }) => !used);
    if (free === undefined) return -ENOMEM;
    const { view } = this.shared;
    view.setBigUint64(free.at + REGION.guest, guest, true);
    view.setBigUint64(free.at + REGION.size, size, true);
    view.setBigUint64(free.at + REGION.user, user, true);
    view.setUint32(free.at + REGION.flags, flags, true);
    const result = this.#setSlot(free.slot, guest, size, user, flags);
    if (result < 0) return result;
    view.setUint32(free.at + REGION.used, 1, true);
    this.shared.words[this.#control + P.epoch]++;
    return 0;
  }

  #unmap(guest: bigint, size: bigint, user: bigint): number {
    const region = this.regions().find(
      (one) => one.used && one.guest === guest && one.size === size && one.user === user,
    );
    if (region === undefined) return -EINVAL;
    this.shared.view.setUint32(region.at + REGION.used, 0, true);
    this.shared.words[this.#control + P.epoch]++;
    return this.#setSlot(region.slot, guest, 0n, user, region.flags);
  }

  #setSlot(slot: number, guest: bigint, size: bigint, user: bigint, flags: number): number {
    const buffer = new Uint8Array(kvm.USER_MEMORY_REGION_SIZE);
    const view = new DataView(buffer.buffer);
    const readOnly = (flags & (1 << abi.MSHV_SET_MEM_BIT.WRITABLE)) === 0 ? k.MEM_READONLY : 0;
    view.setUint32(0, slot, true);
    view.setUint32(4, size === 0n ? 0 : readOnly | (this.word(P.tracking) !== 0 ? k.MEM_LOG_DIRTY_PAGES : 0), true);
    view.setBigUint64(8, guest, true);
    view.setBigUint64(16, size, true);
    view.setBigUint64(24, user, true);
    return this.host.ioctlBufferRaw(this.word(P.fd), kvm.KVM_SET_USER_MEMORY_REGION, buffer);
  }

  /** The property GPA_PAGE_ACCESS_TRACKING. */
  track(on: boolean): number {
    return this.locked(() => {
      this.setWord(P.tracking, on ? 1 : 0);
      if (on) this.dirtyPages.clear();
      for (const { used, slot, guest, size, user, flags } of this.regions()) {
        const result = used ? this.#setSlot(slot, guest, size, user, flags) : 0;
        if (result < 0) return result;
      }
      return 0;
    });
  }

  /** MSHV_CREATE_VP. @returns a descriptor or the negated errno */
  createVp(index: number): number {
    if (index >= abi.MAX_VPS) return -EINVAL;
    return this.locked(() => {
      const control = this.shared.vp(this.index, index) / 4;
      const { words } = this.shared;
      if (words[control + V.state] !== 0) return -EEXIST;
      if (!this.initialized) return -EIO;
      const fd = this.host.ioctlRaw(this.word(P.fd), kvm.KVM_CREATE_VCPU, index);
      if (fd < 0) return fd;
      const length = this.host.ioctlRaw(this.word(P.device), kvm.KVM_GET_VCPU_MMAP_SIZE, 0);
      const mapping = this.host.map({ fd, length, shared: true });
      this.shared.clearVp(this.index, index);
      resetSynic(this.shared, this.index, index);
      words[control + V.state] = 1;
      words[control + V.fd] = fd;
      words[control + V.runLow] = Number(BigInt.asIntN(32, mapping.handle.address));
      words[control + V.runHigh] = Number(mapping.handle.address >> 32n);
      words[control + V.runLength] = length;
      const result = this.applyCpuid(index);
      if (result < 0 || new Processor(this.host, fd, mapping.view(0, length)).load() < 0) {
        words[control + V.state] = 0;
        mapping.unmap();
        this.host.close(fd);
        return result < 0 ? result : -EIO;
      }
      runMappings.set(fd, mapping);
      this.clocks.created(index);
      words[this.#control + P.openVps]++;
      this.shared.setDescriptor(fd, Kind.Vp, this.index, index);
      return fd;
    });
  }

  localApic(vp: number): LocalApic {
    const fd = this.shared.words[this.shared.vp(this.index, vp) / 4 + V.fd];
    return new LocalApic(this.host, this.shared, fd, this.index, vp);
  }

  hasVp(index: number): boolean {
    return index < abi.MAX_VPS && this.shared.words[this.shared.vp(this.index, index) / 4 + V.state] !== 0;
  }

  /** HVCALL_REGISTER_INTERCEPT_RESULT of CPUID: kept as leaf, subleaf, whether that matters, and values with their masks. */
  registerCpuid(vp: number, result: readonly number[]): number {
    const page = this.shared.cpuidPage(this.index, vp) / 4;
    const { words } = this.shared;
    const same = (at: number) =>
      words[at] === (result[0] | 0) && words[at + 1] === (result[1] | 0) && words[at + 2] === result[2];
    let slot = 0;
    while (slot < words[page] && !same(page + 1 + slot * CPUID_WORDS)) slot++;
    if (slot === MAX_CPUID_RESULTS) return abi.HV_STATUS.INSUFFICIENT_MEMORY;
    if (slot === words[page]) words[page]++;
    words.set(result, page + 1 + slot * CPUID_WORDS);
    words[this.shared.vp(this.index, vp) / 4 + V.cpuidSet] = 1;
    return abi.HV_STATUS.SUCCESS;
  }

  /** @param registered with the results that the VMM registered */
  cpuid(vp: number, registered: boolean): Leaf[] {
    const leaves = baseCpuid(
      this.host,
      this.word(P.device),
      {
        flags: this.word(P.flags),
        features: this.property(abi.HV_PARTITION_PROPERTY.SYNTHETIC_PROC_FEATURES) ?? 0n,
        disabledFeatures: this.shared.view.getBigUint64(4 * (this.#control + P.disabledFeatures + 2), true),
        disabledXsave: this.shared.view.getBigUint64(4 * (this.#control + P.disabledXsave), true),
      },
      vp,
    );
    if (!registered) return leaves;
    const page = this.shared.cpuidPage(this.index, vp) / 4;
    for (let slot = 0; slot < this.shared.words[page]; slot++) {
      const at = page + 1 + slot * CPUID_WORDS;
      const word = (index: number) => this.shared.words[at + index] >>> 0;
      const [leaf, subleaf, specific] = [word(0), word(1), word(2) !== 0];
      let matching = leaves.filter((entry) => entry.leaf === leaf && (!specific || entry.subleaf === subleaf));
      if (matching.length === 0) {
        matching = [{ leaf, subleaf, indexed: specific, eax: 0, ebx: 0, ecx: 0, edx: 0 }];
        leaves.push(...matching);
      }
      for (const entry of matching) {
        (['eax', 'ebx', 'ecx', 'edx'] as const).forEach((name, index) => {
          const [value, mask] = [word(3 + 2 * index), word(4 + 2 * index)];
          entry[name] = ((entry[name] & ~mask) | (value & mask)) >>> 0;
        });
      }
    }
    return leaves;
  }

  applyCpuid(vp: number): number {
    const control = this.shared.vp(this.index, vp) / 4;
    this.shared.words[control + V.cpuidSet] = 0;
    return setCpuid(this.host, this.shared.words[control + V.fd], this.cpuid(vp, true));
  }

  /** Close of the partition's own descriptor, or of a processor's; the last one frees the partition. */
  release(fd: number, vp: number | undefined): void {
    this.locked(() => {
      if (vp === undefined) this.setWord(P.state, PartitionState.Closed);
      else {
        runMappings.get(fd)?.unmap();
        runMappings.delete(fd);
        this.shared.words[this.#control + P.openVps]--;
      }
      if (this.word(P.state) === PartitionState.Closed && this.word(P.openVps) <= 0)
        this.setWord(P.state, PartitionState.Free);
    });
  }
}

/** Whether this process has something mapped at an address. */
function isMapped(address: bigint): boolean {
  return fs
    .readFileSync('/proc/self/maps', 'latin1')
    .split('\n')
    .some((line) => {
      const [start, end] = line.split(' ', 1)[0].split('-') as [string, string | undefined];
      return end !== undefined && address >= BigInt(`0x${start}`) && address < BigInt(`0x${end}`);
    });
}
