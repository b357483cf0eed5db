/** Where migrations come from and go to: `unix:PATH` or `tcp:HOST:PORT`, the latter also over TLS. */
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import type tls from 'node:tls';
import { type MigrationAddress } from '../../config/migration-config.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { bindSocket } from '../host/unix-socket.js';
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
  /** @param take called with each connection */
  onConnection(take: (connection: Duplex) => void): void;
  close(): void;
}

/** @throws MigrationError or MachineError where the address cannot be had */
export async function listen(
  kernel: HostKernel,
  address: MigrationAddress,
  tlsFolder: string | undefined,
): Promise<Listener> {
  const { server, event } = await makeServer(tlsFolder);
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
    onConnection: (take) => server.on(event, take),
    close: () => {
      remove();
      server.close();
    },
  };
}

async function makeServer(tlsFolder: string | undefined): Promise<{ server: net.Server | tls.Server; event: string }> {
  if (tlsFolder === undefined) return { server: net.createServer({ noDelay: true }), event: 'connection' };
  const secure = await import('node:tls');
  const options = { ...(await certificates(tlsFolder, 'server')), requestCert: true, handshakeTimeout: HANDSHAKE };
  return { server: secure.createServer(options), event: 'secureConnection' };
}
