/** Where migrations come from and go to: `unix:PATH` or `tcp:HOST:PORT`, the latter also over TLS. */
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import type tls from 'node:tls';
import { type MigrationAddress } from '../../config/migration-config.js';
import { type HostKernel, SystemError } from '../../sys/host-kernel.js';
import { descriptorOf, whenReadable } from '../../sys/readable.js';
import { bindSocket } from '../host/unix-socket.js';
import { descriptorsFrame } from './frames.js';
import { MigrationError } from './migration-error.js';

/** Milliseconds. */
const HANDSHAKE = 10_000;

/** @throws MigrationError */
function read(folder: string, file: string): Buffer {
  const name = path.join(folder, file);
  try {
    return fs.readFileSync(name);
  } catch (error) {
    throw new MigrationError(`tls_dir: ${name} cannot be read: ${(error as NodeJS.ErrnoException).code}`);
  }
}

/** Each side shows a certificate, and looks at the other's. @throws MigrationError */
async function certificates(folder: string, side: 'client' | 'server') {
  const { createSecureContext } = await import('node:tls');
  const options = {
    minVersion: 'TLSv1.3' as const,
    rejectUnauthorized: true,
    ca: read(folder, 'ca-cert.pem'),
    cert: read(folder, `${side}-cert.pem`),
    key: read(folder, `${side}-key.pem`),
  };
  try {
    createSecureContext(options);
    return options;
  } catch (cause) {
    throw new MigrationError(`tls_dir: accepted are certificates of a CA, and a key for ${side}-cert.pem`, { cause });
  }
}

/** @param signal gives up @throws MigrationError */
export async function connect(
  address: MigrationAddress,
  tlsFolder: string | undefined,
  signal: AbortSignal,
): Promise<Duplex> {
  if (tlsFolder === undefined) {
    const options = 'path' in address ? address : { ...address, noDelay: true };
    return await established(net.connect(options), 'connect', address, signal);
  }
  const secure = await import('node:tls');
  const { host, port } = address as { host: string; port: number };
  const options = await certificates(tlsFolder, 'client');
  // Whoever has a certificate of the CA.
  const socket = secure.connect({ host, port, ...options, checkServerIdentity: () => undefined });
  socket.setNoDelay();
  return await established(socket, 'secureConnect', address, signal);
}

/** A connection that begins with descriptors of this process, and a frame that says how many. @throws MigrationError */
export function connectWith(
  kernel: HostKernel,
  address: { readonly path: string },
  descriptors: readonly number[],
): Duplex {
  let fd: number | undefined;
  try {
    fd = kernel.connectUnix(address.path);
    // Any socket takes so few bytes at once.
    kernel.sendUnix(fd, descriptorsFrame(descriptors.length), descriptors);
    const socket = new net.Socket({ fd });
    // It stays, as on other connections.
    return socket.on('error', () => undefined);
  } catch (error) {
    if (fd !== undefined) kernel.close(fd);
    throw new MigrationError(`${addressText(address)}: ${error instanceof SystemError ? error.code : String(error)}`);
  }
}

async function established<T extends net.Socket>(
  socket: T,
  event: string,
  address: MigrationAddress,
  signal: AbortSignal,
): Promise<T> {
  const giveUp = () => socket.destroy(new Error((signal.reason as Error).message));
  signal.addEventListener('abort', giveUp);
  if (signal.aborted) giveUp();
  try {
    await new Promise<void>((resolve, reject) => {
      // It stays: an error may come before whoever gets the connection listens.
      socket.on('error', ({ code, message }: NodeJS.ErrnoException) => {
        reject(new MigrationError(`${addressText(address)}: ${code ?? message}`));
      });
      socket.once(event, resolve);
    });
    return socket;
  } finally {
    signal.removeEventListener('abort', giveUp);
  }
}

export function addressText(address: MigrationAddress): string {
  return 'path' in address ? `unix:${address.path}` : `tcp:${address.host}:${address.port}`;
}

export interface Listener {
  /** @param take called with each connection, and the descriptors that came with what it began with, which are closed by whoever is called */
  onConnection(take: (connection: Duplex, descriptors: readonly number[]) => void): void;
  close(): void;
}

/** @throws MigrationError or MachineError where the address cannot be had */
export async function listen(
  kernel: HostKernel,
  address: MigrationAddress,
  tlsFolder: string | undefined,
): Promise<Listener> {
  const { server, event } = await makeServer(address, tlsFolder);
  const beginning = new Set<net.Socket>();
  let remove = () => undefined as unknown;
  await new Promise<void>((resolve, reject) => {
    // It stays: a connection that cannot be accepted is one of those that do not come.
    server.on('error', (error: NodeJS.ErrnoException) => {
      reject(new MigrationError(`${addressText(address)}: ${error.code ?? error.message}`));
    });
    server.once('listening', resolve);
    if ('path' in address) {
      const bound = bindSocket(kernel, `receiver_url=unix:${address.path}`, address.path);
      remove = bound.remove;
      server.listen({ fd: bound.listener });
    } else server.listen(address);
  });
  // A connection that breaks before it is one.
  server.on('tlsClientError', () => undefined);
  return {
    onConnection: (take) => {
      server.on(event, (socket: net.Socket) => {
        if ('path' in address) begins(kernel, socket, beginning, take);
        else take(socket, []);
      });
    },
    close: () => {
      remove();
      server.close();
      for (const socket of beginning) socket.destroy();
    },
  };
}

/**
 * Streams of Node.js drop the descriptors that come with bytes: the first piece is read without it, and put back.
 *
 * @param beginning has the socket until then
 */
function begins(
  kernel: HostKernel,
  socket: net.Socket,
  beginning: Set<net.Socket>,
  take: (connection: Duplex, descriptors: readonly number[]) => void,
): void {
  const fd = descriptorOf(socket);
  const stop = whenReadable(kernel, fd, () => {
    stop();
    if (!beginning.delete(socket)) return;
    const received = kernel.receiveUnix(fd);
    if (received.bytes === undefined || received.bytes.length === 0) {
      socket.destroy();
      return;
    }
    socket.setTimeout(0);
    socket.unshift(received.bytes);
    take(socket, received.descriptors);
  });
  beginning.add(socket);
  socket.setTimeout(HANDSHAKE, () => socket.destroy());
  socket.on('error', () => undefined);
  socket.once('close', () => {
    if (beginning.delete(socket)) stop();
  });
}

async function makeServer(
  address: MigrationAddress,
  tlsFolder: string | undefined,
): Promise<{ server: net.Server | tls.Server; event: string }> {
  if (tlsFolder === undefined) {
    const options = 'path' in address ? { pauseOnConnect: true } : { noDelay: true };
    return { server: net.createServer(options), event: 'connection' };
  }
  const secure = await import('node:tls');
  const options = { ...(await certificates(tlsFolder, 'server')), requestCert: true, handshakeTimeout: HANDSHAKE };
  return { server: secure.createServer(options), event: 'secureConnection' };
}
