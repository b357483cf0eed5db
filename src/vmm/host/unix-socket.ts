/**
 * Sockets that other processes find by a path: for their owner alone from the first moment, never taken from a process that
 * lives, taken over from one that was killed, and gone at the end unless somebody has put something else there.
 */
import fs from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { type HostKernel, SystemError } from '../../sys/host-kernel.js';
import { MachineError } from '../machine/machine-error.js';

/** Connections that wait until they are accepted. */
const BACKLOG = 64;
/** Another process may remove the lock's file between two of our steps, but not for ever. */
const LOCK_ATTEMPTS = 100;

export interface BoundSocket {
  /** It listens and does not block. The caller's to close. */
  readonly listener: number;
  /** Removes the path, where it is still that socket, and the lock. */
  readonly remove: () => void;
}

/** Who has bound `PATH` holds a lock on `PATH.lock`: between two machines it says who lives, also while one is about to listen. */
interface Lock {
  release(): void;
}

/**
 * @param option the option with its value, for messages
 * @throws MachineError when something lives there, or no socket can be made
 */
export function bindSocket(kernel: HostKernel, option: string, path: string): BoundSocket {
  let lock: Lock | undefined;
  try {
    lock = takeLock(kernel, `${path}.lock`);
    removeStale(kernel, path);
    const listener = kernel.listenUnix(path, BACKLOG);
    const made = fs.lstatSync(path, { throwIfNoEntry: false });
    const held = lock;
    const remove = () => {
      const there = fs.lstatSync(path, { throwIfNoEntry: false });
      if (there?.dev === made?.dev && there?.ino === made?.ino) fs.rmSync(path, { force: true });
      held.release();
    };
    return { listener, remove };
  } catch (error) {
    lock?.release();
    throw new MachineError(`${option}: accepted is a path where a socket can be made`, { cause: error });
  }
}

/** Whether a port of a vsock device, PATH_PORT for a guest that connects, is that socket. */
export function leadsTo(vsock: string, socket: string): boolean {
  const stem = /^(.*)_\d+$/s.exec(socket)?.[1];
  return stem !== undefined && realPath(stem) === realPath(vsock);
}

/** Whether two paths are one socket's. */
export const isSameSocket = (one: string, other: string): boolean => realPath(one) === realPath(other);

/** Of a file that may not be there yet. */
function realPath(file: string): string {
  const folder = dirname(resolve(file));
  try {
    return join(fs.realpathSync(folder), basename(file));
  } catch {
    return resolve(file);
  }
}

/**
 * A socket that another program has made, and removes.
 *
 * @throws MachineError when nothing can be accepted there
 */
export function adoptSocket(kernel: HostKernel, option: string, fd: number): BoundSocket {
  if (!kernel.listensUnix(fd)) {
    throw new MachineError(`${option}: accepted is the descriptor of a Unix stream socket that listens`);
  }
  return { listener: fd, remove: () => undefined };
}

/** @throws Error when another process has it, or there can be none */
function takeLock(kernel: HostKernel, path: string): Lock {
  const { O_RDWR, O_CREAT, O_NOFOLLOW, O_NONBLOCK } = fs.constants;
  for (let attempt = 0; attempt < LOCK_ATTEMPTS; attempt++) {
    const fd = fs.openSync(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK, 0o600);
    if (!kernel.lockFile(fd, true)) {
      fs.closeSync(fd);
      throw new Error('another process listens on it');
    }
    // Its former holder may have removed it after it was opened here: then somebody else may lock another one.
    if (fs.lstatSync(path, { throwIfNoEntry: false })?.ino === fs.fstatSync(fd).ino) {
      const release = () => {
        fs.rmSync(path, { force: true });
        fs.closeSync(fd);
      };
      return { release };
    }
    fs.closeSync(fd);
  }
  throw new Error(`cannot lock ${path}`);
}

/** Removes a socket on which nobody listens. @throws Error when somebody does, or something else is there */
function removeStale(kernel: HostKernel, path: string): void {
  const there = fs.lstatSync(path, { throwIfNoEntry: false });
  if (there === undefined) return;
  if (!there.isSocket()) throw new Error('something else is there');
  try {
    kernel.close(kernel.connectUnix(path));
  } catch (error) {
    if (!(error instanceof SystemError)) throw error;
    if (error.code === 'ECONNREFUSED') {
      fs.rmSync(path, { force: true });
      return;
    }
    // Its queue of connections is full (EAGAIN), or it is of another type (EPROTOTYPE): somebody is there.
    if (error.code !== 'EAGAIN' && error.code !== 'EPROTOTYPE') throw error;
  }
  throw new Error('another process listens on it');
}
