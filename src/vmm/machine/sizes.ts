/**
 * How many vCPUs and how much memory a machine has: what vm.resize changes. The configuration is what is changed last, so that a reset
 * finds as much as was asked for, whether or not the guest has let go of the rest.
 */
import { type MemoryZone, ramSize, zonesOf } from '../../config/memory-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { FIXED_NAMES } from '../devices/device-names.js';
import type { Logger } from '../log/logger.js';
import { dimmRefusal, type Dimms } from '../memory/dimms.js';
import { plugsDimms, resizeRefusal, ZONES_ALONE } from '../memory/hotplug.js';
import type { MachineLife } from './incarnation.js';
import { RequestError } from './machine-error.js';
import type { Resize } from './resize.js';

export class Sizes {
  /** Those that the guest has been asked to let go. */
  readonly #leavingVcpus = new Set<number>();
  /** By slot. */
  readonly #leavingDimms = new Set<number>();

  constructor(
    private readonly config: VmConfig,
    private readonly logger: Logger,
  ) {}

  /**
   * Changes a machine that runs. What the guest is asked for takes its time.
   *
   * @param life undefined: between a reset and the life after it
   * @throws RequestError when one of the sizes is not accepted, and nothing has changed then, or when what is to stay after all has
   * just been let go; MachineError, HypervisorError or SystemError, after as much as could be had
   */
  async change(wanted: Resize, life: MachineLife | undefined): Promise<void> {
    const { desired_vcpus: vcpus, desired_ram: ram, desired_balloon: balloon } = wanted;
    if (vcpus !== undefined) this.#checkVcpus(vcpus, life);
    if (ram !== undefined) this.#checkMemory(ram, life);
    this.#checkBalloon(wanted);
    if (ram !== undefined) await this.#resizeMemory(ram, life);
    if (vcpus !== undefined) await this.#resizeVcpus(vcpus, life);
    if (balloon !== undefined) this.#resizeBalloon(balloon, life);
  }

  /**
   * Has the guest plug memory of a zone, or unplug some, which takes its time.
   *
   * @param desired bytes that the zone is to have in all
   * @throws RequestError
   */
  changeZone(id: string, desired: number, life: MachineLife | undefined): void {
    const { memory } = this.config;
    const zone = zonesOf(memory).find((one) => one.id === id && !one.implicit);
    if (zone === undefined) throw new RequestError(`The machine has no memory zone ${id}`, 'unknown');
    const refusal = resizeRefusal(zone, desired);
    if (refusal !== undefined) throw new RequestError(refusal, 'invalid');
    const config = memory.zones!.find((one) => one.id === id)!;
    resizeDevice(config, zone, desired, life);
  }

  /** @throws RequestError */
  #checkVcpus(desired: number, life: MachineLife | undefined): void {
    const { max_vcpus: max, boot_vcpus: present } = this.config.cpus;
    if (desired > max) throw new RequestError(`desired_vcpus: accepted is a number from 1 to ${max}`, 'invalid');
    if (life === undefined || (desired === present && this.#leavingVcpus.size === 0)) return;
    if (!life.plugsVcpus) {
      const line = `desired_vcpus: accepted is ${present}: a guest of this architecture can be given no others while it runs`;
      throw new RequestError(line, 'invalid');
    }
    if (this.#leavingVcpus.size === 0) return;
    for (const vcpu of this.#leavingVcpus) life.askToUnplugVcpu(vcpu);
    throw new RequestError('The guest has been asked to let vCPUs go, and has not answered yet', 'busy');
  }

  async #resizeVcpus(desired: number, life: MachineLife | undefined): Promise<void> {
    const { cpus } = this.config;
    const present = cpus.boot_vcpus;
    if (desired === present) return;
    if (life !== undefined) {
      for (; cpus.boot_vcpus < desired; cpus.boot_vcpus++) await life.plugVcpu();
      const leaving = [...life.vcpus].sort((a, b) => b - a).slice(0, Math.max(present - desired, 0));
      for (const vcpu of leaving) {
        this.#leavingVcpus.add(vcpu);
        life.askToUnplugVcpu(vcpu);
      }
    }
    cpus.boot_vcpus = desired;
    this.logger.info(`${desired} vCPUs, of ${present} before`);
  }

  /** @throws RequestError */
  #checkMemory(desired: number, life: MachineLife | undefined): void {
    const { memory } = this.config;
    const [zone] = zonesOf(memory);
    if (!zone.implicit) throw new RequestError(ZONES_ALONE, 'invalid');
    const refusal = plugsDimms(memory) ? this.#dimmRefusal(desired, life) : resizeRefusal(zone, desired);
    if (refusal !== undefined) throw new RequestError(refusal, 'invalid');
  }

  #dimmRefusal(desired: number, life: MachineLife | undefined): string | undefined {
    const { memory } = this.config;
    // It may have heard of it too early.
    for (const slot of this.#leavingDimms) life?.dimms?.askToUnplug(slot);
    if (desired === memory.size) return undefined;
    if (life === undefined) throw new RequestError('The machine is being reset', 'busy');
    if (life.dimms === undefined) {
      return `desired_ram: accepted is ${memory.size}: a guest of the devicetree can be given no more while it runs, see acpi=force`;
    }
    if (this.#leavingDimms.size > 0) {
      if (desired === memory.size + this.#leavingSize(life.dimms)) return undefined;
      throw new RequestError('The guest has been asked to let memory go, and has not answered yet', 'busy');
    }
    if (!life.fits({ ...memory, size: desired })) {
      return 'desired_ram: accepted is a size that the guest can address, with hotplug_size more after its next reset';
    }
    return dimmRefusal(memory, life.dimms, desired);
  }

  async #resizeMemory(desired: number, life: MachineLife | undefined): Promise<void> {
    const { memory } = this.config;
    if (!plugsDimms(memory)) resizeDevice(memory, zonesOf(memory)[0], desired, life);
    else if (desired !== memory.size) await this.#resizeDimms(desired, life!.dimms!);
  }

  async #resizeDimms(desired: number, dimms: Dimms): Promise<void> {
    const { memory } = this.config;
    if (this.#leavingDimms.size > 0) {
      this.#keepDimms(dimms);
      return;
    }
    if (desired > memory.size) await dimms.plug(desired - memory.size);
    let left = memory.size;
    for (const { slot, part } of dimms.plugged.toReversed()) {
      if (left <= desired) break;
      left -= part.range.size;
      this.#leavingDimms.add(slot);
      dimms.askToUnplug(slot);
    }
    this.logger.info(`${desired} bytes of memory, of ${memory.size} before`);
    memory.size = desired;
  }

  /** Bytes that the guest has been asked to let go. */
  #leavingSize({ plugged }: Dimms): number {
    return plugged.reduce((sum, { slot, part }) => sum + (this.#leavingDimms.has(slot) ? part.range.size : 0), 0);
  }

  /** What the guest has not let go of is not asked for any more. @throws RequestError where it was quicker */
  #keepDimms(dimms: Dimms): void {
    const { memory } = this.config;
    for (const { slot, part } of dimms.plugged) {
      if (!this.#leavingDimms.has(slot) || !dimms.keep(slot)) continue;
      this.#leavingDimms.delete(slot);
      memory.size += part.range.size;
    }
    this.logger.info(`${memory.size} bytes of memory stay`);
    if (this.#leavingDimms.size > 0) throw new RequestError('The guest has let memory go meanwhile', 'busy');
  }

  /** @throws RequestError */
  #checkBalloon({ desired_ram: ram, desired_balloon: desired }: Resize): void {
    const { balloon, memory } = this.config;
    if (desired !== undefined && balloon === undefined) throw new RequestError('The machine has no balloon', 'unknown');
    const least = plugsDimms(memory) ? (ram ?? memory.size) : ramSize(memory);
    if (desired !== undefined && desired >= least) {
      throw new RequestError(`desired_balloon: accepted is less than ${least}`, 'invalid');
    }
    if (balloon !== undefined && (desired ?? balloon.size) >= least) {
      throw new RequestError(
        `desired_ram: accepted is more than the ${balloon.size} that the balloon holds`,
        'invalid',
      );
    }
  }

  /** Asks the guest for memory, or gives some back. */
  #resizeBalloon(size: number, life: MachineLife | undefined): void {
    const balloon = this.config.balloon!;
    balloon.size = size;
    life?.control(balloon.id ?? FIXED_NAMES.balloon, { kind: 'resize', size });
  }

  /** The guest has let a vCPU go. */
  async vcpuEjected(vcpu: number, life: MachineLife | undefined): Promise<void> {
    // Of an earlier life, if it is not asked for.
    if (life === undefined || !this.#leavingVcpus.delete(vcpu)) return;
    await life.unplugVcpu(vcpu);
    this.logger.info(`vCPU ${vcpu}: removed`);
  }

  /** The guest has let memory go. @throws MachineError when a thread does not */
  async memoryEjected(slot: number, life: MachineLife | undefined): Promise<void> {
    if (life?.dimms === undefined || !this.#leavingDimms.delete(slot)) return;
    await life.dimms.unplug(slot);
    this.logger.info(`Memory slot ${slot}: removed, ${life.memorySize} bytes are left`);
  }

  /** The machine is to run again: it has what was asked for. */
  restart(): void {
    this.#leavingVcpus.clear();
    this.#leavingDimms.clear();
  }

  /** The guest had been asked for these before. */
  goOn(vcpus: readonly number[], dimms: readonly number[]): void {
    for (const vcpu of vcpus) this.#leavingVcpus.add(vcpu);
    for (const slot of dimms) this.#leavingDimms.add(slot);
  }
}

/**
 * Asks a device of the guest to plug memory, or to unplug some.
 *
 * @param config of the zone, where a reset looks
 */
function resizeDevice(
  config: { hotplugged_size?: number | undefined },
  zone: MemoryZone,
  desired: number,
  life: MachineLife | undefined,
): void {
  // What changes nothing is accepted of a machine that can plug none, too.
  if (zone.hotplug_size === undefined) return;
  const size = desired - zone.size;
  config.hotplugged_size = size === 0 ? undefined : size;
  life?.control(zone.id, { kind: 'resize', size });
}
