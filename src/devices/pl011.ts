/**
 * PL011 UART (Arm DDI 0183, r1p5: FIFOs of 32).
 *
 * Modelled: all registers, FIFO and character mode, receive trigger levels, loopback, the modem interrupts that loopback
 * causes, an interrupt output that pulses an edge. Not modelled: line speed (a byte is sent and received at once, so the
 * receive timeout comes at once too), framing, parity and break errors, the overrun bit in DR (RSR has it), DMA, IrDA,
 * hardware flow control, and the transmitter's enable bits: what is written is sent. While the receiver is disabled, input
 * waits with the sender. Modem inputs are constantly those of a connected line.
 *
 * Sent bytes wait in a ring for main; while it has no room for another FIFO's worth, which a driver may send without looking
 * again, the transmit FIFO is full, so a stuck host slows the guest down instead of blocking its vCPU.
 */
import { ByteRing } from '../state/byte-ring.js';
import { hostOnly, type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import type { AccessSize, BusDevice, InterruptLine } from './bus.js';
import { identification, identify, isRegister, truncated } from './primecell.js';
import type { SerialDoorbell } from './serial-16550.js';

const FIFO_DEPTH = 32;
const TX_SIZE = 4096;

export const pl011Layout = stateLayout('pl011', 1, {
  ilpr: upTo(0xff),
  ibrd: upTo(0xffff),
  fbrd: upTo(0x3f),
  lcr: upTo(0xff),
  cr: upTo(0xffff),
  ifls: upTo(0x3f),
  imsc: upTo(0x7ff),
  ris: upTo(0x7ff),
  dmacr: upTo(0x7),
  /** RSR's overrun bit. */
  overrun: upTo(1),
  /** MIS at the last look, to find new causes. */
  causes: hostOnly(),
  /** The sender was told that there is no room. */
  starved: hostOnly(),
  rxHead: upTo(FIFO_DEPTH - 1),
  rxCount: upTo(FIFO_DEPTH),
  txHead: upTo(TX_SIZE - 1),
  txCount: upTo(TX_SIZE),
  rx: FIFO_DEPTH / 4,
  tx: TX_SIZE / 4,
});

const at = pl011Layout.at;
/** r1p5. */
const ID = identification(0x011, 3);

/** Register offsets: DDI 0183, table 3-1. */
const DR = 0x00;
const RSR_ECR = 0x04;
const FR = 0x18;
const ILPR = 0x20;
const IBRD = 0x24;
const FBRD = 0x28;
const LCR_H = 0x2c;
const CR = 0x30;
const IFLS = 0x34;
const IMSC = 0x38;
const RIS = 0x3c;
const MIS = 0x40;
const ICR = 0x44;
const DMACR = 0x48;

const FR_CTS = 0x01;
const FR_DSR = 0x02;
const FR_DCD = 0x04;
const FR_BUSY = 0x08;
const FR_RX_EMPTY = 0x10;
const FR_TX_FULL = 0x20;
const FR_RX_FULL = 0x40;
const FR_TX_EMPTY = 0x80;
const FR_RI = 0x100;
/** Somebody is connected. */
const FR_CONNECTED = FR_CTS | FR_DSR | FR_DCD;

const RSR_OVERRUN = 0x08;
const LCR_FIFOS = 0x10;
const LCR_8_BITS = 0x60;
const CR_ENABLE = 0x001;
const CR_LOOPBACK = 0x080;
const CR_TRANSMIT = 0x100;
const CR_RECEIVE = 0x200;
const CR_WRITABLE = 0xff87;
/** Half full, both. */
const IFLS_RESET = 0x12;

/** Bits of IMSC, RIS, MIS and ICR. */
const INT_RX = 0x010;
const INT_TX = 0x020;
const INT_TIMEOUT = 0x040;
const INT_OVERRUN = 0x400;
const INT_ALL = 0x7ff;

/** Bytes at which the receive interrupt comes, by IFLS; reserved values are as the last. */
const TRIGGER = [4, 8, 16, 24, 28, 28, 28, 28];
/** A driver that sends from its interrupt sends half a FIFO at a time. */
const BURST_MASK = FIFO_DEPTH / 2 - 1;

export class Pl011 implements BusDevice {
  readonly #words: Int32Array;
  readonly #rx: ByteRing;
  readonly #tx: ByteRing;

  constructor(
    private readonly state: StateBlock,
    private readonly line: InterruptLine,
    private readonly doorbell: SerialDoorbell,
  ) {
    this.#words = state.words;
    this.#rx = new ByteRing(state.words, { head: at.rxHead, count: at.rxCount, bytes: at.rx }, FIFO_DEPTH);
    this.#tx = new ByteRing(state.words, { head: at.txHead, count: at.txCount, bytes: at.tx }, TX_SIZE);
  }

  /** As firmware leaves it, since an SBSA driver and an early console use it as they find it: enabled, with FIFOs. */
  powerOn(): void {
    this.#words[at.cr] = CR_ENABLE | CR_TRANSMIT | CR_RECEIVE;
    this.#words[at.lcr] = LCR_8_BITS | LCR_FIFOS;
    this.#words[at.ifls] = IFLS_RESET;
  }

  read(offset: number, size: AccessSize): number {
    if (!isRegister(offset)) return 0;
    this.state.lock();
    const value = this.#readRegister(offset);
    const raise = this.#newCause();
    const room = this.#newRoom();
    this.state.unlock();
    if (raise) this.line.raise();
    if (room) this.doorbell.room();
    return truncated(value, size);
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (!isRegister(offset)) return;
    this.state.lock();
    const before = this.#tx.length;
    this.#writeRegister(offset, truncated(value, size));
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
    const count = Math.min(bytes.length, this.#room());
    for (let index = 0; index < count; index++) this.#push(bytes[index]);
    if (count < bytes.length) words[at.starved] = 1;
    // A driver that gave up in the middle hears of the rest with what follows.
    if (count > 0) words[at.causes] &= ~(INT_RX | INT_TIMEOUT);
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
    if (full && !this.#transmitterFull()) words[at.ris] |= INT_TX;
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
    switch (offset) {
      case DR:
        return this.#pop();
      case RSR_ECR:
        return words[at.overrun] !== 0 ? RSR_OVERRUN : 0;
      case FR:
        return this.#flags();
      case ILPR:
        return words[at.ilpr];
      case IBRD:
        return words[at.ibrd];
      case FBRD:
        return words[at.fbrd];
      case LCR_H:
        return words[at.lcr];
      case CR:
        return words[at.cr];
      case IFLS:
        return words[at.ifls];
      case IMSC:
        return words[at.imsc];
      case RIS:
        return words[at.ris];
      case MIS:
        return words[at.ris] & words[at.imsc];
      case DMACR:
        return words[at.dmacr];
      default:
        return identify(ID, offset);
    }
  }

  #writeRegister(offset: number, value: number): void {
    const words = this.#words;
    switch (offset) {
      case DR:
        this.#send(value & 0xff);
        break;
      case RSR_ECR:
        words[at.overrun] = 0;
        break;
      case ILPR:
        words[at.ilpr] = value & 0xff;
        break;
      case IBRD:
        words[at.ibrd] = value & 0xffff;
        break;
      case FBRD:
        words[at.fbrd] = value & 0x3f;
        break;
      case LCR_H:
        // Another depth: the FIFOs start anew.
        if (((value ^ words[at.lcr]) & LCR_FIFOS) !== 0) this.#flushReceived();
        words[at.lcr] = value & 0xff;
        break;
      case CR:
        this.#setControl(value & CR_WRITABLE);
        break;
      case IFLS:
        words[at.ifls] = value & 0x3f;
        break;
      case IMSC:
        words[at.imsc] = value & INT_ALL;
        break;
      case ICR:
        words[at.ris] &= ~value;
        break;
      case DMACR:
        words[at.dmacr] = value & 0x7;
        break;
      default: // read-only, or nothing
        break;
    }
  }

  #send(value: number): void {
    const words = this.#words;
    if ((words[at.cr] & CR_LOOPBACK) !== 0) {
      if (this.#rx.length < this.#depth()) this.#push(value);
      else {
        words[at.overrun] = 1;
        words[at.ris] |= INT_OVERRUN;
      }
      words[at.ris] |= INT_TX;
      return;
    }
    // A guest that writes though the FIFO is full loses the byte, as with the chip.
    if (this.#tx.room === 0) return;
    const place = this.#tx.push(value);
    // The FIFO is empty again at once, which is when the chip interrupts.
    if (this.#transmitterFull()) words[at.ris] &= ~INT_TX;
    else words[at.ris] |= INT_TX;
    // Linux's driver leaves off after so many rounds, trusting that the interrupt's level brings it back.
    if ((place & BURST_MASK) === 0) words[at.causes] &= ~INT_TX;
  }

  #setControl(value: number): void {
    const words = this.#words;
    const before = this.#modemLines();
    words[at.cr] = value;
    const changed = before ^ this.#modemLines();
    // RIS has RI, CTS, DCD, DSR in bits 0 to 3.
    words[at.ris] |=
      ((changed & FR_RI) >> 8) | ((changed & FR_CTS) << 1) | (changed & FR_DCD) | ((changed & FR_DSR) << 2);
  }

  /** CTS, DSR, DCD, RI; in loopback they are RTS, DTR, Out1, Out2 of CR. */
  #modemLines(): number {
    const cr = this.#words[at.cr];
    if ((cr & CR_LOOPBACK) === 0) return FR_CONNECTED;
    return ((cr >> 11) & FR_CTS) | ((cr >> 9) & FR_DSR) | ((cr >> 10) & FR_DCD) | ((cr >> 5) & FR_RI);
  }

  #flags(): number {
    const count = this.#rx.length;
    return (
      this.#modemLines() |
      (count === 0 ? FR_RX_EMPTY : 0) |
      (count >= this.#depth() ? FR_RX_FULL : 0) |
      (this.#transmitterFull() ? FR_TX_FULL | FR_BUSY : FR_TX_EMPTY)
    );
  }

  #transmitterFull(): boolean {
    return this.#tx.room < FIFO_DEPTH;
  }

  #depth(): number {
    return (this.#words[at.lcr] & LCR_FIFOS) !== 0 ? FIFO_DEPTH : 1;
  }

  #room(): number {
    const words = this.#words;
    const on = CR_ENABLE | CR_RECEIVE;
    return (words[at.cr] & on) === on ? Math.max(this.#depth() - this.#rx.length, 0) : 0;
  }

  /** Whether the sender waits for room and there is some now. */
  #newRoom(): boolean {
    const words = this.#words;
    if (words[at.starved] === 0 || this.#room() < (this.#depth() + 1) >> 1) return false;
    words[at.starved] = 0;
    return true;
  }

  /** Whether an edge is due: a cause is enabled and active that was not. One edge too many costs a driver one look at MIS. */
  #newCause(): boolean {
    const causes = this.#words[at.ris] & this.#words[at.imsc];
    const fresh = (causes & ~this.#words[at.causes]) !== 0;
    this.#words[at.causes] = causes;
    return fresh;
  }

  #push(value: number): void {
    const words = this.#words;
    this.#rx.push(value);
    const fifos = (words[at.lcr] & LCR_FIFOS) !== 0;
    if (!fifos || this.#rx.length >= TRIGGER[(words[at.ifls] >> 3) & 7]) words[at.ris] |= INT_RX;
    if (fifos) words[at.ris] |= INT_TIMEOUT;
  }

  #pop(): number {
    const words = this.#words;
    const value = this.#rx.shift();
    if (this.#rx.length === 0) words[at.ris] &= ~(INT_RX | INT_TIMEOUT);
    else if (this.#rx.length < TRIGGER[(words[at.ifls] >> 3) & 7]) words[at.ris] &= ~INT_RX;
    return value;
  }

  #flushReceived(): void {
    this.#rx.clear();
    this.#words[at.ris] &= ~(INT_RX | INT_TIMEOUT);
  }
}
