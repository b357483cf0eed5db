/**
 * PCI configuration: segments of 32 single-function devices, reached through ECAM and, segment 0, through the ports
 * (PCI Local Bus 3.0, 3.2.2.3.2 and 6.1; PCI Express Base 5.0, 7.2.2).
 */
import { type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler } from '../devices/bus.js';

export const SLOTS = 32;

/** A device's configuration space, by aligned 32-bit registers. */
export interface PciDevice {
  /** @param register byte offset, a multiple of 4, below 4096 */
  readConfig(register: number): number;
  /** @param mask the bytes that are written, as ones */
  writeConfig(register: number, value: number, mask: number): void;
}

/** The host bridge: type 0 header, no BARs, nothing that can be written. */
export class HostBridge implements PciDevice {
  readConfig(register: number): number {
    switch (register) {
      case 0x00:
        return (0x0d57 << 16) | 0x8086;
      case 0x08:
        return 0x0600_0000; // class 06, host bridge
      default:
        return 0;
    }
  }

  writeConfig(): void {
    // read-only
  }
}

export class PciSegment {
  readonly #slots: (PciDevice | undefined)[] = new Array<undefined>(SLOTS).fill(undefined);

  insert(slot: number, device: PciDevice): void {
    this.#slots[slot] = device;
  }

  remove(slot: number): void {
    this.#slots[slot] = undefined;
  }

  /** @param address ECAM offset in the bus: device, function, register */
  read(address: number, size: AccessSize): number {
    const device = this.#device(address);
    if (device === undefined || (address & 3) + size > 4) return filler(size);
    const value = device.readConfig(address & 0xffc) >>> ((address & 3) * 8);
    return (value & filler(size)) >>> 0;
  }

  write(address: number, size: AccessSize, value: number): void {
    const device = this.#device(address);
    if (device === undefined || (address & 3) + size > 4) return;
    const shift = (address & 3) * 8;
    device.writeConfig(address & 0xffc, (value << shift) >>> 0, (filler(size) << shift) >>> 0);
  }

  /** Functions other than 0 do not exist. */
  #device(address: number): PciDevice | undefined {
    return ((address >> 12) & 7) === 0 ? this.#slots[(address >> 15) & 31] : undefined;
  }
}

/** Configuration space of one bus: 32 devices of 8 functions, 4 KiB each (PCI Express base specification, 7.2.2). Bytes. */
export const ECAM_BUS_SIZE = 0x10_0000;

/** One bus of a segment as memory. */
export class PciEcam implements BusDevice {
  constructor(private readonly segment: PciSegment) {}

  read(offset: number, size: AccessSize): number {
    return this.segment.read(offset, size);
  }

  write(offset: number, size: AccessSize, value: number): void {
    this.segment.write(offset, size, value);
  }
}

export const pciPortsLayout = stateLayout('pci-config-ports', 2, { address: 1, resetControl: upTo(0xff) });
export const PCI_CONFIG_PORTS = 8;

const ENABLE = 0x8000_0000;
const DATA = 4;
const RESET_CONTROL = 1;
/** SYS_RST and FULL_RST say which kind of reset it is to be, and are kept; RST_CPU does it, and reads as zero. */
const RESET_KIND = 0x0a;
const RST_CPU = 0x04;

/**
 * Ports 0xcf8 (address) and 0xcfc (data); between them, as a byte, the reset control register 0xcf9 of Intel's chipsets (ICH9 data
 * sheet, 13.7.5). Any kind of reset is one of the whole machine here.
 */
export class PciConfigPorts implements BusDevice {
  constructor(
    private readonly state: StateBlock<keyof typeof pciPortsLayout.at>,
    private readonly segment: PciSegment,
    private readonly reset: () => void,
  ) {}

  read(offset: number, size: AccessSize): number {
    if (offset < DATA) return this.#readControl(offset, size);
    const target = this.#target(offset);
    return target === undefined ? filler(size) : this.segment.read(target, size);
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (offset < DATA) {
      this.#writeControl(offset, size, value);
      return;
    }
    const target = this.#target(offset);
    if (target !== undefined) this.segment.write(target, size, value);
  }

  #readControl(offset: number, size: AccessSize): number {
    if (offset === 0 && size === 4) return this.#address();
    return offset === RESET_CONTROL && size === 1 ? this.state.words[pciPortsLayout.at.resetControl] : filler(size);
  }

  #writeControl(offset: number, size: AccessSize, value: number): void {
    const { words } = this.state;
    if (offset === 0 && size === 4) words[pciPortsLayout.at.address] = value;
    if (offset !== RESET_CONTROL || size !== 1) return;
    words[pciPortsLayout.at.resetControl] = value & RESET_KIND;
    if ((value & RST_CPU) !== 0) this.reset();
  }

  #address(): number {
    return this.state.words[pciPortsLayout.at.address] >>> 0;
  }

  /** The ECAM offset that the address register and the data port's byte name; undefined: disabled or another bus. */
  #target(offset: number): number | undefined {
    const address = this.#address();
    if (address < ENABLE || ((address >> 16) & 0xff) !== 0) return undefined;
    return ((address & 0xff00) << 4) | (address & 0xfc) | (offset - DATA);
  }
}
