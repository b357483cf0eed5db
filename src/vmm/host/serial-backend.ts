/**
 * The host end of the serial port or console: where its bytes go to and come from.
 *
 * tty and file: a host that takes no output slows the guest down; what it refuses (a full disk, a reader that is gone) is dropped.
 * pty and socket: while nobody reads, output beyond a bound is dropped. Whatever the host does, nothing here waits for it.
 */
import fs from 'node:fs';
import type net from 'node:net';
import type { VmConfig } from '../../config/vm-config.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { EscapeFilter } from '../log/escape-filter.js';
import { HostOutput, openOutputFile, openInherited, type OutputTarget } from './host-output.js';
import { MachineError } from '../machine/machine-error.js';
import { bindSocket } from './unix-socket.js';

export interface SerialBackend {
  /** Of the pseudo-terminal. */
  readonly path?: string;
  /** @returns false when the caller should hold further bytes back until `onDrain` is called */
  write(bytes: Uint8Array): boolean;
  onDrain: () => void;
  /** Bytes from the host. An answer of false stops them until `resume`. */
  onInput: (bytes: Uint8Array) => boolean;
  resume(): void;
  /** Resolves when the host has what it takes; restores the terminal and removes what was made. */
  close(): Promise<void>;
}

export interface SerialBackendOptions {
  /** Without dashes. */
  readonly option: 'serial' | 'console';
  /** Called when the user ends the VM by the escape key. */
  readonly quit: () => void;
  /** Told in one line where a pty or socket can be found, and what has become of output. */
  readonly tell: (level: 'info' | 'warn', line: string) => void;
}

const TITLES = { serial: 'Serial port', console: 'Console' };
/** Bytes that may wait in this process for a socket's client. */
const MAX_BUFFERED = 64 * 1024;
/** How long `close` waits for a client that takes nothing. */
const FLUSH_MILLISECONDS = 2000;

/** asm-generic/ioctls.h */
const FIONREAD = 0x541b;

/** What `HostOutput` is to descriptors, for a socket's client. */
interface Output {
  onDrain: () => void;
  write(bytes: Uint8Array): boolean;
  close(): Promise<void>;
}

/** Bytes in and out of a host end, whose parts may come and go. */
class Backend implements SerialBackend {
  onDrain: () => void = () => undefined;
  onInput: (bytes: Uint8Array) => boolean = () => true;
  #input: NodeJS.ReadableStream | undefined;
  #output: Output | undefined;
  #refusing = false;

  /** @param release undoes what the backend made; called once by `close` */
  constructor(
    private readonly release: () => void | Promise<void>,
    readonly path?: string,
  ) {}

  /** @param keys the keys of a user, who is heard also while the guest takes no input: that is dropped then */
  connectInput(input: NodeJS.ReadableStream, keys?: (bytes: Uint8Array) => Uint8Array): void {
    this.#input = input;
    // The terminal hung up, or standard input is a folder: no more input comes. It may have been connected before.
    if (input.listenerCount('error') === 0) input.on('error', () => undefined);
    input.on('data', (bytes: Buffer) => {
      const data = keys === undefined ? bytes : keys(bytes);
      if (data.length === 0 || this.#refusing || this.onInput(data)) return;
      this.#refusing = true;
      if (keys === undefined) input.pause();
    });
  }

  connectOutput(output: Output): void {
    this.#output = output;
    output.onDrain = () => this.onDrain();
    this.onDrain();
  }

  disconnect(): void {
    this.#input?.removeAllListeners('data');
    this.#input = undefined;
    this.#output = undefined;
    this.#refusing = false;
    this.onDrain();
  }

  write(bytes: Uint8Array): boolean {
    return this.#output?.write(bytes) ?? true;
  }

  resume(): void {
    this.#refusing = false;
    this.#input?.resume();
  }

  async close(): Promise<void> {
    await this.#output?.close();
    this.disconnect();
    await this.release();
  }
}

/**
 * @returns undefined for a port with no host end (`off` and `null`)
 * @throws MachineError when the file, socket or terminal cannot be made
 */
export async function openSerialBackend(
  config: VmConfig['serial'],
  kernel: HostKernel,
  options: SerialBackendOptions,
): Promise<SerialBackend | undefined> {
  switch (config.mode) {
    case 'Tty':
      return openTty(kernel, options);
    case 'Pty':
      return openPty(kernel, options);
    case 'File':
      return openFile(config.file!, kernel, options);
    case 'Socket':
      return openSocket(config.socket!, kernel, options);
    case 'Off':
    case 'Null':
      return undefined;
  }
}

function outputTo(
  kernel: HostKernel,
  target: OutputTarget,
  hold: boolean,
  { option, tell }: SerialBackendOptions,
): HostOutput {
  const title = TITLES[option];
  return new HostOutput(kernel, target, {
    hold,
    refused: (reason) => tell('warn', `${title}: output is dropped: ${reason}`),
    lost: (bytes) => tell('info', `${title}: ${bytes} bytes of output were dropped`),
  });
}

/** Standard input and output. A terminal is in raw mode until `close`, or until the process ends in any other way. */
function openTty(kernel: HostKernel, options: SerialBackendOptions): SerialBackend {
  const { stdin } = process;
  const raw = stdin.isTTY;
  const restore = () => {
    if (raw) stdin.setRawMode(false);
  };
  const backend = new Backend(() => {
    restore();
    process.removeListener('exit', restore);
    stdin.pause();
    // A pending read of a pipe would keep the process alive; a file has no such method.
    (stdin as Partial<typeof stdin>).unref?.();
  });
  process.once('exit', restore);
  if (raw) stdin.setRawMode(true);
  const filter = new EscapeFilter();
  const keys = (bytes: Uint8Array) => {
    const { input, quit } = filter.filter(bytes);
    if (quit) options.quit();
    return input;
  };
  backend.connectInput(stdin, raw ? keys : undefined);
  // An earlier machine of this process has let go of it.
  stdin.resume();
  (stdin as Partial<typeof stdin>).ref?.();
  backend.connectOutput(outputTo(kernel, openInherited(1), true, options));
  return backend;
}

function openPty(kernel: HostKernel, options: SerialBackendOptions): SerialBackend {
  const pty = kernel.openPty();
  // With the slave held open here, its other users may come and go: without, reading the master would fail.
  const slave = fs.openSync(pty.path, fs.constants.O_RDWR | fs.constants.O_NOCTTY);
  const input = new (process.getBuiltinModule('node:tty').ReadStream)(pty.fd);
  const backend = new Backend(() => {
    input.destroy();
    fs.closeSync(slave);
  }, pty.path);
  backend.connectInput(input);
  const waiting = new Uint8Array(4);
  const pending = () => {
    kernel.ioctlBuffer(slave, FIONREAD, waiting);
    return new DataView(waiting.buffer).getInt32(0, true);
  };
  const target = { fd: pty.fd, piece: Infinity, pending, close: () => undefined };
  backend.connectOutput(outputTo(kernel, target, false, options));
  options.tell('warn', `${TITLES[options.option]}: ${pty.path}`);
  return backend;
}

function openFile(file: string, kernel: HostKernel, options: SerialBackendOptions): SerialBackend {
  let target: OutputTarget;
  try {
    target = openOutputFile(file, { truncate: true });
  } catch (error) {
    const accepted = 'a file that can be written, or a FIFO that somebody reads';
    throw new MachineError(`--${options.option} file=${file}: accepted is ${accepted}`, { cause: error });
  }
  const backend = new Backend(() => undefined);
  backend.connectOutput(outputTo(kernel, target, true, options));
  return backend;
}

/** A client of the socket, beyond what Node buffers for it a bounded amount. */
class ClientOutput implements Output {
  onDrain: () => void = () => undefined;
  #lost = 0;

  constructor(
    private readonly client: net.Socket,
    private readonly tellLost: (bytes: number) => void,
  ) {
    client.on('drain', () => this.#told());
    client.on('close', () => this.#told());
  }

  write(bytes: Uint8Array): boolean {
    if (this.client.writableLength > MAX_BUFFERED) this.#lost += bytes.length;
    else this.client.write(Uint8Array.from(bytes));
    return true;
  }

  #told(): void {
    if (this.#lost > 0) this.tellLost(this.#lost);
    this.#lost = 0;
  }

  async close(): Promise<void> {
    // A callback of an empty write comes after all writes before it, or when the client goes.
    const flushed = new Promise<void>((resolve) => this.client.write('', () => resolve()));
    const patience = new Promise<void>((resolve) => setTimeout(resolve, FLUSH_MILLISECONDS).unref());
    await Promise.race([flushed, patience]);
    this.#told();
  }
}

/** A listening unix socket; one client at a time, further ones are turned away. */
async function openSocket(path: string, kernel: HostKernel, options: SerialBackendOptions): Promise<SerialBackend> {
  const title = TITLES[options.option];
  let client: net.Socket | undefined;
  const server = process.getBuiltinModule('node:net').createServer((socket) => {
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
    backend.connectInput(socket);
    const lost = (bytes: number) => options.tell('info', `${title}: ${bytes} bytes of output were dropped`);
    backend.connectOutput(new ClientOutput(socket, lost));
  });
  const bound = bindSocket(kernel, `--${options.option} socket=${path}`, path);
  const backend = new Backend(() => {
    bound.remove();
    client?.destroy();
    return new Promise((resolve) => server.close(() => resolve()));
  });
  await new Promise<void>((resolve) => server.listen({ fd: bound.listener }, resolve));
  options.tell('warn', `${title}: ${path}`);
  return backend;
}
