/** The side of a migration that gets the machine: memory first, while it still runs where it was; then the rest of it. */
import { randomBytes } from 'node:crypto';
import type { Duplex } from 'node:stream';
import { isDeepStrictEqual } from 'node:util';
import { crc32 } from 'node:zlib';
import type { VmConfig } from '../../config/vm-config.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { Origin } from '../machine/incarnation.js';
import { causeMessages } from '../machine/machine-error.js';
import type { MachineParts } from '../machine/machine-parts.js';
import { configAnew, type GivenAnew } from '../snapshot/given-anew.js';
import { decodeMadeOf, decodeState, type MadeOf } from '../snapshot/state-schema.js';
import { ADDRESS_BYTES, Connection, Frame, type Header, PAGE_SIZE } from './frames.js';
import { type Go, readGo, readHello, sayHello } from './messages.js';
import { MigrationError } from './migration-error.js';
import { ReceivedMemory } from './received-memory.js';

export interface ReceivingOptions {
  readonly anew: GivenAnew;
  /** Milliseconds for which the other side may be silent. */
  readonly patience: number;
  /** Called when a machine is on its way, as soon as it is known what it is made of. */
  readonly started: (made: MadeOf) => void;
}

type Parts = Pick<MachineParts, 'kernel' | 'hypervisor'>;

/** Frames that no whole number of pages is in, or none at all. */
function badLength({ kind, length }: Header): MigrationError {
  return new MigrationError(`The other side sent a frame ${kind} of ${length} bytes`);
}

/** @throws MigrationError when it takes longer @param patience milliseconds */
async function within<T>(done: Promise<T>, patience: number, late: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const silence = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new MigrationError(`${late} within ${patience / 1000} s`)), patience);
  });
  try {
    return await Promise.race([done, silence]);
  } finally {
    clearTimeout(timer);
  }
}

/** Connections as they come in: those of one migration, once it is known which. */
class Gate {
  readonly #token = randomBytes(16).toString('hex');
  /** All that are open. */
  readonly #present = new Set<Connection>();
  #first: { readonly connection: Connection; readonly wanted: number } | undefined;
  /** Descriptors of the files that memory is in, where they came. */
  #files: number[] = [];
  readonly #more: Connection[] = [];
  #told: () => void = () => undefined;
  /** Those that have not said what they are belong to nothing any more. */
  #over = false;

  constructor(
    private readonly kernel: HostKernel,
    private readonly patience: number,
  ) {}

  /**
   * Whoever says nothing that makes sense is dropped, and waited for no longer.
   *
   * @param descriptors that came with its first bytes; they are this object's
   */
  async enter(stream: Duplex, descriptors: number[]): Promise<void> {
    const connection = new Connection(stream, this.patience);
    this.#present.add(connection);
    try {
      await this.#know(connection, descriptors);
      this.#told();
    } catch (error) {
      await connection.refuse(causeMessages(error).join(': '));
      this.#present.delete(connection);
    } finally {
      this.#close(descriptors);
    }
  }

  async #know(connection: Connection, descriptors: number[]): Promise<void> {
    let header = await connection.header();
    if (header.kind === Frame.descriptors) {
      const count = (await connection.body(header)).readUInt32LE();
      if (count !== descriptors.length) {
        throw new MigrationError(`The other side sent ${count} descriptors, of which ${descriptors.length} came`);
      }
      header = await connection.header();
    } else if (descriptors.length > 0)
      throw new MigrationError('The other side sent descriptors that it says nothing of');
    const { token, connections } = readHello(await connection.bodyOf(Frame.hello, header));
    if (token === undefined) {
      if (this.#first !== undefined || this.#over) throw new MigrationError('Another machine is on its way here');
      this.#first = { connection, wanted: connections - 1 };
      this.#files = descriptors.splice(0);
      await sayHello(connection, connections, this.#token);
    } else {
      if (token !== this.#token || this.#more.length >= (this.#first?.wanted ?? 0) || this.#over) {
        throw new MigrationError('Accepted are connections of the machine that is on its way here');
      }
      this.#more.push(connection);
    }
  }

  #close(descriptors: number[]): void {
    for (const fd of descriptors.splice(0)) this.kernel.close(fd);
  }

  /**
   * After `first`.
   *
   * @param use given the files that memory is in, which are closed then; undefined: it is sent
   * @throws MigrationError when there are not as many @returns what it returns
   */
  withFiles<T>(ranges: readonly MemoryRange[], use: (files: ReadonlyMap<number, number> | undefined) => T): T {
    const files = this.#files;
    if (files.length === 0) return use(undefined);
    try {
      if (files.length !== ranges.length) {
        throw new MigrationError(
          `The other side sent ${files.length} descriptors of ${ranges.length} stretches of memory`,
        );
      }
      return use(new Map(ranges.map(({ address }, index) => [address, files[index]])));
    } finally {
      this.#close(files);
    }
  }

  /** The one that has answers. */
  async first(): Promise<Connection> {
    while (this.#first === undefined) await this.#news();
    return this.#first.connection;
  }

  /** After `first`. @returns the others, once they are all there */
  async more(): Promise<readonly Connection[]> {
    while (this.#more.length < this.#first!.wanted) {
      if (this.#over) throw new MigrationError('Nobody waits for it');
      await this.#news();
    }
    return this.#more;
  }

  #news(): Promise<void> {
    return new Promise((resolve) => (this.#told = resolve));
  }

  /** Tells all that are there why not, unless they have been ended. */
  async refuse(reason: string): Promise<void> {
    if (this.#over) return;
    this.#over = true;
    this.#close(this.#files);
    this.#told();
    await Promise.all([...this.#present].map((connection) => connection.refuse(reason)));
  }

  end(): void {
    this.#over = true;
    for (const connection of this.#present) void connection.end();
  }
}

/** A machine that has come, all of it, and stands still. */
export interface Arrived {
  readonly config: VmConfig;
  readonly origin: Origin;
  /**
   * Tells the other side that it could go on here, and asks whether it is to.
   *
   * @returns whether it is to run; from then on it is this side's
   * @throws MigrationError: it is not
   */
  prepared(): Promise<boolean>;
  /** The other side is told so, before it runs here. Never rejects. */
  taken(): Promise<void>;
}

export class Receiver {
  readonly #gate: Gate;
  readonly #abandoned: Promise<never>;
  #abandon: (reason: Error) => void = () => undefined;
  #memory: ReceivedMemory | undefined;
  #over = false;

  constructor(
    private readonly parts: Parts,
    private readonly options: ReceivingOptions,
  ) {
    this.#gate = new Gate(parts.kernel, options.patience);
    this.#abandoned = new Promise((_, reject) => (this.#abandon = reject));
    this.#abandoned.catch(() => undefined);
  }

  /** @param descriptors that came with its first bytes; they are closed when they are not needed any more */
  connected(stream: Duplex, descriptors: readonly number[] = []): void {
    void this.#gate.enter(stream, [...descriptors]);
  }

  /** It is not wanted any more: `receive` and `prepared` reject. */
  cancel(reason: Error): void {
    this.#abandon(reason);
  }

  /** @throws MigrationError, SnapshotError, RequestError, MachineError; `failed` is to be called then */
  receive(): Promise<Arrived> {
    return Promise.race([this.#abandoned, this.#receive()]);
  }

  async #receive(): Promise<Arrived> {
    const first = await this.#gate.first();
    // What it says next is waited for all the while: it may be gone before the others are here.
    const more = within(this.#gate.more(), this.options.patience, 'Not all connections of the machine came');
    const [text] = await Promise.all([first.expect(Frame.machine), more]);
    if (this.#over) throw new MigrationError('Nobody waits for it');
    const made = decodeMadeOf(text.toString('utf8'));
    this.options.started(made);
    const config = this.#check(made);
    const { architecture, built, memory: ranges } = made;
    const memory = this.#gate.withFiles(
      ranges,
      (files) => new ReceivedMemory(this.parts.kernel, architecture, built.memory, ranges, files),
    );
    this.#memory = memory;
    await first.send(Frame.accepted);
    const state = await this.#memoryAndState(first, await more, memory);
    const { life } = decodeState(state.toString('utf8'), () => made.config);
    if (!isDeepStrictEqual([life.built, life.memory], [made.built, made.memory])) {
      throw new MigrationError('state: accepted is that of the machine whose memory was sent');
    }
    let go: Go | undefined;
    let heard = 0;
    const passed = () => (go === undefined ? 0 : passedSince(go, heard) * 1e6);
    return {
      config,
      origin: { life, clone: false, received: memory, passed },
      prepared: async () => {
        const asked = async () => {
          await first.send(Frame.prepared);
          return readGo(await first.expect(Frame.go));
        };
        go = await Promise.race([this.#abandoned, asked()]);
        heard = Date.now();
        return go.resume;
      },
      taken: async () => {
        await first.send(Frame.taken).catch(() => undefined);
        this.#gate.end();
      },
    };
  }

  /** @throws MigrationError, RequestError */
  #check({ hypervisor, architecture, config }: MadeOf): VmConfig {
    const here = this.parts.hypervisor;
    if (hypervisor !== here.name || architecture !== here.architecture) {
      throw new MigrationError(
        `A machine of ${architecture} under ${hypervisor}; accepted is one of ${here.architecture} under ${here.name}`,
      );
    }
    return configAnew(config, this.options.anew);
  }

  /** @returns the state */
  async #memoryAndState(first: Connection, more: readonly Connection[], memory: ReceivedMemory): Promise<Buffer> {
    for (let round = 0; ; round++) {
      // The others have nothing but memory to say, and may have none.
      const others = Promise.all(more.map((connection) => this.#memoryUntil(connection, memory, round, Infinity)));
      const broken = others.then(() => new Promise<never>(() => undefined));
      broken.catch(() => undefined);
      const end = await Promise.race([broken, this.#memoryUntil(first, memory, round)]);
      if (end !== undefined) {
        for (const connection of more) connection.destroy();
        return end;
      }
      await within(others, this.options.patience, 'Not all connections brought the memory that was sent on them');
      const answer = Buffer.alloc(4);
      answer.writeUInt32LE(round);
      await first.send(Frame.round, answer);
    }
  }

  /** @returns the state, or undefined at the end of the round */
  async #memoryUntil(
    connection: Connection,
    memory: ReceivedMemory,
    round: number,
    patience = this.options.patience,
  ): Promise<Buffer | undefined> {
    for (;;) {
      const header = await connection.header(patience);
      switch (header.kind) {
        case Frame.memory:
          await this.#take(connection, header, memory);
          break;
        case Frame.round:
          if (header.length !== 4) throw badLength(header);
          if ((await connection.body(header)).readUInt32LE() !== round) {
            throw new MigrationError('The other side sent memory out of turn');
          }
          return undefined;
        case Frame.checksums:
          this.#compare(await connection.body(header), memory);
          break;
        case Frame.state:
          return connection.body(header);
        case Frame.refused:
          throw await connection.refusal(header);
        default:
          throw new MigrationError(`The other side sent a frame ${header.kind} amid memory`);
      }
    }
  }

  async #take(connection: Connection, header: Header, memory: ReceivedMemory): Promise<void> {
    const size = header.length - ADDRESS_BYTES;
    if (size <= 0 || size % PAGE_SIZE !== 0) throw badLength(header);
    let at = addressIn(await connection.start(ADDRESS_BYTES));
    if (at % PAGE_SIZE !== 0 || !memory.bytes.contains(at, size)) {
      throw new MigrationError(`The other side sent memory at 0x${at.toString(16)}, where the machine has none`);
    }
    await connection.rest(size, (part) => {
      memory.bytes.copyIn(at, part, 0, part.length);
      at += part.length;
    });
  }

  #compare(body: Buffer, { bytes }: ReceivedMemory): void {
    const count = (body.length - ADDRESS_BYTES) / 4;
    if (!Number.isInteger(count) || count <= 0) throw new MigrationError('The other side sent checksums of nothing');
    const address = addressIn(body);
    if (!bytes.contains(address, count * PAGE_SIZE)) {
      throw new MigrationError(
        `The other side sent checksums at 0x${address.toString(16)}, where the machine has no memory`,
      );
    }
    const page = Buffer.alloc(PAGE_SIZE);
    const different: number[] = [];
    for (let index = 0; index < count; index++) {
      const at = address + index * PAGE_SIZE;
      bytes.copyOut(at, page, 0, PAGE_SIZE);
      if (crc32(page) !== body.readUInt32LE(ADDRESS_BYTES + index * 4)) different.push(at);
    }
    if (different.length === 0) return;
    const [at] = different;
    throw new MigrationError(`${different.length} pages are not as they were sent, the first at 0x${at.toString(16)}`);
  }

  /** Gives everything back that has come, and tells the other side why. Never rejects. */
  async failed(error: unknown): Promise<void> {
    this.#over = true;
    this.#memory?.close();
    await this.#gate.refuse(causeMessages(error).join(': '));
  }
}

/** Far above 2^53 no guest has memory. */
const addressIn = (bytes: Buffer) => Number(bytes.readBigUInt64LE());

/** Clocks of hosts agree by so much, or are wrong. Milliseconds. */
const CLOCKS_DIFFER = 5000;

/** @param heard when, by this host's clock @returns how long it has stood still by now, milliseconds */
function passedSince({ paused_at: at, paused_for: least }: Go, heard: number): number {
  const now = Date.now();
  const passed = now - at;
  if (passed >= least && passed <= least + CLOCKS_DIFFER) return passed;
  return least + Math.max(0, now - heard);
}
