/** The board of an aarch64 machine: GICv3 with its ITS, PSCI, devicetree. */
import { arm64CoreNotes, EM_AARCH64 } from '../../arch/aarch64/core-notes.js';
import { loadArm64Payload } from '../../arch/aarch64/boot/load.js';
import { buildArm64Acpi } from '../../arch/aarch64/acpi.js';
import { buildDevicetree, type EfiPlace, SEED_SIZE } from '../../arch/aarch64/devicetree.js';
import { buildEfi } from '../../arch/aarch64/efi.js';
import * as layout from '../../arch/aarch64/layout.js';
import { type MemoryConfig, zonesOf } from '../../config/memory-config.js';
import type { NumaNode } from '../../arch/numa.js';
import type { VmConfig } from '../../config/vm-config.js';
import type { Arm64Hypervisor, Arm64Vcpu, Arm64Vm } from '../../hypervisor/hypervisor.js';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { type IntxHandle, IntxLines } from '../../pci/intx.js';
import type { AddressWindow, SegmentWindows } from '../../pci/segments.js';
import { undoAll } from '../../sys/close-all.js';
import { randomBytes } from '../../sys/random.js';
import type { VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { type Arm64PlatformHandle, createArm64Platform } from './arm64-platform.js';
import { addressBits, type Board, configuredTopology, writeGeneration } from './board.js';
import type { Arm64BoardState } from './board-state.js';
import type { MemoryFiles } from '../host/memory-file.js';
import { numaNodes, type PlacedFunction, segmentsOf } from './numa.js';
import { MachineError } from '../machine/machine-error.js';
import { plugsDimms, sizesOf } from '../memory/hotplug.js';
import { layoutMemory, type MemoryLayout } from '../memory/memory-layout.js';

/** The guest's 64-bit PCI window starts on a multiple of this. Bytes. */
const MMIO64_ALIGNMENT = 2 ** 30;

/** The kernel takes the devicetree unless its command line says otherwise (Documentation/admin-guide/kernel-parameters.txt). */
const ACPI_WANTED = /(^|\s)acpi=(on|force)(\s|$)/;
/** Room for the EFI tables, before the ACPI tables. Bytes. */
const EFI_MAX = 0x1000;

export class Arm64Board implements Board {
  readonly vm: Arm64Vm;
  readonly memory: MemoryLayout;
  readonly segments: readonly SegmentWindows[];
  readonly intx: IntxHandle;
  readonly #ipaBits: number;
  /** Where the generation ID is. */
  #generation: number | undefined;
  #vcpus: Arm64Vcpu[] = [];

  /**
   * @param files that memory zones are in
   * @param saved the state of another, from which it goes on
   * @throws MachineError when the processor cannot address what is asked for; HypervisorError, SystemError
   */
  constructor(
    hypervisor: Arm64Hypervisor,
    private readonly config: VmConfig,
    private readonly files: MemoryFiles = new Map(),
    private readonly saved?: Arm64BoardState,
  ) {
    this.#generation = saved?.generation;
    const { cpus, memory } = config;
    const ipaBits = addressBits(Math.min(hypervisor.ipaBits, cpus.max_phys_bits), saved);
    this.#ipaBits = ipaBits;
    if (cpus.max_vcpus > layout.MAX_VCPUS) {
      throw new MachineError(
        `--cpus max=${cpus.max_vcpus}: accepted are at most ${layout.MAX_VCPUS}, which the GIC has room for`,
      );
    }
    this.memory = arm64Memory(memory, files);
    const [low] = this.memory.ram;
    if (low.address !== layout.RAM_START || low.size < layout.KERNEL - layout.RAM_START + layout.KERNEL_ALIGNMENT) {
      throw new MachineError(`${sizesOf(memory)}: accepted is a size that holds the kernel, 6M at the least`);
    }
    if (!this.fits(memory)) {
      throw new MachineError(`${sizesOf(memory)}: more than a guest of ${ipaBits} physical address bits can have`);
    }
    const mmio64 = this.#mmio64(this.memory);
    const mmio32 = { start: layout.MMIO32_START, end: layout.MMIO32_END };
    this.segments = segmentsOf(config, layout.ECAM_START, layout.ECAM_SEGMENT_SIZE, { mmio32, mmio64 });
    const { distributor, redistributors, its } = layout.gicLayout(cpus.boot_vcpus);
    this.vm = hypervisor.createVm({ ipaBits, gic: { distributor, redistributors, its, spis: layout.SPIS } });
    this.intx = IntxLines.powerOn(layout.SPI_INTX, this.vm.signals);
  }

  fits(memory: MemoryConfig): boolean {
    const { start, end } = this.#mmio64(arm64Memory(memory, this.files));
    // Each segment's part is a multiple of 4 GiB.
    return end - start >= this.config.platform.num_pci_segments * 2 ** 32;
  }

  #mmio64({ end }: MemoryLayout): AddressWindow {
    return { start: Math.ceil(end / MMIO64_ALIGNMENT) * MMIO64_ALIGNMENT, end: 2 ** this.#ipaBits };
  }

  /** Whether the guest is told of memory by ACPI. */
  get #plugsDimms(): boolean {
    return plugsDimms(this.config.memory) && ACPI_WANTED.test(this.config.payload.cmdline ?? '');
  }

  createVcpus(): Arm64Vcpu[] {
    try {
      for (let id = 0; id < this.config.cpus.boot_vcpus; id++) this.#vcpus.push(this.vm.createVcpu(id, id > 0));
      this.vm.finishVcpus();
    } catch (error) {
      undoAll(
        error,
        this.#vcpus.map((vcpu) => () => vcpu.close()),
      );
    }
    return this.#vcpus;
  }

  core(vcpus: Iterable<number>): { machine: number; notes: Uint8Array[] } {
    const notes = [...vcpus].flatMap((id) => arm64CoreNotes(id, this.#vcpus[id].registers()));
    return { machine: EM_AARCH64, notes };
  }

  save(): Arm64BoardState {
    const vcpus = this.#vcpus.map((vcpu) => vcpu.save());
    return {
      architecture: 'aarch64',
      addressBits: this.#ipaBits,
      generation: this.#generation,
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

  createPlatform(virtio: readonly VirtioPciHandle[]): Arm64PlatformHandle {
    const { serial, pvpanic } = this.config;
    return createArm64Platform(this.vm, virtio, this.intx, {
      segments: this.segments,
      serial: serial.mode !== 'Off',
      pvpanic,
      memoryHotplug: this.#plugsDimms,
    });
  }

  boot(memory: GuestMemory, functions: readonly PlacedFunction[]): boolean {
    const numa = numaNodes(this.config, this.memory, functions);
    const { payload, serial, pvpanic } = this.config;
    const { kernel, initramfs, cmdline = '' } = payload;
    const { entry, initrd } = loadArm64Payload({ kernel, initramfs, cmdline }, memory);
    const devicetree = buildDevicetree({
      mpidrs: this.#vcpus.map((vcpu) => vcpu.mpidr()),
      topology: configuredTopology(this.config.cpus),
      ram: this.memory.ram,
      cmdline,
      initrd,
      seed: randomBytes(SEED_SIZE),
      serial: serial.mode !== 'Off',
      pvpanic,
      segments: this.segments,
      numa,
      efi: ACPI_WANTED.test(cmdline) ? this.#writeAcpi(memory, numa) : undefined,
    });
    memory.write(layout.FDT, devicetree);
    this.#generation = layout.GENERATION_ID;
    writeGeneration(memory, this.#generation);
    // The others wait for the first one to start them (PSCI CPU_ON).
    this.#vcpus[0].setBootState(BigInt(entry), BigInt(layout.FDT));
    // The hypervisor itself starts the others (PSCI), and their threads may come later.
    return false;
  }

  /** @returns where the kernel finds what leads to the tables */
  #writeAcpi(memory: GuestMemory, numa: readonly NumaNode[]): EfiPlace {
    const { serial, pvpanic } = this.config;
    const end = layout.ACPI + layout.ACPI_MAX;
    const mpidrs = this.#vcpus.map((vcpu) => vcpu.mpidr());
    const config = {
      mpidrs,
      serial: serial.mode !== 'Off',
      pvpanic,
      segments: this.segments,
      numa,
      pciHotplug: layout.PCI_HOTPLUG,
      memoryHotplug: this.#plugsDimms ? layout.MEMORY_HOTPLUG : undefined,
    };
    const { rsdp, tables } = buildArm64Acpi(config, layout.ACPI + EFI_MAX, end);
    for (const { address, bytes } of tables) memory.write(address, bytes);
    const reclaim = { address: layout.ACPI, size: layout.ACPI_MAX };
    const nvs = { address: layout.GENERATION_ID, size: layout.GENERATION_PAGE };
    const { place, bytes } = buildEfi(layout.ACPI, rsdp, this.memory.ram, reclaim, nvs);
    memory.write(layout.ACPI, bytes);
    return place;
  }
}

/** Where memory lies. @param files that zones are in */
export function arm64Memory(memory: MemoryConfig, files: MemoryFiles): MemoryLayout {
  return layoutMemory(zonesOf(memory), layout.RAM_WINDOWS, layout.HIGH_RAM_START, files);
}
