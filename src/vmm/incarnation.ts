/** One life of a machine, from power-on to its next reset or its end: everything that a guest can touch. */
import { buildAcpiTables } from '../arch/x86_64/acpi/tables.js';
import { BOOT_FPU, bootRegisters, bootSpecialRegisters } from '../arch/x86_64/boot/entry.js';
import { loadPayload } from '../arch/x86_64/boot/load.js';
import { buildCpuid } from '../arch/x86_64/cpuid.js';
import * as layout from '../arch/x86_64/layout.js';
import { buildMpTable } from '../arch/x86_64/mptable.js';
import { initialMsrs } from '../arch/x86_64/msrs.js';
import { RESET_CODE } from '../arch/x86_64/reset-vector.js';
import { buildSmbios } from '../arch/x86_64/smbios.js';
import { apicId, defaultTopology, MAX_APIC_ID, type Topology } from '../arch/x86_64/topology.js';
import type { VmConfig } from '../config/vm-config.js';
import { GedEvent } from '../devices/ged.js';
import type { Vcpu, Vm } from '../hypervisor/hypervisor.js';
import type { CpuidEntry } from '../hypervisor/x86-state.js';
import { divideSegments, type SegmentWindows } from '../pci/segments.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { type DeviceCounters, DeviceManager } from './device-manager.js';
import { CpuManager, type CpuManagerEvents } from './cpu-manager.js';
import { MachineError } from './machine-error.js';
import type { MachineParts } from './machine-parts.js';
import { MemoryManager } from './memory-manager.js';
import { attachPlatform, createPlatform, type Platform, type PlatformHandle } from './platform.js';
import type { HostResources } from './host-resources.js';
import { type IoEvents, IoManager } from './io-manager.js';
import type { SerialBackend } from './serial-backend.js';
import { type BytePort, SerialPump } from './serial-pump.js';

/** The guest's 64-bit PCI window starts on a multiple of this. Bytes. */
const MMIO64_ALIGNMENT = 128 * 2 ** 20;

export class Incarnation {
  readonly serial?: SerialPump;
  readonly console?: SerialPump;
  readonly #memory: MemoryManager;
  readonly #vm: Vm;
  readonly #devices: DeviceManager;
  readonly #io: IoManager;
  readonly #cpus: CpuManager;
  readonly #handle: PlatformHandle;
  readonly #platform: Platform;

  /** @throws MachineError, BootError, HypervisorError or SystemError; nothing is left behind then */
  constructor(
    private readonly parts: MachineParts,
    resources: HostResources,
    backends: Backends,
    events: CpuManagerEvents,
    io: IoEvents,
  ) {
    const { kernel, hypervisor, config } = parts;
    const supported = hypervisor.supportedCpuid();
    const physicalBits = Math.min(hostPhysicalBits(supported), config.cpus.max_phys_bits);
    const topology = vcpuTopology(config);
    const undo: (() => void)[] = [];
    try {
      checkVcpuCount(config, hypervisor.maxVcpus);
      this.#memory = new MemoryManager(kernel, config.memory, physicalBits);
      undo.push(() => this.#memory.close());
      this.#vm = hypervisor.createVm({ tssAddress: layout.KVM_TSS, identityMapAddress: layout.KVM_IDENTITY_MAP });
      undo.push(() => this.#vm.close());
      this.#memory.attach(this.#vm);

      const ranges = this.#memory.memory.ranges();
      const { ged: gedAddress, start: mmio64End } = layout.platformArea(physicalBits);
      const { serial, pvpanic } = config;
      const segments = this.#segments(mmio64End);
      this.#devices = new DeviceManager(kernel, this.#vm, {
        hypervisor: hypervisor.name,
        config,
        resources,
        segments,
        memory: this.#memory.handle(),
        memorySlot: this.#memory.slots,
      });
      undo.push(() => this.#devices.close());
      this.#io = new IoManager(kernel, this.#devices.plan, parts.ioWorker, io);
      this.#handle = createPlatform(this.#vm, this.#devices.handles, {
        segments,
        serial: serial.mode !== 'Off',
        pvpanic,
        gedAddress,
        lowRam: ranges[0].size,
        highRam: ranges[1]?.size ?? 0,
      });
      this.#platform = attachPlatform(this.#handle, kernel, this.#vm.signals, events.onEvent.bind(events));
      if (this.#platform.serial !== undefined) this.serial = new SerialPump(this.#platform.serial, backends.serial);
      const port = this.#devices.console;
      if (port !== undefined) this.console = new SerialPump(consolePort(port, kernel), backends.console);

      const rsdp = this.#writeTables(topology, physicalBits, segments);
      const { kernel: image, initramfs, cmdline = '' } = config.payload;
      const entry = loadPayload({ kernel: image, initramfs, cmdline, rsdp }, this.#memory.memory);

      const vcpus: Vcpu[] = [];
      undo.push(() => vcpus.forEach((vcpu) => vcpu.close()));
      const tscKhz = this.#vm.tscKhz();
      for (let id = 0; id < config.cpus.boot_vcpus; id++) {
        const vcpu = this.#vm.createVcpu(apicId(id, topology));
        vcpus.push(vcpu);
        vcpu.setCpuid(buildCpuid({ supported, vcpu: id, topology, physicalBits, tscKhz }));
        vcpu.setMsrs(initialMsrs());
        vcpu.setFpu(BOOT_FPU);
        vcpu.setLocalInterrupts();
      }
      // The others wait for the first one to start them (INIT, SIPI).
      const boot = vcpus[0];
      boot.setSpecialRegisters(bootSpecialRegisters(entry, boot.specialRegisters()));
      boot.setRegisters(bootRegisters(entry));
      this.#cpus = new CpuManager(hypervisor.name, vcpus, parts.vcpuWorker, events);
    } catch (error) {
      for (const step of undo.reverse()) step();
      throw error;
    }
  }

  start(): void {
    const affinity = new Map((this.parts.config.cpus.affinity ?? []).map((entry) => [entry.vcpu, entry.host_cpus]));
    this.#io.start();
    this.#cpus.start(this.#handle, affinity);
  }

  powerButton(): void {
    this.#platform.ged.notify(GedEvent.PowerButton);
  }

  /** Tells a device's workers something. */
  control(device: string, message: unknown): void {
    this.#io.control(device, message);
  }

  /** What the queues of each device have done so far. */
  deviceCounters(): DeviceCounters[] {
    return this.#devices.counters();
  }

  /** Exits of all vCPUs so far, by kind. */
  exits(): Record<string, number> {
    return this.#cpus.exits();
  }

  /** Stops the vCPUs and takes everything down. */
  async close(): Promise<void> {
    await this.#cpus.stop();
    await this.#io.stop();
    this.serial?.close();
    this.console?.close();
    const pointers = this.#cpus.instructionPointers().map((rip) => `0x${rip.toString(16)}`);
    this.parts.logger.debug(`vCPUs stopped at RIP ${pointers.join(', ')}`);
    this.#cpus.close();
    this.#vm.close();
    this.#devices.close();
    this.#memory.close();
  }

  #segments(mmio64End: number): SegmentWindows[] {
    const last = this.#memory.memory.ranges().at(-1)!;
    const ramEnd = Math.max(last.address + last.size, layout.HIGH_RAM_START);
    const mmio64 = { start: Math.ceil(ramEnd / MMIO64_ALIGNMENT) * MMIO64_ALIGNMENT, end: mmio64End };
    const mmio32 = { start: layout.MMIO32_START, end: layout.MMIO32_END };
    const { num_pci_segments: count } = this.parts.config.platform;
    return divideSegments(count, layout.ECAM_START, layout.ECAM_SEGMENT_SIZE, mmio32, mmio64);
  }

  /** @returns the RSDP's address */
  #writeTables(topology: Topology, physicalBits: number, segments: readonly SegmentWindows[]): number {
    const { config } = this.parts;
    const { memory } = this.#memory;
    const apicIds = Array.from({ length: config.cpus.max_vcpus }, (_, id) => apicId(id, topology));
    const acpi = buildAcpiTables({
      apicIds,
      bootVcpus: config.cpus.boot_vcpus,
      pciSegments: segments,
      gedAddress: layout.platformArea(physicalBits).ged,
      pvpanic: config.pvpanic,
    });
    for (const { address, bytes } of acpi.tables) memory.write(address, bytes);
    const smbios = buildSmbios({ memorySize: config.memory.size, vcpus: config.cpus.boot_vcpus });
    memory.write(layout.SMBIOS, smbios);
    const mpTable = Math.ceil((layout.SMBIOS + smbios.length) / 16) * 16;
    memory.write(mpTable, buildMpTable({ apicIds: apicIds.slice(0, config.cpus.boot_vcpus), address: mpTable }));
    memory.write(layout.RESET_VECTOR, RESET_CODE);
    return acpi.rsdp;
  }
}

/** Host ends of the character devices; none: output is dropped. */
export interface Backends {
  readonly serial: SerialBackend | undefined;
  readonly console: SerialBackend | undefined;
}

/** The console device's rings as main's pump uses them; its worker is woken for what it may go on with. */
function consolePort({ pipe, wake }: NonNullable<DeviceManager['console']>, kernel: HostKernel): BytePort {
  return {
    drainTransmit: (into) => {
      const count = pipe.output.read(into, 0, into.length);
      if (count > 0) kernel.signal(wake);
      return count;
    },
    receive: (bytes) => {
      const count = pipe.input.write(bytes, 0, bytes.length);
      if (count > 0) kernel.signal(wake);
      return count;
    },
  };
}

/** CPUID 0x8000_0008 EAX bits 7 to 0: physical address bits. */
function hostPhysicalBits(cpuid: readonly CpuidEntry[]): number {
  const leaf = cpuid.find((entry) => entry.function === 0x8000_0008);
  return leaf === undefined ? 36 : leaf.eax & 0xff;
}

function vcpuTopology({ cpus }: VmConfig): Topology {
  const { topology, max_vcpus: max } = cpus;
  if (topology === undefined) return defaultTopology(max);
  const shape = {
    threadsPerCore: topology.threads_per_core,
    coresPerDie: topology.cores_per_die,
    diesPerPackage: topology.dies_per_package,
    packages: topology.packages,
  };
  if (apicId(max - 1, shape) > MAX_APIC_ID) {
    throw new MachineError(`--cpus topology: accepted is one whose APIC ids end at ${MAX_APIC_ID} or below`);
  }
  return shape;
}

function checkVcpuCount({ cpus }: VmConfig, max: number): void {
  if (cpus.max_vcpus > max)
    throw new MachineError(`--cpus max=${cpus.max_vcpus}: this host's hypervisor accepts at most ${max}`);
}
