/**
 * I/O APIC (Intel 82093AA data sheet), for hypervisors that have none of their own.
 *
 * Modelled: the register pair, 24 redirection entries, masking, levels. There are two kinds of pins. Most are _events_: each
 * unmasked entry is given to the hypervisor as the message that its pin sends from then on, once for each event, whatever its
 * trigger mode. Others are held high and low (`setLevel`): where the entry is level-triggered, a high pin sends its message, sets
 * remote IRR, and sends again when the interrupt has ended and it is still high; else its rise is an edge. An edge at a masked
 * pin is lost, as in the chip. Not modelled: polarity (high is always active, as KVM has it), arbitration, ExtINT.
 */
import type { LevelInputs, VmSignals } from '../hypervisor/hypervisor.js';
import { type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import type { AccessSize, BusDevice } from './bus.js';

export const IOAPIC_SIZE = 0x1000;
const PINS = 24;

const IOREGSEL = 0x00;
const IOWIN = 0x10;

const REGISTER_ID = 0;
const REGISTER_VERSION = 1;
const REGISTER_ARBITRATION = 2;
const REGISTER_ENTRIES = 0x10;

/** Version 0x11: no EOI register; local APICs tell the end of interrupts. Bits 23 to 16: the last entry. */
const VERSION = 0x11 | ((PINS - 1) << 16);
const ID_BITS = 0x0f00_0000;

/** Low half of a redirection entry: vector, delivery mode, destination mode; what is not here reads as zero. */
const ENTRY_WRITABLE = 0x1_afff;
const ENTRY_REMOTE_IRR = 1 << 14;
const ENTRY_LEVEL = 1 << 15;
const ENTRY_MASKED = 1 << 16;
const ENTRY_VECTOR = 0xff;
const DESTINATION_BITS = 0xff00_0000;

/** Intel SDM volume 3, 11.11: the message that a redirection entry stands for. */
const MSI_ADDRESS = 0xfee0_0000;
const MSI_LOGICAL = 1 << 2;
const ENTRY_LOGICAL = 1 << 11;
/** Vector and delivery mode are at the same place in both. */
const MSI_DATA_BITS = 0x7ff;
const MSI_ASSERT = 1 << 14;
const MSI_LEVEL = 1 << 15;

export const ioapicLayout = stateLayout('ioapic', 2, {
  select: upTo(0xff),
  id: upTo(ID_BITS),
  /** Low and high half of each redirection entry. */
  entries: upTo([ENTRY_WRITABLE | ENTRY_REMOTE_IRR, DESTINATION_BITS], PINS * 2),
  /** The pins that are held high, a bit each. */
  high: upTo(2 ** PINS - 1),
});
const at = ioapicLayout.at;

export class Ioapic implements BusDevice, LevelInputs {
  constructor(
    private readonly state: StateBlock<keyof typeof at>,
    private readonly signals: Pick<VmSignals, 'setMsiRoute' | 'clearMsiRoute' | 'signalMsi'>,
  ) {}

  powerOn(): void {
    const { words } = this.state;
    for (let pin = 0; pin < PINS; pin++) words[at.entries + pin * 2] = ENTRY_MASKED;
  }

  /** Its state has been loaded: the hypervisor gets to know each pin's message. */
  restored(): void {
    for (let pin = 0; pin < PINS; pin++) this.#route(pin);
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
      if ((entry & 1) === 0) words[at.entries + entry] = (value & ENTRY_WRITABLE) | this.#keptIrr(entry, value);
      else words[at.entries + entry] = value & DESTINATION_BITS;
      this.#route(entry >> 1);
      this.#deliverLevel(entry >> 1);
    } finally {
      state.unlock();
    }
  }

  /** Remote IRR outlives every write but one that makes the entry edge-triggered: guests clear it by that. */
  #keptIrr(entry: number, value: number): number {
    return (value & ENTRY_LEVEL) !== 0 ? this.state.words[at.entries + entry] & ENTRY_REMOTE_IRR : 0;
  }

  #route(pin: number): void {
    const low = this.state.words[at.entries + pin * 2];
    if ((low & ENTRY_MASKED) !== 0) this.signals.clearMsiRoute(pin);
    else this.signals.setMsiRoute(pin, this.#messageAddress(pin), 0, low & MSI_DATA_BITS, 0);
  }

  #messageAddress(pin: number): number {
    const { words } = this.state;
    const destination = words[at.entries + pin * 2 + 1] >>> 24;
    const logical = (words[at.entries + pin * 2] & ENTRY_LOGICAL) !== 0;
    return (MSI_ADDRESS | (destination << 12) | (logical ? MSI_LOGICAL : 0)) >>> 0;
  }

  setLevel(pin: number, high: boolean): void {
    const { state } = this;
    const { words } = state;
    state.lock();
    const rises = high && (words[at.high] & (1 << pin)) === 0;
    words[at.high] = high ? words[at.high] | (1 << pin) : words[at.high] & ~(1 << pin);
    const entry = words[at.entries + pin * 2];
    if ((entry & ENTRY_LEVEL) !== 0) this.#deliverLevel(pin);
    else if (rises && (entry & ENTRY_MASKED) === 0) this.#send(pin, entry & MSI_DATA_BITS);
    state.unlock();
  }

  /** An interrupt of this vector has ended at a local APIC, which tells it of level-triggered ones. Any thread. */
  endOfInterrupt(vector: number): void {
    const { state } = this;
    const { words } = state;
    state.lock();
    for (let pin = 0; pin < PINS; pin++) {
      const entry = words[at.entries + pin * 2];
      if ((entry & ENTRY_REMOTE_IRR) === 0 || (entry & ENTRY_VECTOR) !== vector) continue;
      words[at.entries + pin * 2] = entry & ~ENTRY_REMOTE_IRR;
      this.#deliverLevel(pin);
    }
    state.unlock();
  }

  /** Sends what a level-triggered entry has to send. The lock is held, so that messages and remote IRR stay in step. */
  #deliverLevel(pin: number): void {
    const { words } = this.state;
    const entry = words[at.entries + pin * 2];
    const ready = (entry & (ENTRY_LEVEL | ENTRY_MASKED | ENTRY_REMOTE_IRR)) === ENTRY_LEVEL;
    if (!ready || (words[at.high] & (1 << pin)) === 0) return;
    words[at.entries + pin * 2] = entry | ENTRY_REMOTE_IRR;
    this.#send(pin, (entry & MSI_DATA_BITS) | MSI_LEVEL | MSI_ASSERT);
  }

  #send(pin: number, data: number): void {
    this.signals.signalMsi(this.#messageAddress(pin), 0, data, 0);
  }
}
