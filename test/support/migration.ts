/** Both sides of a migration without a hypervisor: a machine of memory alone, and connections whose frames a test may lose. */
import { Duplex } from 'node:stream';
import type { MemoryConfig } from '../../src/config/memory-config.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { memoryOf } from '../../src/vmm/boards/boards.js';
import { MemoryManager } from '../../src/vmm/memory/memory-manager.js';
import { mappedZones } from '../../src/vmm/memory/memory-layout.js';
import { bytesOf } from '../../src/vmm/memory/memory-pages.js';
import { type Arrived, Receiver } from '../../src/vmm/migration/destination.js';
import { Connection, descriptorsFrame, Frame, PAGE_SIZE } from '../../src/vmm/migration/frames.js';
import type { PageSet } from '../../src/vmm/migration/page-set.js';
import { Sender, type SendingOptions, type SendingProgress, type Sent } from '../../src/vmm/migration/source.js';
import type { GuestMemory } from '../../src/memory/guest-memory.js';
import type { SavedMachine } from '../../src/vmm/snapshot/saved-machine.js';
import { encodeMachine, encodeMadeOf } from '../../src/vmm/snapshot/state-schema.js';
import { savedConfig, x86Machine } from './saved-machines.js';

const MIB = 2 ** 20;
export type Side = 'source' | 'destination';
const SIDES: readonly Side[] = ['source', 'destination'];
const other = (side: Side): Side => (side === 'source' ? 'destination' : 'source');
export const FRAME_NAMES = new Map<number, string>(Object.entries(Frame).map(([name, kind]) => [kind, name]));

/** Counts what is mapped. */
export class CountingKernel extends LinuxKernel {
  mapped = 0;

  override map(...args: Parameters<LinuxKernel['map']>): ReturnType<LinuxKernel['map']> {
    const mapping = super.map(...args);
    this.mapped++;
    const unmap = () => {
      this.mapped--;
      mapping.unmap();
    };
    const replace = (fd: number) => mapping.replace(fd);
    return { handle: mapping.handle, view: (...range) => mapping.view(...range), replace, unmap };
  }
}

/** A disk's lock, which the host's kernel takes from a process that is killed. */
export class Lock {
  holder: Side | undefined = 'source';
  readonly dead = new Set<Side>();
  /** Who has had it when somebody else wanted it. */
  refused = 0;

  take(side: Side): void {
    if (this.dead.has(side)) return;
    if (this.holder !== undefined && this.holder !== side) {
      this.refused++;
      throw new Error(`the disk is in use by the ${this.holder}`);
    }
    this.holder = side;
  }

  give(side: Side): void {
    if (this.holder === side) this.holder = undefined;
  }

  kill(side: Side): void {
    this.dead.add(side);
    this.give(side);
  }
}

/** A machine whose state is that of a golden record, and whose guest does nothing but write to memory. */
export class ModelMachine implements Sent {
  readonly saved: SavedMachine;
  readonly #manager: MemoryManager;
  readonly memory: Sent['memory'];
  readonly bytes: GuestMemory;
  readonly made: string;
  running = true;
  tracking = false;
  throttled = 0;
  readonly throttles: number[] = [];
  /** Pages that the guest writes before and after it is asked what it has written. */
  writes = 3;
  /** Called at each step of it. */
  step: (name: string) => Promise<void> | void = () => undefined;
  readonly #log = new Set<number>();
  #next = 0;

  constructor(
    kernel: LinuxKernel,
    private readonly lock: Lock,
    /** Else it is paused already. */
    readonly runs = true,
    { size = 2 * MIB, shared = false } = {},
  ) {
    const { life } = x86Machine('kvm');
    const config = savedConfig(life.board.vcpus.length, { memory: { size, shared, thp: false } });
    this.#manager = memoryManager(kernel, config.memory);
    this.memory = this.#manager.held();
    this.bytes = bytesOf(this.memory);
    const ranges = this.memory.map(({ range }) => range);
    const built = { cpus: config.cpus, memory: config.memory };
    this.saved = { hypervisor: 'kvm', config, life: { ...life, built, memory: ranges } };
    this.made = encodeMadeOf({ hypervisor: 'kvm', architecture: 'x86_64', config, built, memory: ranges });
    this.running = runs;
    for (let page = 0; page < 20; page++) this.write(page * 7);
  }

  get pages(): number {
    return this.memory.reduce((sum, { range }) => sum + range.size, 0) / PAGE_SIZE;
  }

  /** @param page of all that there are */
  #address(page: number): number {
    let left = page;
    for (const { range } of this.memory) {
      if (left < range.size / PAGE_SIZE) return range.address + left * PAGE_SIZE;
      left -= range.size / PAGE_SIZE;
    }
    throw new Error('no such page');
  }

  write(page: number): void {
    const address = this.#address(page % this.pages);
    this.bytes.copyIn(address + (this.#next % 4000), Buffer.from(`${page} ${this.#next++}`), 0, 8);
    this.#log.add(address);
  }

  async trackWrites(): Promise<void> {
    await this.step('trackWrites');
    this.tracking = true;
    this.#log.clear();
  }

  takeWritten({ range }: PageSet, into: Uint32Array): void {
    this.#guestWrites();
    for (const address of this.#log) {
      const page = (address - range.address) / PAGE_SIZE;
      if (page < 0 || page >= range.size / PAGE_SIZE) continue;
      into[page >>> 5] |= 1 << (page & 31);
      this.#log.delete(address);
    }
    // While it is sent.
    this.#guestWrites();
  }

  #guestWrites(): void {
    if (!this.running) return;
    const writes = Math.ceil((this.writes * (100 - this.throttled)) / 100);
    for (let count = 0; count < writes; count++) this.write(this.#next * 13);
  }

  async endTracking(): Promise<void> {
    await this.step('endTracking');
    this.tracking = false;
  }

  async throttle(percent: number): Promise<void> {
    await this.step('throttle');
    this.throttled = percent;
    this.throttles.push(percent);
  }

  async pause(): Promise<void> {
    await this.step('pause');
    this.running = false;
  }

  resume(): void {
    this.running = true;
  }

  async save(): Promise<string> {
    await this.step('save');
    if (this.running) throw new Error('saved while it ran');
    // As the ITS's tables are.
    this.write(1);
    return encodeMachine(this.saved).state;
  }

  release(): void {
    this.lock.give('source');
  }

  retake(): void {
    this.lock.take('source');
  }

  contents(): Buffer {
    return contentsOf(this.bytes, this.memory);
  }

  close(): void {
    this.#manager.close();
  }
}

export function contentsOf(bytes: GuestMemory, memory: Sent['memory']): Buffer {
  const parts = memory.map(({ range }) => {
    const part = Buffer.alloc(range.size);
    bytes.copyOut(range.address, part, 0, range.size);
    return part;
  });
  return Buffer.concat(parts);
}

export function memoryManager(kernel: LinuxKernel, memory: MemoryConfig): MemoryManager {
  return new MemoryManager(kernel, memory, mappedZones(memoryOf('x86_64', memory), memory));
}

/** Where something happens to a connection. */
export interface Fault {
  readonly connection: number;
  /** Who sends the frame. */
  readonly from: Side;
  readonly frame: string;
  /** Of those of its kind on its way there, from 0 on. */
  readonly nth: number;
  readonly when: 'before' | 'after';
  readonly what:
    'the source is killed' | 'the destination is killed' | 'all breaks' | 'it breaks' | 'it ends' | 'all stalls';
}

export interface Passed {
  readonly connection: number;
  readonly from: Side;
  readonly frame: string;
  readonly nth: number;
  readonly bytes: Buffer;
}

const HEADER = 12;

class End extends Duplex {
  waiting: (() => void) | undefined;

  constructor(
    private readonly line: Line,
    readonly side: Side,
  ) {
    super({ allowHalfOpen: true, autoDestroy: true });
  }

  override _read(): void {
    this.waiting?.();
    this.waiting = undefined;
  }

  override _write(chunk: Buffer, _encoding: string, done: (error?: Error) => void): void {
    this.line.write(this.side, chunk, done);
  }

  override _final(done: () => void): void {
    this.line.end(this.side);
    done();
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    this.line.gone(this.side);
    done(error);
  }
}

/** One connection, frame by frame. */
class Line {
  readonly ends: Readonly<Record<Side, End>> = {
    source: new End(this, 'source'),
    destination: new End(this, 'destination'),
  };
  readonly #left: Record<Side, Buffer> = { source: Buffer.alloc(0), destination: Buffer.alloc(0) };
  readonly #counts = new Map<string, number>();
  stalled = false;

  constructor(
    private readonly network: Network,
    readonly number: number,
  ) {}

  write(from: Side, chunk: Buffer, done: (error?: Error) => void): void {
    let bytes = Buffer.concat([this.#left[from], chunk]);
    while (bytes.length >= HEADER && bytes.length >= HEADER + bytes.readUInt32LE(4)) {
      const length = HEADER + bytes.readUInt32LE(4);
      this.#pass(from, bytes.subarray(0, length));
      bytes = bytes.subarray(length);
    }
    this.#left[from] = bytes;
    if (this.stalled) return;
    const to = this.ends[other(from)];
    if (to.destroyed) done(Object.assign(new Error('write EPIPE'), { code: 'EPIPE' }));
    else void this.network.delay().then(() => done());
  }

  #pass(from: Side, bytes: Buffer): void {
    const frame = FRAME_NAMES.get(bytes.readUInt16LE(0))!;
    const key = `${from} ${frame}`;
    const nth = this.#counts.get(key) ?? 0;
    this.#counts.set(key, nth + 1);
    const passed = { connection: this.number, from, frame, nth, bytes: Buffer.from(bytes) };
    this.network.said.add(`${from} ${frame}`);
    this.network.happens(passed, 'before');
    const to = this.ends[other(from)];
    if (!this.stalled && !to.destroyed && !to.readableEnded && !this.ends[from].destroyed) {
      this.network.passed.push(passed);
      to.push(passed.bytes);
      this.network.happens(passed, 'after');
    }
  }

  end(from: Side): void {
    const to = this.ends[other(from)];
    if (!this.stalled && !to.destroyed) to.push(null);
  }

  /** What has been written before arrives, as with a socket that is closed. */
  gone(from: Side): void {
    this.end(from);
  }

  break(): void {
    const reset = () => Object.assign(new Error('read ECONNRESET'), { code: 'ECONNRESET' });
    for (const side of SIDES) this.ends[side].destroy(reset());
  }
}

/** All connections between two sides. */
export class Network {
  readonly lines: Line[] = [];
  readonly passed: Passed[] = [];
  /** Kinds of frames that somebody has sent, whether they arrived or not. */
  readonly said = new Set<string>();
  /** Whether the fault has come. */
  happened = false;
  /** How long what is written takes. */
  delay: () => Promise<void> = () => Promise.resolve();
  killed: (side: Side) => void = () => undefined;
  watch: (passed: Passed) => void = () => undefined;

  constructor(readonly fault?: Fault) {}

  /** @returns the source's end of a new one */
  connect(accept: (end: Duplex) => void): Duplex {
    const line = new Line(this, this.lines.length);
    if (this.happened && this.fault?.what.includes('stall') === true) line.stalled = true;
    this.lines.push(line);
    accept(line.ends.destination);
    return line.ends.source;
  }

  happens(passed: Passed, when: Fault['when']): void {
    if (when === 'after') this.watch(passed);
    const { fault } = this;
    if (fault === undefined || this.happened || fault.when !== when) return;
    if (fault.connection !== passed.connection || fault.from !== passed.from) return;
    if (fault.frame !== passed.frame || fault.nth !== passed.nth) return;
    this.happened = true;
    const line = this.lines[passed.connection];
    switch (fault.what) {
      case 'the source is killed':
        this.kill('source');
        break;
      case 'the destination is killed':
        this.kill('destination');
        break;
      case 'all breaks':
        for (const each of this.lines) each.break();
        break;
      case 'it breaks':
        line.break();
        break;
      case 'it ends':
        for (const side of SIDES) line.ends[side].push(null);
        line.stalled = true;
        break;
      case 'all stalls':
        for (const each of this.lines) each.stalled = true;
        break;
    }
  }

  /** What it has sent arrives; nothing that it does from now on has any effect. */
  kill(side: Side): void {
    this.killed(side);
    for (const line of this.lines) {
      line.end(side);
      line.stalled = true;
      line.ends[side].destroy(new Error('killed'));
    }
  }

  /** Resolves when each end of all has been closed. */
  async closed(): Promise<void> {
    const ends = this.lines.flatMap((line) => SIDES.map((side) => line.ends[side]));
    await Promise.all(
      ends.filter((end) => !end.closed).map((end) => new Promise((resolve) => end.once('close', resolve))),
    );
  }

  /** Those that somebody has not closed. */
  get open(): string[] {
    return this.lines.flatMap(({ ends, number }) =>
      SIDES.filter((side) => !ends[side].destroyed).map((side) => `${number} ${side}`),
    );
  }
}

export const OPTIONS: Omit<SendingOptions, 'progress'> = {
  ...{ downtime_ms: 1, timeout_s: 60, timeout_strategy: 'Cancel', connections: 1, verify: true, auto_converge: false },
  ...{ local: false },
  patience: 60_000,
};

/** How it has ended for one side. */
export type Outcome = { readonly error: unknown } | undefined;

/** A whole migration. */
export class Migration {
  readonly kernels: Readonly<Record<Side, CountingKernel>> = {
    source: new CountingKernel(),
    destination: new CountingKernel(),
  };
  readonly lock = new Lock();
  readonly machine: ModelMachine;
  readonly receiver: Receiver;
  readonly progress: SendingProgress[] = [];
  readonly network: Network;
  readonly ended = new AbortController();
  sender: Sender | undefined;
  /** Whether the machine runs at the destination. */
  arrived: 'running' | 'paused' | undefined;
  received: Buffer | undefined;
  /** Called before the destination says that it could go on. */
  starting: () => Promise<void> | void = () => undefined;
  begun = 0;
  #memory: MemoryManager | undefined;

  constructor(
    fault?: Fault,
    private readonly options: Partial<SendingOptions> = {},
    runs = true,
  ) {
    this.network = new Network(fault);
    this.network.killed = (side) => {
      this.lock.kill(side);
      if (side === 'source') this.machine.running = false;
      else this.arrived = undefined;
    };
    this.machine = new ModelMachine(this.kernels.source, this.lock, runs, { shared: options.local === true });
    const { patience = OPTIONS.patience } = options;
    const hypervisor = { name: 'kvm', architecture: 'x86_64' } as never;
    const parts = { kernel: this.kernels.destination, hypervisor };
    this.receiver = new Receiver(parts, { anew: { descriptors: new Map() }, patience, started: () => this.begun++ });
  }

  get dead(): ReadonlySet<Side> {
    return this.lock.dead;
  }

  async source(): Promise<Outcome> {
    const options = { ...OPTIONS, progress: (now: SendingProgress) => this.progress.push(now), ...this.options };
    const connect = (_ended: AbortSignal, descriptors: readonly number[]) => {
      const there = descriptors.map((fd) => this.kernels.destination.duplicate(fd));
      const stream = this.network.connect((end) => this.receiver.connected(end, there));
      if (there.length > 0) stream.write(descriptorsFrame(there.length));
      return Promise.resolve(new Connection(stream, options.patience));
    };
    try {
      this.sender = await Sender.open(this.machine, connect, options, this.ended.signal);
      await this.sender.run();
      return undefined;
    } catch (error) {
      return { error };
    }
  }

  /** As `Vmm.receiveMigration`. */
  async destination(): Promise<Outcome> {
    const { receiver, lock } = this;
    try {
      await this.#takeOver(await receiver.receive());
      return undefined;
    } catch (error) {
      lock.give('destination');
      await receiver.failed(error);
      return { error };
    }
  }

  async #takeOver(arrived: Arrived): Promise<void> {
    const memory = (arrived.origin.received as { take(): MemoryManager }).take();
    let runs: boolean;
    try {
      await this.starting();
      this.lock.take('destination');
      runs = await arrived.prepared();
    } catch (error) {
      memory.close();
      throw error;
    }
    await arrived.taken();
    this.#memory = memory;
    this.received = contentsOf(bytesOf(memory.held()), memory.held());
    if (!this.dead.has('destination')) this.arrived = runs ? 'running' : 'paused';
  }

  /** Until neither side does anything any more. */
  async run(): Promise<Readonly<Record<Side, Outcome>>> {
    const destination = this.destination();
    const source = await this.source();
    // A receiver waits for ever for one who says what it is.
    if (!this.network.said.has('destination hello')) this.receiver.cancel(new Error('nobody came'));
    return { source, destination: await destination };
  }

  close(): void {
    this.#memory?.close();
    this.machine.close();
  }
}
