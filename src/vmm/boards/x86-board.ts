/** The board of an x86_64 machine: APICs, ACPI, SMBIOS and MP tables, CPUID. */
import { buildAcpiTables } from '../../arch/x86_64/acpi/tables.js';
import { BOOT_FPU, bootRegisters, bootSpecialRegisters } from '../../arch/x86_64/boot/entry.js';
import { loadPayload } from '../../arch/x86_64/boot/load.js';
import { EM_X86_64, x86CoreNotes } from '../../arch/x86_64/core-notes.js';
import { buildCpuid } from '../../arch/x86_64/cpuid.js';
import { missingFeatures } from '../../arch/x86_64/cpuid-features.js';
import * as layout from '../../arch/x86_64/layout.js';
import { buildMpTable } from '../../arch/x86_64/mptable.js';
import { initialMsrs } from '../../arch/x86_64/msrs.js';
import { RESET_CODE } from '../../arch/x86_64/reset-vector.js';
import { buildSmbios } from '../../arch/x86_64/smbios.js';
import type { NumaNode } from '../../arch/numa.js';
import type { Topology } from '../../arch/topology.js';
import { apicId, MAX_APIC_ID } from '../../arch/x86_64/topology.js';
import { type MemoryConfig, ramSize, zonesOf } from '../../config/memory-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import type { X86Hypervisor, X86Vcpu, X86Vm } from '../../hypervisor/hypervisor.js';
import type { CpuidEntry } from '../../hypervisor/x86-state.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { type IntxHandle, IntxLines } from '../../pci/intx.js';
import type { SegmentWindows } from '../../pci/segments.js';
import { undoAll } from '../../sys/close-all.js';
import type { VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { addressBits, type Board, configuredTopology, writeGeneration } from './board.js';
import type { X86BoardState } from './board-state.js';
import type { MemoryFiles } from '../host/memory-file.js';
import { MachineError } from '../machine/machine-error.js';
import { plugsDimms, sizesOf } from '../memory/hotplug.js';
import { layoutMemory, type MemoryLayout } from '../memory/memory-layout.js';
import { numaNodes, type PlacedFunction, segmentsOf } from './numa.js';
import { createX86Platform, type X86PlatformHandle } from './x86-platform.js';

/** The guest's 64-bit PCI window starts on a multiple of this. Bytes. */
const MMIO64_ALIGNMENT = 128 * 2 ** 20;

/** A message-signalled interrupt: where it goes, and the delivery mode NMI. */
const MESSAGE_ADDRESS = 0xfee0_0000;
const MESSAGE_NMI = 0b100 << 8;
const MSR_KERNEL_GS_BASE = 0xc000_0102;

export class X86Board implements Board {
  readonly vm: X86Vm;
  readonly memory: MemoryLayout;
  readonly segments: readonly SegmentWindows[];
  readonly intx: IntxHandle;
  readonly #physicalBits: number;
  readonly #area: layout.PlatformArea;
  readonly #supported: readonly CpuidEntry[];
  readonly #topology: Topology;
  readonly #vcpus: X86Vcpu[] = [];
  /** Where the generation ID is. */
  #generation: number | undefined;
  /** What each was told of its processor. */
  readonly #cpuid: (readonly CpuidEntry[])[] = [];

  /**
   * @param files that memory zones are in
   * @param saved the state of another, from which it goes on
   * @throws MachineError when the processor cannot address what is asked for; HypervisorError, SystemError
   */
  constructor(
    hypervisor: X86Hypervisor,
    private readonly config: VmConfig,
    private readonly files: MemoryFiles = new Map(),
    private readonly saved?: X86BoardState,
  ) {
    this.#generation = saved?.generation;
    this.#topology = vcpuTopology(config);
    this.vm = hypervisor.createVm({
      tssAddress: layout.KVM_TSS,
      identityMapAddress: layout.KVM_IDENTITY_MAP,
      levelPins: layout.IRQ_INTX,
    });
    try {
      this.#supported = this.vm.supportedCpuid();
      const possible = Math.min(hostPhysicalBits(this.#supported), config.cpus.max_phys_bits);
      this.#physicalBits = addressBits(possible, saved);
      this.#area = layout.platformArea(this.#physicalBits, plugsDimms(config.memory));
      this.memory = x86Memory(config.memory, files);
      this.#checkMemory();
      this.segments = this.#segments();
      this.intx = IntxLines.powerOn(layout.IRQ_INTX, this.vm.signals);
    } catch (error) {
      this.vm.close();
      throw error;
    }
  }

  /** @throws MachineError */
  #checkMemory(): void {
    const { memory } = this.config;
    const [low] = this.memory.ram;
    if (low.address !== 0 || low.size < layout.HIGH_MEMORY) {
      throw new MachineError(`${sizesOf(memory)}: accepted is a size that holds the kernel, 1M at the least`);
    }
    if (!this.fits(memory)) {
      throw new MachineError(
        `${sizesOf(memory)}: more than a guest of ${this.#physicalBits} physical address bits can have`,
      );
    }
  }

  fits(memory: MemoryConfig): boolean {
    return mmio64Start(x86Memory(memory, this.files)) < this.#area.start;
  }

  #segments(): SegmentWindows[] {
    const mmio64 = { start: mmio64Start(this.memory), end: this.#area.start };
    const mmio32 = { start: layout.MMIO32_START, end: layout.MMIO32_END };
    return segmentsOf(this.config, layout.ECAM_START, layout.ECAM_SEGMENT_SIZE, { mmio32, mmio64 });
  }

  createVcpus(): X86Vcpu[] {
    try {
      const count = this.saved?.vcpus.length ?? this.config.cpus.boot_vcpus;
      for (let id = 0; id < count; id++) this.plugVcpu();
    } catch (error) {
      undoAll(
        error,
        this.#vcpus.map((vcpu) => () => vcpu.close()),
      );
    }
    return [...this.#vcpus];
  }

  plugVcpu(): X86Vcpu {
    const id = this.#vcpus.length;
    const topology = this.#topology;
    const vcpu = this.vm.createVcpu(apicId(id, topology));
    try {
      const cpuid = this.#cpuidOf(id);
      vcpu.setCpuid(cpuid);
      this.#cpuid.push(cpuid);
      vcpu.setMsrs(initialMsrs());
      vcpu.setFpu(BOOT_FPU);
      vcpu.setLocalInterrupts();
    } catch (error) {
      undoAll(error, [() => vcpu.close()]);
    }
    this.#vcpus.push(vcpu);
    return vcpu;
  }

  /** @throws MachineError when the host's processor lacks what the guest has been told of */
  #cpuidOf(vcpu: number): readonly CpuidEntry[] {
    const supported = this.#supported;
    const told = this.saved?.cpuid.at(vcpu);
    if (told === undefined) {
      const tscKhz = this.vm.tscKhz();
      return buildCpuid({ supported, vcpu, topology: this.#topology, physicalBits: this.#physicalBits, tscKhz });
    }
    const lack = missingFeatures(told, supported);
    if (lack.length === 0) return told;
    throw new MachineError(`The guest uses what this host's processor does not have: CPUID ${lack.join(', ')}`);
  }

  /** As a message to its local APIC (Intel SDM volume 3, 11.11). */
  sendNmi(vcpu: number): void {
    const address = MESSAGE_ADDRESS | (apicId(vcpu, this.#topology) << 12);
    this.vm.signals.signalMsi(address >>> 0, 0, MESSAGE_NMI, 0);
  }

  core(vcpus: Iterable<number>): { machine: number; notes: Uint8Array[] } {
    const notes = [...vcpus].flatMap((id) => {
      const vcpu = this.#vcpus[id];
      const kernelGsBase = vcpu.msr(MSR_KERNEL_GS_BASE);
      return x86CoreNotes(id, { general: vcpu.registers(), special: vcpu.specialRegisters(), kernelGsBase });
    });
    return { machine: EM_X86_64, notes };
  }

  createPlatform(virtio: readonly VirtioPciHandle[]): X86PlatformHandle {
    const { serial, pvpanic, cpus } = this.config;
    const area = this.#area;
    return createX86Platform(this.vm, virtio, this.intx, {
      segments: this.segments,
      serial: serial.mode !== 'Off',
      pvpanic,
      ioapic: !this.vm.ioapic,
      gedAddress: area.ged,
      pciHotplugAddress: area.pciHotplug,
      cpuHotplugAddress: cpus.max_vcpus > cpus.boot_vcpus ? area.cpuHotplug : undefined,
      memoryHotplugAddress: area.memoryHotplug,
      vcpus: cpus.max_vcpus,
      bootVcpus: cpus.boot_vcpus,
      lowRam: this.memory.ram[0].size,
      highRam: this.memory.ram.at(1)?.size ?? 0,
    });
  }

  boot(memory: GuestMemory, functions: readonly PlacedFunction[]): boolean {
    const rsdp = this.#writeTables(memory, numaNodes(this.config, this.memory, functions));
    const { kernel, initramfs, cmdline = '' } = this.config.payload;
    const entry = loadPayload({ kernel, initramfs, cmdline, rsdp }, memory);
    // The others wait for the first one to start them (INIT, SIPI).
    const [first] = this.#vcpus;
    first.setSpecialRegisters(bootSpecialRegisters(entry, first.specialRegisters()));
    first.setRegisters(bootRegisters(entry));
    return !entry.linux;
  }

  save(): X86BoardState {
    const vcpus = this.#vcpus.map((vcpu) => vcpu.save());
    return {
      architecture: 'x86_64',
      addressBits: this.#physicalBits,
      generation: this.#generation,
      cpuid: this.#cpuid,
      vcpus,
      vm: this.vm.save(),
    };
  }

  load(): void {
    const { vcpus, vm } = this.saved!;
    this.#vcpus.forEach((vcpu, id) => vcpu.load(vcpus[id]));
    this.vm.load(vm);
  }

  renewGeneration(memory: GuestMemory): boolean {
    if (this.#generation === undefined) return false;
    writeGeneration(memory, this.#generation);
    return true;
  }

  /** @returns the RSDP's address */
  #writeTables(memory: GuestMemory, numa: readonly NumaNode[]): number {
    const { cpus, serial, pvpanic, memory: ram } = this.config;
    const apicIds = Array.from({ length: cpus.max_vcpus }, (_, id) => apicId(id, this.#topology));
    const area = this.#area;
    const acpi = buildAcpiTables({
      apicIds,
      bootVcpus: cpus.boot_vcpus,
      numa,
      pciSegments: this.segments,
      gedAddress: area.ged,
      pciHotplug: area.pciHotplug,
      cpuHotplug: area.cpuHotplug,
      memoryHotplug: area.memoryHotplug,
      serial: serial.mode !== 'Off',
      pvpanic,
    });
    for (const { address, bytes } of acpi.tables) memory.write(address, bytes);
    this.#generation = layout.GENERATION_ID;
    writeGeneration(memory, this.#generation);
    const smbios = buildSmbios({ memorySize: ramSize(ram), vcpus: cpus.boot_vcpus });
    memory.write(layout.SMBIOS, smbios);
    const mpTable = Math.ceil((layout.SMBIOS + smbios.length) / 16) * 16;
    memory.write(mpTable, buildMpTable({ apicIds: apicIds.slice(0, cpus.boot_vcpus), address: mpTable }));
    memory.write(layout.RESET_VECTOR, RESET_CODE);
    return acpi.rsdp;
  }
}

/** Where memory lies. @param files that zones are in */
export function x86Memory(memory: MemoryConfig, files: MemoryFiles): MemoryLayout {
  return layoutMemory(zonesOf(memory), layout.RAM_WINDOWS, layout.HIGH_RAM_START, files);
}

/** Guest physical address. */
function mmio64Start({ end }: MemoryLayout): number {
  return Math.ceil(end / MMIO64_ALIGNMENT) * MMIO64_ALIGNMENT;
}

/** CPUID 0x8000_0008 EAX bits 7 to 0: physical address bits. */
function hostPhysicalBits(cpuid: readonly CpuidEntry[]): number {
  const leaf = cpuid.find((entry) => entry.function === 0x8000_0008);
  return leaf === undefined ? 36 : leaf.eax & 0xff;
}

function vcpuTopology({ cpus }: VmConfig): Topology {
  const topology = configuredTopology(cpus);
  if (apicId(cpus.max_vcpus - 1, topology) > MAX_APIC_ID) {
    throw new MachineError(`--cpus topology: accepted is one whose APIC ids end at ${MAX_APIC_ID} or below`);
  }
  return topology;
}
