/**
 * 16550A serial port (National Semiconductor PC16550D data sheet, section 8).
 *
 * Modelled: all registers, FIFO mode and 16450 mode, receive trigger levels, loopback, interrupt priorities, an interrupt
 * output that pulses an edge. Not modelled: line speed (a byte is sent and received at once), parity and framing errors,
 * break, and OUT2 as a gate of the interrupt. Modem inputs are constantly those of a connected line.
 *
 * The receive FIFO is deeper than the chip's 16 bytes, which no driver can tell; what does not fit waits with the sender.
 * Sent bytes wait in a ring for main; while it has no room for another FIFO's worth, which a driver may send without looking
 * again, the transmitter is not empty, so a stuck host slows the guest down instead of blocking its vCPU.
 */
import { ByteRing } from '../state/byte-ring.js';
import { hostOnly, type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler, type InterruptLine } from './bus.js';

const RX_SIZE = 256;
const TX_SIZE = 4096;
/** What a driver sends at most for one THR empty. */
const FIFO_DEPTH = 16;

export const serialLayout = stateLayout('serial-16550', 1, {
  ier: upTo(0xff),
  fcr: upTo(0xff),
  lcr: upTo(0xff),
  mcr: upTo(0xff),
  scr: upTo(0xff),
  dll: upTo(0xff),
  dlm: upTo(0xff),
  overrun: upTo(1),
  /** Delta bits of the modem status, which loopback alone can set. */
  modemDelta: upTo(0xf),
  /** The THR empty interrupt: set when the register becomes empty, cleared by reading IIR. */
  thrEmpty: upTo(1),
  /** Interrupt causes at the last look, to find new ones. */
  causes: hostOnly(),
  /** The sender was told that there is no room. */
  starved: hostOnly(),
  rxHead: upTo(RX_SIZE - 1),
  rxCount: upTo(RX_SIZE),
  txHead: upTo(TX_SIZE - 1),
  txCount: upTo(TX_SIZE),
  rx: RX_SIZE / 4,
  tx: TX_SIZE / 4,
});

const at = serialLayout.at;

/** Register offsets; the first two are the divisor latch while LCR's DLAB is set. */
const RBR_THR = 0;
const IER = 1;
const IIR_FCR = 2;
const LCR = 3;
const MCR = 4;
const LSR = 5;
const MSR = 6;
const SCR = 7;

const LCR_DLAB = 0x80;
const FCR_ENABLE = 0x01;
const FCR_CLEAR_RX = 0x02;
const MCR_LOOPBACK = 0x10;
const LSR_DATA_READY = 0x01;
const LSR_OVERRUN = 0x02;
const LSR_THR_EMPTY = 0x20;
const LSR_TRANSMITTER_EMPTY = 0x40;
/** CTS, DSR and DCD: somebody is connected. */
const MSR_CONNECTED = 0xb0;

/** Interrupt causes as bits of IER. */
const CAUSE_RX = 0x01;
const CAUSE_TX = 0x02;
const CAUSE_LINE = 0x04;
const CAUSE_MODEM = 0x08;

const IIR_NONE = 0x01;
const IIR_FIFOS = 0xc0;
const TRIGGER = [1, 4, 8, 14];

/** What the port tells main about; both are called on the thread that touched the device, without its lock. */
export interface SerialDoorbell {
  /** The first byte after none is in the transmit ring. */
  output(): void;
  /** Input that `receive` refused would find room now. */
  room(): void;
}

export class Serial16550 implements BusDevice {
  readonly #words: Int32Array;
  readonly #rx: ByteRing;
  readonly #tx: ByteRing;

  constructor(
    private readonly state: StateBlock,
    private readonly line: InterruptLine,
    private readonly doorbell: SerialDoorbell,
  ) {
    this.#words = state.words;
    this.#rx = new ByteRing(state.words, { head: at.rxHead, count: at.rxCount, bytes: at.rx }, RX_SIZE);
    this.#tx = new ByteRing(state.words, { head: at.txHead, count: at.txCount, bytes: at.tx }, TX_SIZE);
  }

  read(offset: number, size: AccessSize): number {
    if (size !== 1) return filler(size);
    this.state.lock();
    const value = this.#readRegister(offset);
    const raise = this.#newCause();
    const room = this.#newRoom();
    this.state.unlock();
    if (raise) this.line.raise();
    if (room) this.doorbell.room();
    return value;
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (size !== 1) return;
    this.state.lock();
    const before = this.#tx.length;
    this.#writeRegister(offset, value);
    const raise = this.#newCause();
    const output = before === 0 && this.#tx.length !== 0;
    const room = this.#newRoom();
    this.state.unlock();
    if (raise) this.line.raise();
    if (output) this.doorbell.output();
    if (room) this.doorbell.room();
  }

  /** Takes input. @returns how many of the bytes found room; `room` rings when the rest may be tried again */
  receive(bytes: Uint8Array): number {
    const words = this.#words;
    this.state.lock();
    const count = Math.min(bytes.length, this.#rx.room);
    for (let index = 0; index < count; index++) this.#rx.push(bytes[index]);
    if (count < bytes.length) words[at.starved] = 1;
    const raise = this.#newCause();
    this.state.unlock();
    if (raise) this.line.raise();
    return count;
  }

  /** Takes what the guest sent. @returns the number of bytes put into `into`; 0: none are left, `output` rings again */
  drainTransmit(into: Uint8Array): number {
    const words = this.#words;
    this.state.lock();
    const full = this.#transmitterFull();
    const count = this.#tx.drain(into);
    if (full && !this.#transmitterFull()) words[at.thrEmpty] = 1;
    const raise = this.#newCause();
    this.state.unlock();
    if (raise) this.line.raise();
    return count;
  }

  /** Its state has been loaded: raises the line for what its driver may not have heard of. */
  restored(): void {
    this.state.lock();
    const raise = this.#newCause();
    this.state.unlock();
    if (raise) this.line.raise();
    this.doorbell.output();
  }

  #readRegister(offset: number): number {
    const words = this.#words;
    const latch = (words[at.lcr] & LCR_DLAB) !== 0;
    switch (offset) {
      case RBR_THR:
        return latch ? words[at.dll] : this.#rx.shift();
      case IER:
        return latch ? words[at.dlm] : words[at.ier];
      case IIR_FCR:
        return this.#identifyInterrupt();
      case LCR:
        return words[at.lcr];
      case MCR:
        return words[at.mcr];
      case LSR:
        return this.#lineStatus();
      case MSR: {
        const value = this.#modemLines() | words[at.modemDelta];
        words[at.modemDelta] = 0;
        return value;
      }
      case SCR:
        return words[at.scr];
      default:
        return filler(1);
    }
  }

  #writeRegister(offset: number, value: number): void {
    const words = this.#words;
    const latch = (words[at.lcr] & LCR_DLAB) !== 0;
    switch (offset) {
      case RBR_THR:
        if (latch) words[at.dll] = value;
        else this.#send(value);
        break;
      case IER:
        if (latch) words[at.dlm] = value;
        else this.#enableInterrupts(value & 0x0f);
        break;
      case IIR_FCR:
        if ((value & FCR_CLEAR_RX) !== 0 || ((value ^ words[at.fcr]) & FCR_ENABLE) !== 0) this.#rx.clear();
        words[at.fcr] = (value & FCR_ENABLE) !== 0 ? value & 0xc9 : 0;
        break;
      case LCR:
        words[at.lcr] = value;
        break;
      case MCR:
        this.#setModemControl(value & 0x1f);
        break;
      case SCR:
        words[at.scr] = value;
        break;
      default: // LSR and MSR are read-only
        break;
    }
  }

  #send(value: number): void {
    const words = this.#words;
    if ((words[at.mcr] & MCR_LOOPBACK) !== 0) {
      if (this.#rx.room === 0) words[at.overrun] = 1;
      else this.#rx.push(value);
      words[at.thrEmpty] = 1;
      return;
    }
    // A guest that writes though the transmitter is not empty loses the byte, as with the chip.
    if (this.#tx.room === 0) return;
    this.#tx.push(value);
    words[at.thrEmpty] = this.#transmitterFull() ? 0 : 1;
    // The register was full for an instant: its getting empty is a new event.
    words[at.causes] &= ~CAUSE_TX;
  }

  /** Enabling the THR interrupt while the register is empty raises it: drivers rely on that to start sending. */
  #enableInterrupts(value: number): void {
    const words = this.#words;
    if ((value & ~words[at.ier] & CAUSE_TX) !== 0 && !this.#transmitterFull()) words[at.thrEmpty] = 1;
    words[at.ier] = value;
  }

  #setModemControl(value: number): void {
    const before = this.#modemLines();
    this.#words[at.mcr] = value;
    const changed = before ^ this.#modemLines();
    // DCTS, DDSR and DDCD follow any change; TERI only the trailing edge of RI.
    const delta = (changed & 0xb0) | (changed & before & 0x40);
    this.#words[at.modemDelta] |= delta >> 4;
  }

  /** CTS, DSR, RI, DCD; in loopback they are RTS, DTR, OUT1, OUT2 of the MCR. */
  #modemLines(): number {
    const mcr = this.#words[at.mcr];
    if ((mcr & MCR_LOOPBACK) === 0) return MSR_CONNECTED;
    return ((mcr & 0x02) << 3) | ((mcr & 0x01) << 5) | ((mcr & 0x04) << 4) | ((mcr & 0x08) << 4);
  }

  #lineStatus(): number {
    const words = this.#words;
    const status =
      (this.#rx.length !== 0 ? LSR_DATA_READY : 0) |
      (words[at.overrun] !== 0 ? LSR_OVERRUN : 0) |
      (this.#transmitterFull() ? 0 : LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY);
    words[at.overrun] = 0;
    return status;
  }

  #transmitterFull(): boolean {
    return this.#tx.room < FIFO_DEPTH;
  }

  /** Whether the sender waits for room and there is some now. */
  #newRoom(): boolean {
    const words = this.#words;
    if (words[at.starved] === 0 || this.#rx.room < RX_SIZE / 2) return false;
    words[at.starved] = 0;
    return true;
  }

  /** The enabled causes, as bits of IER. */
  #activeCauses(): number {
    const words = this.#words;
    const causes =
      (this.#rx.length !== 0 ? CAUSE_RX : 0) |
      (words[at.thrEmpty] !== 0 ? CAUSE_TX : 0) |
      (words[at.overrun] !== 0 ? CAUSE_LINE : 0) |
      (words[at.modemDelta] !== 0 ? CAUSE_MODEM : 0);
    return causes & words[at.ier];
  }

  /**
   * Whether an edge is due: a cause is active that was not. A cause that joins others pulses too, where the chip's output
   * would just stay high: one edge too many costs a driver one look at IIR, one too few would hang it.
   */
  #newCause(): boolean {
    const causes = this.#activeCauses();
    const fresh = (causes & ~this.#words[at.causes]) !== 0;
    this.#words[at.causes] = causes;
    return fresh;
  }

  /** IIR: the cause of highest priority. Reading it clears the THR empty interrupt when that is the one. */
  #identifyInterrupt(): number {
    const words = this.#words;
    const fifos = (words[at.fcr] & FCR_ENABLE) !== 0;
    const causes = this.#activeCauses();
    let id = IIR_NONE;
    if ((causes & CAUSE_LINE) !== 0) id = 0x06;
    else if ((causes & CAUSE_RX) !== 0) {
      // Fewer bytes than the trigger level: the character timeout, which comes at once here.
      id = fifos && this.#rx.length < TRIGGER[words[at.fcr] >> 6] ? 0x0c : 0x04;
    } else if ((causes & CAUSE_TX) !== 0) {
      id = 0x02;
      words[at.thrEmpty] = 0;
    } else if ((causes & CAUSE_MODEM) !== 0) id = 0x00;
    return id | (fifos ? IIR_FIFOS : 0);
  }
}
