import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { Serial16550, serialLayout } from '../../../src/devices/serial-16550.js';
import { StateBlock } from '../../../src/state/state-block.js';

const [RBR, THR, DLL, IER, DLM, IIR, FCR, LCR, MCR, LSR, MSR, SCR] = [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7] as const;
const ERBFI = 1;
const ETBEI = 2;
const ELSI = 4;
const EDSSI = 8;
const DLAB = 0x80;
const LOOP = 0x10;
const DR = 0x01;
const OE = 0x02;
const THRE = 0x20;
const TEMT = 0x40;
const NO_INTERRUPT = 0x01;
const FIFO_DEPTH = 16;

function port(block = new StateBlock(serialLayout)) {
  const rung = { raised: 0, output: 0, room: 0 };
  const device = new Serial16550(
    block,
    { raise: () => rung.raised++ },
    { output: () => rung.output++, room: () => rung.room++ },
  );
  return {
    rung,
    device,
    block,
    in: (register: number) => device.read(register, 1),
    out: (register: number, value: number) => device.write(register, 1, value),
    send: (count: number) => {
      for (let index = 0; index < count; index++) device.write(THR, 1, index & 0xff);
    },
    drain: (limit = 8192) => {
      const into = new Uint8Array(limit);
      return [...into.subarray(0, device.drainTransmit(into))];
    },
  };
}

const bytes = (count: number, first = 0) => Uint8Array.from({ length: count }, (_, index) => first + index);

/** Sends as a driver does, a FIFO's depth at each THR empty, until there is none. */
function fill(serial: ReturnType<typeof port>): number {
  let sent = 0;
  for (; (serial.in(LSR) & THRE) !== 0; sent += FIFO_DEPTH) serial.send(FIFO_DEPTH);
  return sent;
}

describe('the registers of the serial port', () => {
  test('are empty transmitter, no interrupt and a connected line at power-on', () => {
    const serial = port();
    expect([IER, IIR, LCR, MCR, LSR, MSR, SCR].map(serial.in)).toEqual([0, NO_INTERRUPT, 0, 0, THRE | TEMT, 0xb0, 0]);
  });

  test('are the divisor latch at 0 and 1 while DLAB is set', () => {
    const serial = port();
    serial.out(IER, ERBFI);
    serial.device.receive(bytes(1, 0x41));
    serial.out(LCR, DLAB | 3);
    serial.out(DLL, 0x0c);
    serial.out(DLM, 0x02);
    expect([serial.in(DLL), serial.in(DLM), serial.in(LCR)]).toEqual([0x0c, 0x02, DLAB | 3]);
    serial.out(LCR, 3);
    expect([serial.in(IER), serial.in(RBR)]).toEqual([ERBFI, 0x41]);
    expect(serial.drain()).toEqual([]);
  });

  test('keep the bits that the chip has', () => {
    const serial = port();
    [IER, LCR, MCR, SCR].forEach((register) => serial.out(register, 0x7f));
    expect([IER, LCR, MCR, SCR].map(serial.in)).toEqual([0x0f, 0x7f, 0x1f, 0x7f]);
  });

  test('take no write to LSR and MSR', () => {
    const serial = port();
    serial.out(LSR, 0);
    serial.out(MSR, 0);
    expect([serial.in(LSR), serial.in(MSR)]).toEqual([THRE | TEMT, 0xb0]);
  });

  test('tell 16550A from 16450 by the upper bits of IIR', () => {
    const serial = port();
    serial.out(FCR, 1);
    expect(serial.in(IIR)).toBe(0xc1);
    serial.out(FCR, 0);
    expect(serial.in(IIR)).toBe(0x01);
  });

  test.each([
    ['the clear bit', 0x03],
    ['a change of mode', 0x00],
  ])('drop received bytes at %s of FCR', (_name, value) => {
    const serial = port();
    serial.out(FCR, 1);
    serial.device.receive(bytes(3));
    serial.out(FCR, value);
    expect(serial.in(LSR) & DR).toBe(0);
  });

  test('answer other sizes with all ones and ignore them in writes', () => {
    const serial = port();
    serial.device.write(THR, 2, 0x4142);
    expect([serial.device.read(LSR, 2), serial.device.read(LSR, 4)]).toEqual([0xffff, 0xffff_ffff]);
    expect(serial.drain()).toEqual([]);
  });
});

describe("Linux's probe of the serial port", () => {
  test('autoconfig finds a 16550A and no better chip', () => {
    const serial = port();
    // IER scratch test
    serial.out(IER, 0);
    const scratch = [serial.in(IER) & 0x0f];
    serial.out(IER, 0x0f);
    scratch.push(serial.in(IER) & 0x0f);
    serial.out(IER, 0);
    expect(scratch).toEqual([0, 0x0f]);
    // loopback: OUT2 and RTS come back as DCD and CTS
    serial.out(MCR, LOOP | 0x0a);
    expect(serial.in(MSR) & 0xf0).toBe(0x90);
    serial.out(MCR, 0);
    // EFR, in the place of FCR while LCR is 0xbf, is where better chips show
    serial.out(LCR, 0xbf);
    serial.out(FCR, 0);
    serial.out(LCR, 0);
    serial.out(FCR, 1);
    expect(serial.in(IIR) & 0xc0).toBe(0xc0);
    for (const lcr of [DLAB, 0xbf]) {
      serial.out(LCR, lcr);
      expect(serial.in(IIR)).not.toBe(0);
    }
    // 16750: a 64 byte FIFO shows in bit 5
    for (const lcr of [0, DLAB]) {
      serial.out(LCR, lcr);
      serial.out(FCR, 0x21);
      expect(serial.in(IIR) >> 5).toBe(6);
    }
    // XScale: UUE in IER
    serial.out(LCR, 0);
    serial.out(IER, 0x40);
    expect(serial.in(IER) & 0x40).toBe(0);
  });

  test('startup finds neither UART_BUG_TXEN nor UART_BUG_THRE', () => {
    const serial = port();
    const enableAndLook = () => {
      serial.out(IER, 0);
      serial.out(IER, ETBEI);
      return serial.in(IIR);
    };
    expect(enableAndLook() & NO_INTERRUPT).toBe(0);
    expect(enableAndLook() & NO_INTERRUPT).toBe(0);
    expect(serial.in(LSR) & TEMT).toBe(TEMT);
  });
});

describe('the loopback mode', () => {
  test('receives what it sends and sends nothing', () => {
    const serial = port();
    serial.out(MCR, LOOP);
    serial.out(THR, 0x55);
    expect([serial.in(LSR) & DR, serial.in(RBR), serial.in(LSR) & DR]).toEqual([DR, 0x55, 0]);
    expect(serial.drain()).toEqual([]);
  });

  test.each([
    ['DTR', 0x01, 0x20],
    ['RTS', 0x02, 0x10],
    ['OUT1', 0x04, 0x40],
    ['OUT2', 0x08, 0x80],
  ])('shows %s in MSR', (_name, mcr, msr) => {
    const serial = port();
    serial.out(MCR, LOOP | mcr);
    expect(serial.in(MSR) & 0xf0).toBe(msr);
  });

  test('sets the delta bits until MSR is read, and the modem interrupt with them', () => {
    const serial = port();
    serial.out(MCR, LOOP);
    serial.in(MSR);
    serial.out(IER, EDSSI);
    serial.out(MCR, LOOP | 0x04); // the leading edge of RI is no event
    expect([serial.rung.raised, serial.in(MSR)]).toEqual([0, 0x40]);
    serial.out(MCR, LOOP | 0x01);
    expect([serial.rung.raised, serial.in(IIR), serial.in(MSR)]).toEqual([1, 0x00, 0x20 | 0x06]);
    serial.out(MCR, LOOP | 0x09);
    expect(serial.in(MSR)).toBe(0xa0 | 0x08);
    expect([serial.in(MSR), serial.in(IIR)]).toEqual([0xa0, NO_INTERRUPT]);
  });

  test('overruns when nobody reads, which LSR tells once, with the highest priority', () => {
    const serial = port();
    serial.out(MCR, LOOP);
    serial.out(IER, ERBFI | ETBEI | ELSI);
    serial.send(257);
    expect(serial.in(IIR)).toBe(0x06);
    expect([serial.in(LSR) & OE, serial.in(LSR) & OE]).toEqual([OE, 0]);
    expect(serial.in(IIR)).toBe(0x04);
  });
});

describe('the interrupts of the serial port', () => {
  test.each([
    [1, 0x01],
    [4, 0x41],
    [8, 0x81],
    [14, 0xc1],
  ])('are a timeout below the trigger level of %d bytes', (level, fcr) => {
    const serial = port();
    serial.out(FCR, fcr);
    serial.out(IER, ERBFI);
    serial.device.receive(bytes(level));
    expect(serial.in(IIR)).toBe(0xc4);
    serial.in(RBR);
    expect(serial.in(IIR)).toBe(level === 1 ? 0xc1 : 0xcc);
  });

  test('need no trigger level in 16450 mode', () => {
    const serial = port();
    serial.out(IER, ERBFI);
    serial.device.receive(bytes(1));
    expect([serial.rung.raised, serial.in(IIR), serial.in(RBR), serial.in(IIR)]).toEqual([1, 0x04, 0, NO_INTERRUPT]);
  });

  test('tell THR empty once for each time it is enabled or written', () => {
    const serial = port();
    serial.out(IER, ETBEI);
    expect([serial.rung.raised, serial.in(IIR), serial.in(IIR)]).toEqual([1, 0x02, NO_INTERRUPT]);
    serial.out(IER, ETBEI); // enabled already
    expect([serial.rung.raised, serial.in(IIR)]).toEqual([1, NO_INTERRUPT]);
    serial.out(THR, 0x41);
    expect([serial.rung.raised, serial.in(IIR), serial.in(IIR)]).toEqual([2, 0x02, NO_INTERRUPT]);
    serial.out(IER, 0);
    serial.out(IER, ETBEI);
    expect([serial.rung.raised, serial.in(IIR)]).toEqual([3, 0x02]);
  });

  test('pulse for each byte that is sent, though nobody read IIR', () => {
    const serial = port();
    serial.out(IER, ETBEI);
    serial.send(2);
    expect(serial.rung.raised).toBe(3);
  });

  test('keep THR empty while IIR tells of received bytes', () => {
    const serial = port();
    serial.device.receive(bytes(1));
    serial.out(IER, ERBFI | ETBEI);
    expect([serial.in(IIR), serial.in(IIR)]).toEqual([0x04, 0x04]);
    serial.in(RBR);
    expect(serial.in(IIR)).toBe(0x02);
  });

  test('come for bytes that waited until they were enabled', () => {
    const serial = port();
    serial.device.receive(bytes(1));
    expect([serial.rung.raised, serial.in(IIR)]).toEqual([0, NO_INTERRUPT]);
    serial.out(IER, ERBFI);
    expect(serial.rung.raised).toBe(1);
  });
});

describe('the back pressure of the serial port', () => {
  test('leaves input with the sender, and rings once when there is room', () => {
    const serial = port();
    const taken = serial.device.receive(new Uint8Array(1000));
    expect(taken).toBeLessThan(1000);
    expect(serial.device.receive(bytes(1))).toBe(0);
    let reads = 0;
    for (; serial.rung.room === 0 && reads < taken; reads++) serial.in(RBR);
    expect(serial.device.receive(new Uint8Array(1000))).toBe(reads);
    while ((serial.in(LSR) & DR) !== 0) serial.in(RBR);
    expect(serial.rung.room).toBe(2);
  });

  test('does not ring for input that all found room', () => {
    const serial = port();
    serial.device.receive(new Uint8Array(256));
    while ((serial.in(LSR) & DR) !== 0) serial.in(RBR);
    expect(serial.rung.room).toBe(0);
  });

  test('rings when the driver clears the full FIFO', () => {
    const serial = port();
    serial.out(FCR, 0x01);
    serial.device.receive(new Uint8Array(1000));
    serial.out(FCR, 0x03);
    expect(serial.rung.room).toBe(1);
  });

  test('has a THR empty that promises room for a whole FIFO', () => {
    const serial = port();
    serial.send(5); // so that the ring is no multiple of the FIFO
    const sent = fill(serial);
    expect(serial.drain()).toHaveLength(5 + sent);
  });

  test('clears THR empty while the host is stuck, and raises it when the host drains', () => {
    const serial = port();
    fill(serial);
    serial.out(IER, ETBEI);
    expect([serial.rung.raised, serial.in(IIR), serial.in(LSR) & (THRE | TEMT)]).toEqual([0, NO_INTERRUPT, 0]);
    serial.drain(100);
    expect([serial.rung.raised, serial.in(LSR) & THRE, serial.in(IIR)]).toEqual([1, THRE, 0x02]);
    serial.drain(100);
    expect(serial.rung.raised).toBe(1);
  });

  test('announces output when there is a first byte, not again before all is taken', () => {
    const serial = port();
    serial.send(3);
    expect(serial.rung.output).toBe(1);
    expect(serial.drain(2)).toEqual([0, 1]);
    serial.send(1);
    expect(serial.rung.output).toBe(1);
    expect([serial.drain(), serial.drain()]).toEqual([[2, 0], []]);
    serial.send(1);
    expect(serial.rung.output).toBe(2);
  });
});

/** A driver that looks at the port only on an edge, and until IIR says "none". Each `yield` is one register access. */
class Driver {
  readonly received: number[] = [];
  readonly #queue: number[] = [];
  #running: Generator<void> | undefined;
  edge = false;

  constructor(private readonly serial: { in(register: number): number; out(register: number, value: number): void }) {
    serial.out(FCR, 0xc1);
    serial.out(IER, ERBFI);
  }

  print(values: readonly number[]): void {
    this.#queue.push(...values);
    this.serial.out(IER, ERBFI | ETBEI);
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
    for (;;) {
      const cause = this.serial.in(IIR) & 0x0f;
      yield;
      if (cause === NO_INTERRUPT) return;
      if (cause === 0x02) yield* this.#transmit();
      else {
        while ((this.serial.in(LSR) & DR) !== 0) {
          yield;
          this.received.push(this.serial.in(RBR));
          yield;
        }
      }
    }
  }

  *#transmit(): Generator<void> {
    if (this.#queue.length === 0) this.serial.out(IER, ERBFI);
    else if ((this.serial.in(LSR) & THRE) !== 0) {
      for (const value of this.#queue.splice(0, FIFO_DEPTH)) {
        yield;
        this.serial.out(THR, value);
      }
    }
    yield;
  }
}

/** The host's end: it delivers and drains only when it was told that it can. */
class Host {
  readonly received: number[] = [];
  waiting: number[] = [];
  blocked = false;
  output = false;

  constructor(private readonly device: () => Serial16550) {}

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

/**
 * type, print: new bytes at the host's end, at the driver's; deliver, drain: the host moves up to so many; guest: the driver
 * makes so many register accesses.
 */
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
      fc.property(steps, (script) => {
        const block = new StateBlock(serialLayout);
        const line = { raise: () => void (driver.edge = true) };
        const doorbell = { output: () => void (host.output = true), room: () => void (host.blocked = false) };
        // The guest's thread and the host's each have their own view.
        const views = [0, 1].map(() => new Serial16550(block, line, doorbell));
        const host: Host = new Host(() => views[0]);
        const driver: Driver = new Driver({
          in: (register) => views[1].read(register, 1),
          out: (register, value) => views[1].write(register, 1, value),
        });
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
    register: fc.nat(7),
    size: fc.constantFrom<1 | 2 | 4>(1, 1, 1, 2, 4),
    value: fc.nat(0xff),
    count: fc.nat(300),
    second: fc.boolean(),
  }),
  { maxLength: 200, size: 'max' },
);
type Operation = typeof operations extends fc.Arbitrary<(infer T)[]> ? T : never;

function run(device: Serial16550, { kind, register, size, value, count }: Operation): unknown {
  if (kind === 'read') return device.read(register, size);
  if (kind === 'write') {
    device.write(register, size, value);
    return;
  }
  if (kind === 'receive') return device.receive(bytes(count, value));
  const into = new Uint8Array(count);
  return [...into.subarray(0, device.drainTransmit(into))];
}

describe('two views of one serial port', () => {
  test('are one port', () => {
    fc.assert(
      fc.property(operations, (script) => {
        const shared = new StateBlock(serialLayout);
        const [first, second, alone] = [port(shared), port(shared), port()];
        for (const operation of script) {
          const { device } = operation.second ? second : first;
          expect(run(device, operation)).toEqual(run(alone.device, operation));
        }
        expect(shared.save()).toEqual(alone.block.save());
        const bells = Object.keys(alone.rung) as (keyof typeof alone.rung)[];
        for (const bell of bells) expect(first.rung[bell] + second.rung[bell]).toBe(alone.rung[bell]);
      }),
    );
  });
});
