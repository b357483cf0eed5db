/**
 * The CPU hotplug controller: registers by which the guest learns which vCPUs came and which shall be let go, and by which it lets
 * them go. They are Cloud Hypervisor's. The DSDT's PRES uses them (src/arch/acpi/cpu-hotplug.ts), after an event of the GED.
 *
 *     0  selected vCPU, 32 bits
 *     4  its status, 8 bits: hotplug-status.ts
 *     8  data of commands, 32 bits; there are no commands, and it reads 0
 *
 * They take no other access. A number that no vCPU has can be selected; its status is 0.
 */
import { type StateLayout, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler } from './bus.js';
import { HotplugStatus, MOST_STATUS } from './hotplug-status.js';

/** @param vcpus that can ever be there */
export function cpuHotplugLayout(vcpus: number): StateLayout<'selected' | 'status'> {
  return stateLayout('acpi-cpu-hotplug', 1, { selected: 1, status: upTo(MOST_STATUS, vcpus) });
}

const SELECTED = 0;
const STATUS = 4;
const DATA = 8;

export class CpuHotplug extends HotplugStatus implements BusDevice {
  /** A vCPU came. */
  plug(vcpu: number): void {
    this.insert(vcpu);
  }

  read(offset: number, size: AccessSize): number {
    if (offset === STATUS && size === 1) return this.readStatus();
    if (offset === SELECTED && size === 4) return this.state.words[this.state.layout.at.selected] >>> 0;
    return offset === DATA && size === 4 ? 0 : filler(size);
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (offset === STATUS && size === 1) this.writeStatus(value);
    else if (offset === SELECTED && size === 4) this.select(value);
  }
}
