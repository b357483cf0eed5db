import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { AccessSize } from '../../../src/devices/bus.js';
import { Pl011, pl011Layout } from '../../../src/devices/pl011.js';
import { StateBlock } from '../../../src/state/state-block.js';

const [DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H] = [0x00, 0x04, 0x18, 0x20, 0x24, 0x28, 0x2c];
const [CR, IFLS, IMSC, RIS, MIS, ICR, DMACR] = [0x30, 0x34, 0x38, 0x3c, 0x40, 0x44, 0x48];
const [TXFE, RXFF, TXFF, RXFE, BUSY] = [0x80, 0x40, 0x20, 0x10, 0x08];
const [RX, TX, RT, OE] = [0x10, 0x20, 0x40, 0x400];
const LOOP = 0x381;
const FIFO_DEPTH = 32;

function port(block = new StateBlock(pl011Layout)) {
  const rung = { raised: 0, output: 0, room: 0 };
  const device = new Pl011(
    block,
    { raise: () => rung.raised++ },
    { output: () => rung.output++, room: () => rung.room++ },
  );
  device.powerOn();
  return {
    rung,
    device,
    block,
    in: (register: number) => device.read(register, 4),
    out: (register: number, value: number) => device.write(register, 4, value),
    send: (count: number) => {
      for (let index = 0; index < count; index++) device.write(DR, 1, index & 0xff);
    },
    drain: (limit = 8192) => {
      const into = new Uint8Array(limit);
      return [...into.subarray(0, device.drainTransmit(into))];
    },
  };
}

const bytes = (count: number, first = 0) => Uint8Array.from({ length: count }, (_, index) => first + index);

describe('the registers of the PL011', () => {
  test('are an enabled port with empty FIFOs and a connected line at power-on', () => {
    const uart = port();
    const values = [DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, DMACR].map(uart.in);
    expect(values).toEqual([0, 0, TXFE | RXFE | 7, 0, 0, 0, 0x70, 0x301, 0x12, 0, 0, 0, 0]);
  });

  test('say what it is: Arm, part 011, revision 3, which has FIFOs of 32', () => {
    const uart = port();
    const id = Array.from({ length: 8 }, (_, index) => uart.in(0xfe0 + 4 * index));
    expect(id).toEqual([0x11, 0x10, 0x34, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
  });

  test('keep the bits that the chip has', () => {
    const uart = port();
    const writable = [ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, DMACR];
    writable.forEach((register) => uart.out(register, 0xffff_ffff));
    expect(writable.map(uart.in)).toEqual([0xff, 0xffff, 0x3f, 0xff, 0xff87, 0x3f, 0x7ff, 7]);
  });

  test('take no write to FR, RIS, MIS and the identification', () => {
    const uart = port();
    [FR, RIS, MIS, 0xfe0].forEach((register) => uart.out(register, 0xffff));
    expect([FR, RIS, MIS, 0xfe0].map(uart.in)).toEqual([TXFE | RXFE | 7, 0, 0, 0x11]);
  });

  test('are reached in every size, and at their own address alone', () => {
    const uart = port();
    uart.device.write(IBRD, 2, 0x1234);
    expect([1, 2, 4].map((size) => uart.device.read(IBRD, size as AccessSize))).toEqual([0x34, 0x1234, 0x1234]);
    uart.device.write(IBRD + 1, 1, 0x56);
    expect([uart.device.read(IBRD + 1, 1), uart.in(IBRD)]).toEqual([0, 0x1234]);
  });
});

describe('the receiver of the PL011', () => {
  test.each([
    [0, 4],
    [1, 8],
    [2, 16],
    [3, 24],
    [4, 28],
    [7, 28],
  ])('interrupts at the trigger level of IFLS %d: %d bytes', (select, level) => {
    const uart = port();
    uart.out(IFLS, select << 3);
    uart.device.receive(bytes(level - 1));
    expect(uart.in(RIS)).toBe(RT);
    uart.device.receive(bytes(1));
    expect(uart.in(RIS)).toBe(RX | RT);
    uart.in(DR);
    expect(uart.in(RIS)).toBe(RT);
    for (let left = level - 1; left > 0; left--) uart.in(DR);
    expect([uart.in(RIS), uart.in(FR) & RXFE]).toEqual([0, RXFE]);
  });

  test('holds one byte in character mode', () => {
    const uart = port();
    uart.out(LCR_H, 0x60);
    expect(uart.device.receive(bytes(3, 0x41))).toBe(1);
    expect([uart.in(RIS), uart.in(FR) & RXFF, uart.in(DR), uart.in(RIS)]).toEqual([RX, RXFF, 0x41, 0]);
    expect(uart.rung.room).toBe(1);
  });

  test('leaves input with the sender while it is disabled', () => {
    const uart = port();
    uart.out(CR, 0x101);
    expect(uart.device.receive(bytes(1))).toBe(0);
    uart.out(CR, 0x301);
    expect([uart.rung.room, uart.device.receive(bytes(1))]).toEqual([1, 1]);
  });

  test('drops what it holds when LCR_H changes its depth', () => {
    const uart = port();
    uart.device.receive(bytes(20));
    uart.out(LCR_H, 0x60);
    expect([uart.in(FR) & RXFE, uart.in(RIS)]).toEqual([RXFE, 0]);
  });

  test('takes a FIFO, and rings once when half of it is free again', () => {
    const uart = port();
    expect(uart.device.receive(bytes(100))).toBe(FIFO_DEPTH);
    expect([uart.in(FR) & RXFF, uart.device.receive(bytes(1))]).toEqual([RXFF, 0]);
    for (let count = 0; count < FIFO_DEPTH / 2 - 1; count++) uart.in(DR);
    expect(uart.rung.room).toBe(0);
    uart.in(DR);
    uart.in(DR);
    expect(uart.rung.room).toBe(1);
  });

  test('pulses for each delivery, also when the driver left bytes behind', () => {
    const uart = port();
    uart.out(IMSC, RX | RT);
    uart.device.receive(bytes(2));
    uart.device.receive(bytes(2));
    expect(uart.rung.raised).toBe(2);
  });

  test('interrupts for bytes that waited until it was enabled', () => {
    const uart = port();
    uart.device.receive(bytes(1));
    expect(uart.rung.raised).toBe(0);
    uart.out(IMSC, RT);
    expect(uart.rung.raised).toBe(1);
  });

  test('keeps quiet about bytes whose interrupt ICR cleared, until the next', () => {
    const uart = port();
    uart.out(IMSC, RX | RT);
    uart.device.receive(bytes(1));
    uart.out(ICR, RX | RT);
    expect([uart.in(MIS), uart.rung.raised]).toEqual([0, 1]);
    uart.device.receive(bytes(1));
    expect([uart.in(MIS), uart.rung.raised]).toEqual([RT, 2]);
  });
});

describe('the transmitter of the PL011', () => {
  test('sends bytes and announces the first', () => {
    const uart = port();
    uart.send(3);
    expect([uart.rung.output, uart.drain(2), uart.drain(), uart.drain()]).toEqual([1, [0, 1], [2], []]);
    uart.device.write(DR, 4, 0x141);
    expect([uart.rung.output, uart.drain()]).toEqual([2, [0x41]]);
  });

  test('has its interrupt when it has sent, until ICR clears it', () => {
    const uart = port();
    uart.out(IMSC, TX);
    expect([uart.in(RIS), uart.rung.raised]).toEqual([0, 0]);
    uart.send(1);
    expect([uart.in(MIS), uart.rung.raised]).toEqual([TX, 1]);
    uart.out(ICR, TX);
    expect(uart.in(MIS)).toBe(0);
  });

  test('pulses again in each burst of half a FIFO, for a driver that leaves off in between', () => {
    const uart = port();
    uart.out(IMSC, TX);
    uart.send(FIFO_DEPTH);
    const { raised } = uart.rung;
    expect(raised).toBeLessThanOrEqual(3);
    uart.send(FIFO_DEPTH / 2);
    expect(uart.rung.raised).toBe(raised + 1);
  });

  test('is full while the host is stuck, and interrupts once when there is room for a FIFO again', () => {
    const uart = port();
    uart.out(IMSC, TX);
    let sent = 0;
    for (; (uart.in(FR) & TXFF) === 0; sent += FIFO_DEPTH) uart.send(FIFO_DEPTH);
    expect([uart.in(FR) & (TXFE | BUSY), uart.in(MIS)]).toEqual([BUSY, 0]);
    const before = uart.rung.raised;
    const drained = uart.drain(FIFO_DEPTH).length + uart.drain().length;
    expect([drained, uart.rung.raised - before, uart.in(FR) & (TXFE | BUSY)]).toEqual([sent, 1, TXFE]);
  });
});

describe('loopback of the PL011', () => {
  test('receives what it sends and overruns when nobody reads', () => {
    const uart = port();
    uart.out(CR, LOOP);
    uart.send(FIFO_DEPTH);
    expect([uart.in(RSR), uart.in(RIS) & ~0xf]).toEqual([0, RX | TX | RT]);
    uart.send(1);
    expect([uart.in(RSR), uart.in(RIS) & OE, uart.drain()]).toEqual([0x08, OE, []]);
    uart.out(RSR, 0);
    uart.out(ICR, OE);
    expect([uart.in(RSR), uart.in(RIS) & OE, uart.in(DR), uart.in(DR)]).toEqual([0, 0, 0, 1]);
  });

  test.each([
    ['DTR as DSR', 0x400, 0x002, 0x8],
    ['RTS as CTS', 0x800, 0x001, 0x2],
    ['Out1 as DCD', 0x1000, 0x004, 0x4],
    ['Out2 as RI', 0x2000, 0x100, 0x1],
  ])('shows %s, with its interrupt', (_name, control, flag, interrupt) => {
    const uart = port();
    uart.out(CR, LOOP);
    uart.out(ICR, 0x7ff);
    uart.out(CR, LOOP | control);
    expect([uart.in(FR) & 0x107, uart.in(RIS)]).toEqual([flag, interrupt]);
  });
});

/**
 * A driver in the manner of Linux's amba-pl011: it looks at the port only on an edge and until nothing is pending, and leaves
 * off after some rounds, as if the interrupt were level-triggered. Each `yield` is one register access.
 */
class Driver {
  readonly received: number[] = [];
  readonly #queue: number[] = [];
  #running: Generator<void> | undefined;
  #mask = RX | RT;
  edge = false;

  constructor(
    private readonly uart: { in(register: number): number; out(register: number, value: number): void },
    private readonly rounds: number,
  ) {
    uart.out(IMSC, this.#mask);
  }

  /** start_tx: it fills the FIFO at once and enables the interrupt for the rest. */
  print(values: readonly number[]): void {
    this.#queue.push(...values);
    while (this.#queue.length > 0 && (this.uart.in(FR) & TXFF) === 0) this.uart.out(DR, this.#queue.shift()!);
    this.#setMask(this.#queue.length > 0 ? this.#mask | TX : this.#mask);
  }

  #setMask(mask: number): void {
    this.#mask = mask;
    this.uart.out(IMSC, mask);
  }

  /** @returns false: there is nothing to do before the next edge */
  step(): boolean {
    if (this.#running === undefined) {
      if (!this.edge) return false;
      this.edge = false;
      this.#running = this.#interrupt();
    }
    if (this.#running.next().done === true) this.#running = undefined;
    return true;
  }

  *#interrupt(): Generator<void> {
    for (let round = 0; round < this.rounds; round++) {
      const status = this.uart.in(RIS) & this.#mask;
      yield;
      if (status === 0) return;
      this.uart.out(ICR, status & ~(TX | RX | RT));
      yield;
      if ((status & (RX | RT)) !== 0) {
        while ((this.uart.in(FR) & RXFE) === 0) {
          yield;
          this.received.push(this.uart.in(DR));
          yield;
        }
      }
      if ((status & TX) !== 0) {
        for (let count = 0; count < FIFO_DEPTH / 2 && this.#queue.length > 0; count++) {
          this.uart.out(DR, this.#queue.shift()!);
          yield;
        }
        if (this.#queue.length === 0) this.#setMask(this.#mask & ~TX);
        yield;
      }
    }
  }
}

/** The host's end: it delivers and drains only when it was told that it can. */
class Host {
  readonly received: number[] = [];
  waiting: number[] = [];
  blocked = false;
  output = false;

  constructor(private readonly device: () => Pl011) {}

  deliver(count: number): boolean {
    if (this.blocked || this.waiting.length === 0) return false;
    const offered = this.waiting.slice(0, count);
    this.blocked = true; // unless all is taken, until the doorbell; it may ring at once
    const taken = this.device().receive(Uint8Array.from(offered));
    if (taken === offered.length) this.blocked = false;
    this.waiting = this.waiting.slice(taken);
    return true;
  }

  drain(count: number): boolean {
    if (!this.output) return false;
    const into = new Uint8Array(count);
    const taken = this.device().drainTransmit(into);
    this.received.push(...into.subarray(0, taken));
    if (taken === 0) this.output = false;
    return true;
  }
}

const steps = fc.array(
  fc.record({
    do: fc.constantFrom('type', 'print', 'deliver', 'drain', 'guest', 'guest'),
    count: fc.oneof(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 10_000 })),
  }),
  { maxLength: 30, size: 'max' },
);

describe('a driver that acts on edges alone', () => {
  test('gets and sends every byte, in order, and nothing is stuck at the end', () => {
    fc.assert(
      fc.property(steps, fc.constantFrom(2, 256), (script, rounds) => {
        const block = new StateBlock(pl011Layout);
        const line = { raise: () => void (driver.edge = true) };
        const doorbell = { output: () => void (host.output = true), room: () => void (host.blocked = false) };
        // The guest's thread and the host's each have their own view.
        const views = [0, 1].map(() => new Pl011(block, line, doorbell));
        views[0].powerOn();
        const host: Host = new Host(() => views[0]);
        const driver: Driver = new Driver(
          {
            in: (register) => views[1].read(register, 4),
            out: (register, value) => views[1].write(register, 4, value),
          },
          rounds,
        );
        const typed: number[] = [];
        const printed: number[] = [];
        const fresh = (into: number[], count: number) => {
          const values = Array.from({ length: count }, (_, index) => ((into.length + index) * 31) & 0xff);
          into.push(...values);
          return values;
        };
        for (const step of script) {
          if (step.do === 'type') host.waiting.push(...fresh(typed, step.count));
          else if (step.do === 'print') driver.print(fresh(printed, step.count));
          else if (step.do === 'deliver') host.deliver(step.count);
          else if (step.do === 'drain') host.drain(step.count);
          else for (let left = step.count; left > 0 && driver.step(); left--);
        }
        let busy = true;
        while (busy) busy = [driver.step(), host.deliver(4096), host.drain(4096)].includes(true);
        expect(driver.received).toEqual(typed);
        expect(host.received).toEqual(printed);
      }),
      { numRuns: 60 },
    );
  });
});

const operations = fc.array(
  fc.record({
    kind: fc.constantFrom('read', 'write', 'receive', 'drain'),
    register: fc.oneof(fc.constantFrom(DR, FR, LCR_H, CR, IMSC, RIS, ICR), fc.nat(0xfff)),
    size: fc.constantFrom<AccessSize>(1, 2, 4),
    value: fc.oneof(fc.constantFrom(0x301, 0x381, 0x7ff), fc.nat(0xffff_ffff)),
    count: fc.nat(300),
    second: fc.boolean(),
  }),
  { maxLength: 200, size: 'max' },
);
type Operation = typeof operations extends fc.Arbitrary<(infer T)[]> ? T : never;

function run(device: Pl011, { kind, register, size, value, count }: Operation): unknown {
  if (kind === 'read') return device.read(register, size);
  if (kind === 'write') {
    device.write(register, size, value);
    return;
  }
  if (kind === 'receive') return device.receive(bytes(count, value));
  const into = new Uint8Array(count);
  return [...into.subarray(0, device.drainTransmit(into))];
}

describe('two views of one PL011', () => {
  test('are one port, whose reads fit their size', () => {
    fc.assert(
      fc.property(operations, (script) => {
        const shared = new StateBlock(pl011Layout);
        const [first, second, alone] = [port(shared), port(shared), port()];
        for (const operation of script) {
          const { device } = operation.second ? second : first;
          const result = run(device, operation);
          expect(result).toEqual(run(alone.device, operation));
          if (operation.kind === 'read') {
            expect(result).toBeGreaterThanOrEqual(0);
            expect(result).toBeLessThan(2 ** (8 * operation.size));
          }
        }
        expect(shared.save()).toEqual(alone.block.save());
        const bells = Object.keys(alone.rung) as (keyof typeof alone.rung)[];
        for (const bell of bells) expect(first.rung[bell] + second.rung[bell]).toBe(alone.rung[bell]);
      }),
    );
  });
});
