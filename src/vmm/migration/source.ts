/**
 * The side of a migration that has the machine: memory is sent while it runs, again what it has written meanwhile, and the rest while
 * it stands still.
 *
 * Who has the machine is decided by two frames. Until `go` is sent it is this side's, and it goes on here whatever fails. The destination
 * answers `taken` before it lets anything run. So where it refuses, or the connection ends in order without that answer, the destination
 * has run nothing, and the machine goes on here; where it breaks, nobody here knows, and the machine stands still until a user does.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { crc32 } from 'node:zlib';
import type { SendMigrationConfig } from '../../config/migration-config.js';
import type { GuestMemory, MemoryRange } from '../../memory/guest-memory.js';
import { bytesOf, type HeldMemory } from '../memory/memory-pages.js';
import { ADDRESS_BYTES, type Connection, Frame, MEMORY_AT_ONCE, PAGE_SIZE } from './frames.js';
import { type Go, readHello, sayHello } from './messages.js';
import { ConnectionLost, MigrationError, Refused } from './migration-error.js';
import { heldPages, PageSet } from './page-set.js';

/** The machine, as it is sent. */
export interface Sent {
  /** In JSON: what it is made of. */
  readonly made: string;
  readonly memory: readonly HeldMemory[];
  readonly runs: boolean;
  /** From now on `takeWritten` tells. @throws MachineError, HypervisorError or SystemError */
  trackWrites(): Promise<void>;
  /** What has been written to a stretch since it was last asked. @param into as the words of `stretch` */
  takeWritten(stretch: PageSet, into: Uint32Array): void;
  endTracking(): Promise<void>;
  /** Lets its vCPUs run for a part of the time alone. @param percent for which they stand still */
  throttle(percent: number): Promise<void>;
  /** @throws RequestError when it ends meanwhile */
  pause(): Promise<void>;
  resume(): void;
  /** After `pause`. @returns in JSON: where it stands */
  save(): Promise<string>;
  /** Its disks may be another process's. */
  release(): void;
  /** They are this one's again. @throws MachineError when somebody has them */
  retake(): void;
}

/** @param signal gives up @param descriptors that go with its first bytes */
export type Connect = (signal: AbortSignal, descriptors: readonly number[]) => Promise<Connection>;

/** How it goes. */
export interface SendingProgress {
  /** Memory is being sent for the so manieth time, from 0 on. */
  readonly round: number;
  /** Bytes sent in all. */
  readonly sent: number;
  /** Bytes of memory that have been written since they were sent. */
  readonly remaining: number;
  /** Percent of the time for which vCPUs are held back. */
  readonly throttled: number;
}

export interface SendingOptions extends Omit<SendMigrationConfig, 'destination_url' | 'tls_dir'> {
  readonly progress: (progress: SendingProgress) => void;
  /** Milliseconds for which the other side may be silent. */
  readonly patience: number;
}

/** The destination may have the machine; it stands still here. */
export class UnknownOutcome extends MigrationError {}

/** vCPUs are held back more when a round leaves more than this part of what the one before left. */
const CONVERGES = 0.7;
const FIRST_THROTTLE = 20;
const THROTTLE_STEP = 10;
const MAX_THROTTLE = 99;
/** For a destination that is killed, the host's kernel gives its locks back in a moment. Milliseconds. */
const LOCK_PATIENCE = 5000;
const LOCK_INTERVAL = 20;

const ANSWERS: ReadonlySet<number> = new Set([Frame.round, Frame.prepared, Frame.taken]);

/** What the destination says, read all the time: so a refusal is heard while memory is being sent. */
class Answers {
  /** At most one, as nothing is said that was not asked for. */
  #kind: number | undefined;
  #failure: Error | undefined;
  #told: () => void = () => undefined;

  /** @param onFailure called when it refuses, or is gone */
  constructor(
    private readonly connection: Connection,
    private readonly onFailure: (error: Error) => void,
  ) {
    void this.#read();
  }

  async #read(): Promise<void> {
    try {
      for (;;) {
        const header = await this.connection.header(Infinity);
        if (header.kind === Frame.refused) throw await this.connection.refusal(header);
        if (!ANSWERS.has(header.kind) || this.#kind !== undefined) {
          throw new MigrationError(`The other side sent a frame ${header.kind} that nobody waits for`);
        }
        await this.connection.body(header);
        this.#kind = header.kind;
        this.#told();
      }
    } catch (error) {
      this.#fail(error as Error);
      this.onFailure(error as Error);
    }
  }

  #fail(error: Error): void {
    this.#failure ??= error;
    this.#told();
  }

  /** @throws MigrationError */
  async next(kind: Frame, patience: number): Promise<void> {
    const silent = new ConnectionLost(`The other side has said nothing for ${patience / 1000} s`, false);
    const timer = setTimeout(() => this.#fail(silent), patience);
    try {
      while (this.#kind === undefined) {
        if (this.#failure !== undefined) throw this.#failure;
        await new Promise<void>((resolve) => (this.#told = resolve));
      }
    } finally {
      clearTimeout(timer);
    }
    const said = this.#kind;
    this.#kind = undefined;
    if (said !== kind) throw new MigrationError(`The other side sent a frame ${said} instead of ${kind}`);
  }
}

export class Sender {
  readonly #connections: Connection[];
  readonly #memory: GuestMemory;
  readonly #answers: Answers;
  #round = 0;
  #throttled = 0;
  /** Why it was given up: the first reason. */
  #failure: Error | undefined;
  /** The other side hears of it. */
  #parting: Promise<unknown> = Promise.resolve();
  /** Whose the machine is, is the other side's to say. */
  #gone = false;

  private constructor(
    private readonly machine: Sent,
    connections: readonly Connection[],
    private readonly options: SendingOptions,
    private readonly ended: AbortSignal,
  ) {
    this.#connections = [...connections];
    this.#memory = bytesOf(machine.memory);
    this.#answers = new Answers(connections[0], (error) => this.#giveUp(error));
    ended.addEventListener('abort', () => this.#giveUp(ended.reason as Error), { once: true });
  }

  /**
   * Finds out whether the destination would take the machine.
   *
   * @param connect makes one more connection to it, which begins with these descriptors
   * @param ended aborted, with the reason, when the machine ends; it goes on nowhere then
   * @throws MigrationError, or that reason; nothing is left open then
   */
  static async open(machine: Sent, connect: Connect, options: SendingOptions, ended: AbortSignal): Promise<Sender> {
    const connections: Connection[] = [];
    const destroy = () => {
      for (const connection of connections) connection.destroy();
    };
    ended.addEventListener('abort', destroy);
    try {
      const files = options.local ? machine.memory.map(({ file }) => file!) : [];
      const add = async () => {
        const connection = await connect(ended, connections.length === 0 ? files : []);
        connections.push(connection);
        ended.throwIfAborted();
        return connection;
      };
      const first = await add();
      await sayHello(first, options.connections);
      const { token } = readHello(await first.expect(Frame.hello));
      while (connections.length < options.connections) await sayHello(await add(), options.connections, token);
      await first.send(Frame.machine, Buffer.from(machine.made));
      await first.expect(Frame.accepted);
      ended.throwIfAborted();
      return new Sender(machine, connections, options, ended);
    } catch (error) {
      destroy();
      throw ended.aborted ? ended.reason : error;
    } finally {
      ended.removeEventListener('abort', destroy);
    }
  }

  /** Gives up, and the machine goes on here. @returns false: it is the destination's to say whether it does */
  cancel(reason: Error): boolean {
    if (!this.#gone) this.#giveUp(reason);
    return !this.#gone;
  }

  #giveUp(reason: Error): void {
    if (this.#failure !== undefined) return;
    this.#failure = reason;
    const each = this.#connections;
    if (this.#gone || reason instanceof Refused || reason instanceof ConnectionLost) {
      for (const connection of each) connection.destroy();
    } else this.#parting = Promise.all(each.map((connection) => connection.refuse(reason.message)));
  }

  /** @throws why it was given up */
  #check(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  /** Nothing is sent behind a refusal. */
  async #send(connection: Connection, kind: Frame, bytes: Uint8Array): Promise<void> {
    this.#check();
    await connection.send(kind, bytes);
  }

  /**
   * Sends the machine; it is the destination's then.
   *
   * @throws UnknownOutcome, or what it failed with; the machine is as it was then
   */
  async run(): Promise<void> {
    const { machine } = this;
    let paused = false;
    let released = false;
    const { timeout_s: most, timeout_strategy: then } = this.options;
    const late = () => this.cancel(new MigrationError(`It is not done after ${most} s`));
    const timer = then === 'Cancel' ? setTimeout(late, most * 1000) : undefined;
    try {
      this.#check();
      const { local } = this.options;
      const left = local ? [] : await this.#preCopy();
      await machine.throttle(0);
      const stood = performance.now();
      const wallClock = Date.now();
      if (machine.runs) await machine.pause();
      paused = machine.runs;
      this.#check();
      const state = await machine.save();
      // What the hypervisor saves in guest memory is there now.
      if (!local) await this.#sendRound(this.#written(left));
      if (this.options.verify) await this.#sendChecksums();
      released = true;
      machine.release();
      const [first] = this.#connections;
      await this.#send(first, Frame.state, Buffer.from(state));
      await this.#answers.next(Frame.prepared, this.options.patience);
      const go: Go = { resume: machine.runs, paused_at: wallClock, paused_for: performance.now() - stood };
      this.#check();
      this.#gone = true;
      await first.sendJson(Frame.go, go);
      await this.#answers.next(Frame.taken, this.options.patience);
      await Promise.all(this.#connections.map((connection) => connection.end()));
    } catch (error) {
      this.#giveUp(error as Error);
      const reason = this.#failure!;
      // A machine that has ended meanwhile does neither.
      await machine.throttle(0).catch(() => undefined);
      await machine.endTracking().catch(() => undefined);
      const stays = reason instanceof Refused || (reason instanceof ConnectionLost && reason.ended);
      if (this.#gone && !stays) throw unknown(reason);
      // Else its disks are nobody's.
      if (!this.ended.aborted) {
        if (released) await this.#retake();
        if (paused) machine.resume();
      }
      throw reason;
    } finally {
      clearTimeout(timer);
      await this.#parting;
    }
  }

  async #retake(): Promise<void> {
    for (let waited = 0; ; waited += LOCK_INTERVAL) {
      try {
        this.machine.retake();
        return;
      } catch (error) {
        if (waited >= Math.min(LOCK_PATIENCE, this.options.patience)) throw unknown(error);
      }
      await sleep(LOCK_INTERVAL);
    }
  }

  /** Until what is left can be sent while it stands still, or it takes too long. @returns that */
  async #preCopy(): Promise<readonly PageSet[]> {
    const { machine, options } = this;
    const begun = performance.now();
    await machine.trackWrites();
    let left: readonly PageSet[] = await this.#held();
    for (let before = Infinity; ;) {
      const start = performance.now();
      const bytes = await this.#sendRound(left);
      const rate = bytes / Math.max(performance.now() - start, 1);
      left = this.#written();
      if (!machine.runs) return left;
      const remaining = bytesIn(left);
      this.#tell(remaining);
      if (remaining <= rate * options.downtime_ms) return left;
      if (options.timeout_strategy === 'Ignore' && performance.now() - begun > options.timeout_s * 1000) return left;
      if (options.auto_converge && remaining > before * CONVERGES) await this.#throttleMore();
      before = remaining;
      // Who gives up has a turn also where nothing is waited for.
      await new Promise(setImmediate);
    }
  }

  /** What of memory there is. */
  async #held(): Promise<PageSet[]> {
    const sets: PageSet[] = [];
    for (const stretch of this.machine.memory) {
      this.#check();
      sets.push(await heldPages(stretch));
    }
    return sets;
  }

  async #throttleMore(): Promise<void> {
    this.#throttled = this.#throttled === 0 ? FIRST_THROTTLE : Math.min(this.#throttled + THROTTLE_STEP, MAX_THROTTLE);
    await this.machine.throttle(this.#throttled);
  }

  #tell(remaining: number): void {
    const sent = this.#connections.reduce((sum, connection) => sum + connection.sent, 0);
    this.options.progress({ round: this.#round - 1, sent, remaining, throttled: this.#throttled });
  }

  /** @param left still to be sent; new sets, if there are none @returns these, with the pages that have been written since */
  #written(left: readonly PageSet[] = this.machine.memory.map(({ range }) => new PageSet(range))): readonly PageSet[] {
    for (const pages of left) {
      const written = new Uint32Array(pages.words.length);
      this.machine.takeWritten(pages, written);
      pages.addAll(written);
    }
    return left;
  }

  /** @returns bytes of memory; the destination has them */
  async #sendRound(sets: readonly PageSet[]): Promise<number> {
    const runs = runsIn(sets);
    const round = Buffer.alloc(4);
    round.writeUInt32LE(this.#round++);
    let bytes = 0;
    const line = async (connection: Connection) => {
      try {
        for (const run of runs) {
          await this.#sendPages(connection, run);
          bytes += run.size;
        }
        await this.#send(connection, Frame.round, round);
      } catch (error) {
        this.#giveUp(error as Error);
      }
    };
    // Nobody reads memory any more when one has failed.
    await Promise.all(this.#connections.map(line));
    this.#check();
    await this.#answers.next(Frame.round, this.options.patience);
    return bytes;
  }

  /** A copy is sent, as the guest goes on writing: the checksum has to be that of what is sent. */
  async #sendPages(connection: Connection, { address, size }: MemoryRange): Promise<void> {
    this.#check();
    const bytes = Buffer.allocUnsafeSlow(ADDRESS_BYTES + size);
    bytes.writeBigUInt64LE(BigInt(address));
    this.#memory.copyOut(address, bytes, ADDRESS_BYTES, size);
    await connection.send(Frame.memory, bytes);
  }

  /** Of all pages that hold something, so that the destination can look for one that was missed. */
  async #sendChecksums(): Promise<void> {
    const [first] = this.#connections;
    const page = Buffer.alloc(PAGE_SIZE);
    for (const memory of this.machine.memory) {
      for (const { address, size } of (await heldPages(memory)).runs(MEMORY_AT_ONCE)) {
        const count = size / PAGE_SIZE;
        const frame = Buffer.alloc(ADDRESS_BYTES + count * 4);
        frame.writeBigUInt64LE(BigInt(address));
        this.#check();
        for (let index = 0; index < count; index++) {
          this.#memory.copyOut(address + index * PAGE_SIZE, page, 0, PAGE_SIZE);
          frame.writeUInt32LE(crc32(page), ADDRESS_BYTES + index * 4);
        }
        await this.#send(first, Frame.checksums, frame);
      }
    }
  }
}

function unknown(reason: unknown): UnknownOutcome {
  const why = reason instanceof Error ? reason.message : String(reason);
  return new UnknownOutcome(
    `${why}; the destination may have the machine, which stands still here: vm.resume when it has not, vm.delete when it has`,
    { cause: reason },
  );
}

/** One after the other, for whoever asks next. */
function* runsIn(sets: readonly PageSet[]): Generator<MemoryRange> {
  for (const set of sets) yield* set.runs(MEMORY_AT_ONCE);
}

const bytesIn = (sets: readonly PageSet[]) => sets.reduce((sum, { count }) => sum + count, 0) * PAGE_SIZE;
