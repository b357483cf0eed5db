/** New sizes of disks that their workers have yet to answer. */
import type { DiskResource } from '../host/disk-resource.js';
import { RequestError } from './machine-error.js';

interface Resize {
  readonly disk: DiskResource;
  /** Workers that have not answered. */
  left: number;
  failure: string;
  readonly settle: (failure: string) => void;
}

export class DiskResizes {
  /** By disk. */
  readonly #asked = new Map<string, Resize>();

  /**
   * Resolves when all workers of the disk have the new size.
   *
   * @param tell tells them; it returns how many there are
   * @throws RequestError
   */
  async ask(disk: DiskResource, tell: () => number): Promise<void> {
    const { id } = disk;
    if (this.#asked.has(id)) throw new RequestError(`The disk ${id} is being resized`, 'failed');
    const failure = await new Promise<string>((settle) => {
      const left = tell();
      if (left === 0) settle('The machine does not run');
      else this.#asked.set(id, { disk, left, failure: '', settle });
    });
    if (failure !== '') throw new RequestError(failure, 'failed');
  }

  /** A worker has answered. @param size the disk's size now; undefined: as before */
  answered(id: string, failure: string, size?: number): void {
    const resize = this.#asked.get(id);
    if (resize === undefined) return;
    if (size !== undefined) resize.disk.size = size;
    if (failure !== '') resize.failure = failure;
    if (--resize.left > 0) return;
    this.#asked.delete(id);
    resize.settle(resize.failure);
  }

  /** Nobody answers any more. */
  giveUp(reason: string): void {
    for (const { settle } of this.#asked.values()) settle(reason);
    this.#asked.clear();
  }
}
