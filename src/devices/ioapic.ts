/**
 * I/O APIC (Intel 82093AA data sheet), for hypervisors that have none of their own.
 *
 * Modelled: the register pair, 24 redirection entries, masking; each unmasked entry is given to the hypervisor as the message
 * that its pin sends from then on. Interrupt lines here are events, edges by nature, so a level-triggered entry delivers each
 * of them once as well: there is no remote IRR to clear and nothing to do at an end of interrupt. An edge at a masked pin is
 * lost, as in the chip. Not modelled: polarity, arbitration, ExtINT.
 */
import type { VmSignals } from '../hypervisor/hypervisor.js';
import { type StateBlock, stateLayout } from '../state/state-block.js';
import type { AccessSize, BusDevice } from './bus.js';

export const IOAPIC_SIZE = 0x1000;
const PINS = 24;

const IOREGSEL = 0x00;
const IOWIN = 0x10;

const REGISTER_ID = 0;
const REGISTER_VERSION = 1;
const REGISTER_ARBITRATION = 2;
const REGISTER_ENTRIES = 0x10;

/** Version 0x11: no EOI register, which level-triggered entries alone would need. Bits 23 to 16: the last entry. */
const VERSION = 0x11 | ((PINS - 1) << 16);
const ID_BITS = 0x0f00_0000;

/** Low half of a redirection entry: vector, delivery mode, destination mode; what is not here reads as zero. */
const ENTRY_WRITABLE = 0x1_afff;
const ENTRY_MASKED = 1 << 16;
const DESTINATION_BITS = 0xff00_0000;

/** Intel SDM volume 3, 11.11: the message that a redirection entry stands for. */
const MSI_ADDRESS = 0xfee0_0000;
const MSI_LOGICAL = 1 << 2;
const ENTRY_LOGICAL = 1 << 11;
/** Vector and delivery mode are at the same place in both. */
const MSI_DATA_BITS = 0x7ff;

export const ioapicLayout = stateLayout('ioapic', 1, {
  select: 1,
  id: 1,
  /** Low and high half of each redirection entry. */
  entries: PINS * 2,
});
const at = ioapicLayout.at;

export class Ioapic implements BusDevice {
  constructor(
    private readonly state: StateBlock<keyof typeof at>,
    private readonly signals: Pick<VmSignals, 'setMsiRoute' | 'clearMsiRoute'>,
  ) {}

  powerOn(): void {
    const { words } = this.state;
    for (let pin = 0; pin < PINS; pin++) words[at.entries + pin * 2] = ENTRY_MASKED;
  }

  read(offset: number, size: AccessSize): number {
    if (size !== 4) return 0;
    const { words } = this.state;
    if (offset === IOREGSEL) return words[at.select];
    return offset === IOWIN ? this.#register(words[at.select]) : 0;
  }

  #register(index: number): number {
    const { words } = this.state;
    if (index === REGISTER_ID || index === REGISTER_ARBITRATION) return words[at.id];
    if (index === REGISTER_VERSION) return VERSION;
    const entry = index - REGISTER_ENTRIES;
    return entry >= 0 && entry < PINS * 2 ? words[at.entries + entry] >>> 0 : 0;
  }

  write(offset: number, size: AccessSize, value: number): void {
    const { state } = this;
    const { words } = state;
    if (offset === IOREGSEL) {
      words[at.select] = value & 0xff;
      return;
    }
    if (offset !== IOWIN || size !== 4) return;
    const index = words[at.select];
    if (index === REGISTER_ID) words[at.id] = value & ID_BITS;
    const entry = index - REGISTER_ENTRIES;
    if (entry < 0 || entry >= PINS * 2) return;
    // Two vCPUs may write one entry's halves: what the hypervisor is told is what stands here at last.
    state.lock();
    try {
      const bits = (entry & 1) === 0 ? ENTRY_WRITABLE : DESTINATION_BITS;
      words[at.entries + entry] = value & bits;
      this.#route(entry >> 1);
    } finally {
      state.unlock();
    }
  }

  #route(pin: number): void {
    const { words } = this.state;
    const low = words[at.entries + pin * 2];
    const high = words[at.entries + pin * 2 + 1];
    if ((low & ENTRY_MASKED) !== 0) {
      this.signals.clearMsiRoute(pin);
      return;
    }
    const address = MSI_ADDRESS | ((high >>> 24) << 12) | ((low & ENTRY_LOGICAL) !== 0 ? MSI_LOGICAL : 0);
    this.signals.setMsiRoute(pin, address >>> 0, 0, low & MSI_DATA_BITS, 0);
  }
}
