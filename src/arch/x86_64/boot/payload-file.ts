/** A kernel or initramfs file, read piece by piece straight into guest memory. */
import fs from 'node:fs';
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { BootError } from './boot-error.js';

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
      fd = fs.openSync(path, 'r');
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

  /** At most `length` bytes from `offset` on; fewer when the file ends. */
  read(offset: number, length: number): Buffer {
    const buffer = Buffer.alloc(length);
    return buffer.subarray(0, fs.readSync(this.fd, buffer, 0, length, offset));
  }

  /**
   * Reads exactly `length` bytes from `offset` into guest memory.
   *
   * @throws BootError when the file is shorter; GuestMemoryError when the range is not RAM
   */
  load(offset: number, length: number, memory: GuestMemory, address: number): void {
    let at = offset;
    for (const slice of memory.slices(address, length)) {
      for (let done = 0; done < slice.length; ) {
        const count = fs.readSync(this.fd, slice, done, slice.length - done, at);
        if (count === 0) throw this.error('a file that is complete: this one is cut short');
        done += count;
        at += count;
      }
    }
  }
}
