/**
 * The host end of the serial port: where its bytes go to and come from.
 *
 * tty and file: what the guest writes is never lost; a host that does not read slows the guest down.
 * pty and socket: while nobody reads, output beyond the host's buffers is dropped.
 */
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import tty from 'node:tty';
import type { VmConfig } from '../config/vm-config.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { EscapeFilter } from './escape-filter.js';
import { MachineError } from './machine-error.js';

export interface SerialBackend {
  /** @returns false when the caller should hold further bytes back until `onDrain` is called */
  write(bytes: Uint8Array): boolean;
  onDrain: () => void;
  /** Bytes from the host. An answer of false stops them until `resume`. */
  onInput: (bytes: Uint8Array) => boolean;
  resume(): void;
  /** Resolves when everything written has reached the host; restores the terminal and removes what was made. */
  close(): Promise<void>;
}

/** Bytes that may wait in this process for a host that does not read. */
const MAX_BUFFERED = 64 * 1024;
/** How long `close` waits for a host that does not read. */
const FLUSH_MILLISECONDS = 2000;

interface Streams {
  readonly input?: NodeJS.ReadableStream;
  readonly output?: NodeJS.WritableStream & { readonly writableLength: number };
}

/** Bytes in and out of Node streams, which may come and go. */
class StreamBackend implements SerialBackend {
  onDrain: () => void = () => undefined;
  onInput: (bytes: Uint8Array) => boolean = () => true;
  #streams: Streams = {};

  /**
   * @param lossless whether output is held back, rather than dropped, while the host does not read
   * @param release undoes what the backend made; called once by `close`
   */
  constructor(
    private readonly lossless: boolean,
    private readonly release: () => void | Promise<void>,
  ) {}

  connect(streams: Streams, filter: (bytes: Uint8Array) => Uint8Array = (bytes) => bytes): void {
    this.disconnect();
    this.#streams = streams;
    const { input, output } = streams;
    input?.on('data', (bytes: Buffer) => {
      const data = filter(bytes);
      if (data.length > 0 && !this.onInput(data)) input.pause();
    });
    output?.on('drain', () => this.onDrain());
    this.onDrain();
  }

  disconnect(): void {
    this.#streams.input?.removeAllListeners('data');
    this.#streams.output?.removeAllListeners('drain');
    this.#streams = {};
    this.onDrain();
  }

  write(bytes: Uint8Array): boolean {
    const { output } = this.#streams;
    if (output === undefined) return true;
    if (!this.lossless && output.writableLength > MAX_BUFFERED) return true;
    return output.write(bytes) || !this.lossless;
  }

  resume(): void {
    this.#streams.input?.resume();
  }

  async close(): Promise<void> {
    const { output } = this.#streams;
    if (output !== undefined) {
      // A callback of an empty write comes after all writes before it, or when the stream breaks.
      const flushed = new Promise<void>((resolve) => output.write('', () => resolve()));
      const patience = new Promise<void>((resolve) => setTimeout(resolve, FLUSH_MILLISECONDS).unref());
      await Promise.race([flushed, patience]);
    }
    this.disconnect();
    await this.release();
  }
}

/**
 * @param quit called when the user ends the VM by the escape key, or when standard output is gone
 * @param announce told in one line where a pty or socket can be found
 * @returns undefined for a port with no host end (`off` and `null`)
 * @throws MachineError when the file, socket or terminal cannot be made
 */
export async function openSerialBackend(
  config: VmConfig['serial'],
  kernel: HostKernel,
  quit: () => void,
  announce: (line: string) => void,
): Promise<SerialBackend | undefined> {
  switch (config.mode) {
    case 'Tty':
      return openTty(quit);
    case 'Pty':
      return openPty(kernel, announce);
    case 'File':
      return openFile(config.file!);
    case 'Socket':
      return openSocket(config.socket!, announce);
    case 'Off':
    case 'Null':
      return undefined;
  }
}

/** Standard input and output. A terminal is in raw mode until `close`, or until the process ends in any other way. */
function openTty(quit: () => void): SerialBackend {
  const { stdin, stdout } = process;
  const raw = stdin.isTTY;
  const restore = () => {
    if (raw) stdin.setRawMode(false);
  };
  const backend = new StreamBackend(true, () => {
    restore();
    process.removeListener('exit', restore);
    stdout.removeListener('error', quit);
    stdin.pause();
    // A pending read of a pipe would keep the process alive; a file has no such method.
    (stdin as Partial<typeof stdin>).unref?.();
  });
  process.once('exit', restore);
  stdout.on('error', quit);
  const keys = new EscapeFilter();
  if (raw) {
    stdin.setRawMode(true);
    backend.connect({ input: stdin, output: stdout }, (bytes) => {
      const { input, quit: end } = keys.filter(bytes);
      if (end) quit();
      return input;
    });
  } else {
    backend.connect({ input: stdin, output: stdout });
  }
  return backend;
}

function openPty(kernel: HostKernel, announce: (line: string) => void): SerialBackend {
  const pty = kernel.openPty();
  // With the slave held open here, its other users may come and go: without, reading the master would fail.
  const slave = fs.openSync(pty.path, fs.constants.O_RDWR | fs.constants.O_NOCTTY);
  const input = new tty.ReadStream(pty.fd);
  const output = fs.createWriteStream('', { fd: pty.fd, autoClose: false });
  const backend = new StreamBackend(false, () => {
    input.destroy();
    fs.closeSync(slave);
  });
  backend.connect({ input, output });
  announce(`serial port: ${pty.path}`);
  return backend;
}

function openFile(path: string): SerialBackend {
  let fd: number;
  try {
    fd = fs.openSync(path, 'w');
  } catch (error) {
    throw new MachineError(`--serial file=${path}: accepted is a file that can be written`, { cause: error });
  }
  const output = fs.createWriteStream(path, { fd });
  const backend = new StreamBackend(true, () => new Promise((resolve) => output.close(() => resolve())));
  // The disk is full, say: the bytes are lost, the guest goes on.
  output.on('error', () => backend.disconnect());
  backend.connect({ output });
  return backend;
}

/** A listening unix socket; one client at a time, further ones are turned away. */
async function openSocket(path: string, announce: (line: string) => void): Promise<SerialBackend> {
  let client: net.Socket | undefined;
  const server = net.createServer((socket) => {
    if (client !== undefined) {
      socket.destroy();
      return;
    }
    client = socket;
    socket.on('error', () => undefined); // 'close' follows
    socket.on('close', () => {
      client = undefined;
      backend.disconnect();
    });
    backend.connect({ input: socket, output: socket });
  });
  const backend = new StreamBackend(false, () => {
    client?.destroy();
    // This unlinks the path, too.
    return new Promise((resolve) => server.close(() => resolve()));
  });
  try {
    server.listen(path);
    await once(server, 'listening');
  } catch (error) {
    throw new MachineError(`--serial socket=${path}: accepted is a path where a socket can be made`, { cause: error });
  }
  announce(`serial port: ${path}`);
  return backend;
}
