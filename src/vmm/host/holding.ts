/** What one device holds on the host: opened step by step, given back as a whole. What the host refuses is told with its option. */
import fs from 'node:fs';
import { closeAll } from '../../sys/close-all.js';
import { type HostKernel, type OpenOptions, SystemError } from '../../sys/host-kernel.js';
import { MachineError } from '../machine/machine-error.js';
import { lockImage, unlockImage } from './image-lock.js';

/** Kinds of files that can be opened in the place of one. */
export interface Accepted {
  readonly name: string;
  readonly is: (kind: fs.Stats) => boolean;
}
const FILE_OR_BLOCK: Accepted = {
  name: 'a file or block device',
  is: (kind) => kind.isFile() || kind.isBlockDevice(),
};
export const FILE_OR_CHARACTER: Accepted = {
  name: 'a file or character device',
  is: (kind) => kind.isFile() || kind.isCharacterDevice(),
};

export class Holding {
  readonly #undo: (() => void)[] = [];
  readonly #locked: { readonly file: string; readonly fd: number; readonly writes: boolean }[] = [];

  /** @param option as the user may have typed it, for messages */
  constructor(
    private readonly kernel: HostKernel,
    readonly option: string,
  ) {}

  /** @param what begins the message @throws MachineError where the host refuses it */
  explain<T>(attempt: () => T, what = this.option): T {
    try {
      return attempt();
    } catch (error) {
      if (error instanceof SystemError) throw new MachineError(`${what}: ${error.reason}`);
      throw error;
    }
  }

  /** Looks before it opens: a FIFO would wait for somebody at its other end. @throws MachineError */
  open(file: string, options: OpenOptions, accepted = FILE_OR_BLOCK): number {
    const kind = statOf(file);
    if (kind !== undefined && !accepted.is(kind)) {
      throw new MachineError(`${this.option}: ${kindName(kind)}; accepted is ${accepted.name}`);
    }
    const fd = this.explain(() => this.kernel.open(file, options));
    this.add(() => this.kernel.close(fd));
    return fd;
  }

  /** Nobody may write what this machine reads, and nobody else may read what it writes. @throws MachineError */
  lock(file: string, fd: number, writes: boolean): void {
    this.#lock(file, fd, writes);
    this.#locked.push({ file, fd, writes });
  }

  /** Others may have the files, which nobody uses here meanwhile. */
  unlock(): void {
    for (const { fd } of this.#locked) unlockImage(this.kernel, fd);
  }

  /** The files are this machine's again. @throws MachineError when somebody else has them by now */
  relock(): void {
    for (const { file, fd, writes } of this.#locked) this.#lock(file, fd, writes);
  }

  #lock(file: string, fd: number, writes: boolean): void {
    if (!this.explain(() => lockImage(this.kernel, fd, writes), `${this.option}: ${file} cannot be locked`)) {
      throw new MachineError(`${this.option}: ${file} is in use by another process, which has locked it`);
    }
  }

  /** @param undo what gives something further back */
  add(undo: () => void): void {
    this.#undo.push(undo);
  }

  /** Gives everything back, what came last first. */
  close(): void {
    closeAll(this.#undo.splice(0).reverse());
  }
}

/** @returns undefined where the path leads nowhere, or nobody may look: opening it tells why */
function statOf(file: string): fs.Stats | undefined {
  try {
    return fs.statSync(file);
  } catch {
    return undefined;
  }
}

/** What a path leads to, for a user who gave it in the place of a file. */
function kindName(kind: fs.Stats): string {
  if (kind.isDirectory()) return 'a folder';
  if (kind.isFIFO()) return 'a FIFO';
  return kind.isCharacterDevice() ? 'a character device' : kind.isBlockDevice() ? 'a block device' : 'not a file';
}
