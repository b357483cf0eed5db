/**
 * Output to a host that may not take it: a terminal that is stopped, a pipe that nobody reads, a disk that is full.
 *
 * Nothing here waits. What the host does not take is kept in a ring and tried again from time to time; who writes is held
 * back, or loses the oldest bytes, once the ring is full. At the end as much is written as a reader still takes.
 */
import fs from 'node:fs';
import { errnoText, type HostKernel } from '../../sys/host-kernel.js';

/** Bytes that may wait for a host that does not read. */
const FULL = 64 * 1024;
/** The ring takes more than that: what devices still hold at the end of an incarnation must not push older bytes out. */
const RING = FULL + 32 * 1024;
/**
 * Until the host is asked again, while it takes nothing: at first, and at most. libuv can wait until a descriptor takes output
 * only for kinds that it writes to itself, and those it sets to non-blocking for all who share them, or blocks on.
 */
const FIRST_RETRY_MILLISECONDS = 5;
const LAST_RETRY_MILLISECONDS = 100;
/** At the end: how long a host may take nothing before it is given up, and how long one may take that takes little. */
const PATIENCE_MILLISECONDS = 2000;
const CLOSE_MILLISECONDS = 10_000;
/**
 * At the end: how long a reader may leave what the kernel has for it, and would lose when the descriptor is closed. Bytes on
 * their way through the kernel are not counted for a moment, so none left must also hold so long.
 */
const PENDING_MILLISECONDS = 250;
/** A pipe that poll(2) says to be writable takes so much at once (pipe(7), PIPE_BUF). */
const PIPE_BUF = 4096;
const EAGAIN = 11;
const NEWLINE = 0x0a;

/** A descriptor that output goes to. */
export interface OutputTarget {
  readonly fd: number;
  /** Bytes that may be written at a time: fewer where the descriptor blocks, and has only said to be writable. */
  readonly piece: number;
  /** Bytes that the kernel has and a reader has not, where closing the descriptor loses them. */
  pending?(): number;
  close(): void;
}

/** node:tty, and node:net with it, is loaded where a descriptor may be a terminal: it takes a start as long as a tenth of bare Node.js. */
export function isTerminal(fd: number): boolean {
  return fs.fstatSync(fd).isCharacterDevice() && process.getBuiltinModule('node:tty').isatty(fd);
}

/**
 * A descriptor that this process was given, standard output say, as something of its own: its open file description is shared with other processes, for
 * which it stays as it is. Pipes and terminals are opened once more; sockets are asked not to wait at each call; files do not.
 */
export function openInherited(fd: number): OutputTarget {
  const terminal = isTerminal(fd);
  const shared: OutputTarget = { fd, piece: Infinity, close: () => undefined };
  if (!terminal && !fs.fstatSync(fd).isFIFO()) return shared;
  try {
    const name = `/proc/self/fd/${fd}`;
    // A pseudo-terminal's master would become another pseudo-terminal's.
    if (fs.readlinkSync(name).endsWith('/ptmx')) return { ...shared, piece: 1 };
    const { O_WRONLY, O_NONBLOCK, O_NOCTTY } = fs.constants;
    const own = fs.openSync(name, O_WRONLY | O_NONBLOCK | O_NOCTTY);
    return { fd: own, piece: Infinity, close: () => fs.closeSync(own) };
  } catch {
    // Another user's. A terminal that is writable may have room for one byte.
    return { ...shared, piece: terminal ? 1 : PIPE_BUF };
  }
}

/**
 * A file, made or cut off or added to; also a FIFO that somebody reads, or a device.
 *
 * @throws Error of node:fs
 */
export function openOutputFile(path: string, flags: { readonly truncate: boolean }): OutputTarget {
  const { O_WRONLY, O_CREAT, O_APPEND, O_TRUNC, O_NONBLOCK, O_NOCTTY } = fs.constants;
  // Appending, so that two who have the same file, or one who cuts it off meanwhile, lose nothing of it.
  const all = O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_NOCTTY;
  const fd = fs.openSync(path, flags.truncate ? all | O_TRUNC : all, 0o666);
  return { fd, piece: Infinity, close: () => fs.closeSync(fd) };
}

export interface HostOutputOptions {
  /** Whether who writes is held back while the host takes nothing; else the oldest bytes are dropped. */
  readonly hold: boolean;
  /** What is written are lines: each is kept or dropped whole, and lines are counted in the place of bytes. */
  readonly lines?: boolean;
  /** The host refuses output, and not for the same reason as before; what comes is dropped until it takes some again. */
  readonly refused: (reason: string) => void;
  /** The host takes output again, or it ends. @param count bytes or lines dropped meanwhile */
  readonly lost: (count: number) => void;
}

export class HostOutput {
  /** After `write` has answered false: there is room again. */
  onDrain: () => void = () => undefined;
  #ring: Uint8Array | undefined;
  #head = 0;
  #count = 0;
  #held = false;
  /** Bytes or lines that were dropped since `lost` was told. */
  #lost = 0;
  /** The errno that `refused` was told; 0: the host takes output. */
  #errno = 0;
  #timer: NodeJS.Timeout | undefined;
  #delay = FIRST_RETRY_MILLISECONDS;
  /** When the host last took something. */
  #taken = performance.now();

  constructor(
    private readonly kernel: HostKernel,
    private readonly target: OutputTarget,
    private readonly options: HostOutputOptions,
  ) {}

  /** Copies the bytes. @returns false when further ones are to be held back until `onDrain` */
  write(bytes: Uint8Array): boolean {
    const rest = this.#count > 0 ? bytes : bytes.subarray(this.#send(bytes));
    if (rest.length > 0) this.#keep(rest);
    this.#held = this.options.hold && this.#count >= FULL;
    return !this.#held;
  }

  /** @returns bytes that are done with: taken, or dropped as the host refuses them */
  #send(bytes: Uint8Array): number {
    let done = 0;
    while (done < bytes.length) {
      const piece = bytes.subarray(done, Math.min(bytes.length, done + this.target.piece));
      const result = this.kernel.writeNow(this.target.fd, piece);
      if (result === -EAGAIN) break;
      if (result < 0) {
        this.#refuse(-result, bytes.subarray(done));
        return bytes.length;
      }
      done += result;
      this.#taken = performance.now();
      this.#errno = 0;
      this.#tellLost();
    }
    return done;
  }

  #refuse(errno: number, bytes: Uint8Array): void {
    this.#drop(bytes);
    if (errno === this.#errno) return;
    this.#errno = errno;
    this.options.refused(errnoText(errno));
  }

  #tellLost(): void {
    const lost = this.#lost;
    this.#lost = 0;
    if (lost > 0) this.options.lost(lost);
  }

  #drop(bytes: Uint8Array): void {
    this.#lost += this.options.lines === true ? bytes.filter((byte) => byte === NEWLINE).length : bytes.length;
  }

  /** Puts bytes in the ring; the oldest make room. A line that finds none is dropped. */
  #keep(bytes: Uint8Array): void {
    const ring = (this.#ring ??= new Uint8Array(RING));
    if (this.options.lines === true && this.#count + bytes.length > RING) {
      this.#drop(bytes);
      return;
    }
    const kept = bytes.subarray(Math.max(bytes.length - RING, 0));
    const excess = Math.max(this.#count + kept.length - RING, 0);
    this.#forget(excess);
    this.#lost += excess + bytes.length - kept.length;
    const tail = (this.#head + this.#count) % RING;
    const first = kept.subarray(0, RING - tail);
    ring.set(first, tail);
    ring.set(kept.subarray(first.length), 0);
    this.#count += kept.length;
    this.#timer ??= setTimeout(() => this.#retry(), this.#delay).unref();
  }

  #forget(count: number): void {
    this.#head = (this.#head + count) % RING;
    this.#count -= count;
  }

  #retry(): void {
    this.#timer = undefined;
    const before = this.#count;
    this.#flush();
    this.#delay = this.#count < before ? FIRST_RETRY_MILLISECONDS : Math.min(this.#delay * 2, LAST_RETRY_MILLISECONDS);
    if (this.#count > 0) this.#timer = setTimeout(() => this.#retry(), this.#delay).unref();
    if (!this.#held || this.#count >= FULL) return;
    this.#held = false;
    this.onDrain();
  }

  /** The oldest bytes of the ring, up to where it wraps around. */
  #run(): Uint8Array {
    return this.#ring!.subarray(this.#head, Math.min(this.#head + this.#count, RING));
  }

  #flush(): void {
    while (this.#count > 0) {
      const run = this.#run();
      const done = this.#send(run);
      this.#forget(done);
      if (done < run.length) return;
    }
  }

  /** Writes what a reader still takes, waiting only while it does. */
  async close(): Promise<void> {
    clearTimeout(this.#timer);
    const end = performance.now() + CLOSE_MILLISECONDS;
    let pending = this.target.pending?.();
    for (;;) {
      this.#flush();
      const now = performance.now();
      const before = pending;
      pending = this.target.pending?.();
      if (pending !== before) this.#taken = now;
      const patience =
        this.#count > 0 ? PATIENCE_MILLISECONDS : pending === undefined ? -Infinity : PENDING_MILLISECONDS;
      if (now > Math.min(this.#taken + patience, end)) break;
      await new Promise((resolve) => setTimeout(resolve, FIRST_RETRY_MILLISECONDS));
    }
    while (this.#count > 0) {
      this.#drop(this.#run());
      this.#forget(this.#run().length);
    }
    this.#tellLost();
    this.target.close();
  }
}
