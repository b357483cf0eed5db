/** A kernel or initramfs file, read piece by piece straight into guest memory: no buffer holds the whole of it. */
import fs from 'node:fs';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { BootError } from './boot-error.js';

/** Bytes as whole MiB, rounded up, for messages. */
export function mib(bytes: number): number {
  return Math.ceil(bytes / 2 ** 20);
}

export class PayloadFile {
  /** @param size bytes, as found when it was opened */
  private constructor(
    readonly option: string,
    readonly path: string,
    readonly size: number,
    private readonly fd: number,
  ) {}

  /** @throws BootError when it cannot be read, is no regular file, or is empty */
  static open(option: string, path: string): PayloadFile {
    let fd: number;
    try {
      // Without O_NONBLOCK, a FIFO would block here until somebody writes to it.
      fd = fs.openSync(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
    } catch (error) {
      throw new BootError(`${option} ${path}: accepted is a file that can be read`, { cause: error });
    }
    const stat = fs.fstatSync(fd);
    if (!stat.isFile() || stat.size === 0) {
      fs.closeSync(fd);
      throw new BootError(`${option} ${path}: accepted is a regular file that is not empty`);
    }
    return new PayloadFile(option, path, stat.size, fd);
  }

  close(): void {
    fs.closeSync(this.fd);
  }

  /** An error about this file. */
  error(accepted: string): BootError {
    return new BootError(`${this.option} ${this.path}: accepted is ${accepted}`);
  }

  /** At most `length` bytes from `offset` on; fewer when the file ends. @throws BootError when the host cannot read it */
  read(offset: number, length: number): Buffer {
    const buffer = Buffer.alloc(length);
    return buffer.subarray(0, this.#readInto(buffer, 0, offset));
  }

  /**
   * Reads exactly `length` bytes from `offset` into guest memory.
   *
   * @throws BootError when the file is shorter or cannot be read; GuestMemoryError when the range is not RAM
   */
  load(offset: number, length: number, memory: GuestMemory, address: number): void {
    let at = offset;
    for (const slice of memory.slices(address, length)) {
      for (let done = 0; done < slice.length;) {
        const count = this.#readInto(slice, done, at);
        // It was longer when it was opened.
        if (count === 0) throw this.error('a file that is complete: this one is cut short');
        done += count;
        at += count;
      }
    }
  }

  /** Fills the buffer from `start` on. @returns the bytes read, 0 at the end of the file */
  #readInto(buffer: Uint8Array, start: number, offset: number): number {
    try {
      return fs.readSync(this.fd, buffer, start, buffer.length - start, offset);
    } catch (error) {
      throw new BootError(`${this.option} ${this.path}: accepted is a file that can be read`, { cause: error });
    }
  }
}

/** Opens a file for as long as `use` needs it. @throws BootError */
export function withPayload<T>(option: string, path: string, use: (file: PayloadFile) => T): T {
  const file = PayloadFile.open(option, path);
  try {
    return use(file);
  } finally {
    file.close();
  }
}
