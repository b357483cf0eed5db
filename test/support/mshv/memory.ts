/** A partition's guest memory as the simulated device reads and writes it, through the regions that the VMM mapped. */
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { MAX_REGIONS, P, REGION_WORDS, type Shared } from './shared.js';

const WINDOW = 0x4000_0000;

interface Window {
  readonly guest: number;
  readonly bytes: Uint8Array;
  readonly writable: boolean;
}

/** A region in the shared table: guest address, size and user address in two words each; 1 in use; flags. */
export const REGION = { guest: 0, size: 8, user: 16, used: 24, flags: 28 } as const;

export class Memory {
  #windows: Window[] = [];
  #epoch = -1;

  constructor(
    private readonly host: HostKernel,
    private readonly shared: Shared,
    private readonly partition: number,
  ) {}

  /** @returns how many bytes from the address on are in one region, and where */
  #find(address: number): Window | undefined {
    const epoch = this.shared.words[this.shared.partition(this.partition) / 4 + P.epoch];
    if (epoch !== this.#epoch) {
      this.#epoch = epoch;
      this.#windows = this.#attach();
    }
    return this.#windows.find(({ guest, bytes }) => address >= guest && address < guest + bytes.length);
  }

  #attach(): Window[] {
    const windows: Window[] = [];
    const { view } = this.shared;
    for (let index = 0; index < MAX_REGIONS; index++) {
      const at = this.shared.regions(this.partition) + index * REGION_WORDS * 4;
      if (view.getUint32(at + REGION.used, true) === 0) continue;
      const guest = Number(view.getBigUint64(at + REGION.guest, true));
      const size = Number(view.getBigUint64(at + REGION.size, true));
      const mapping = this.host.attach({ address: view.getBigUint64(at + REGION.user, true), length: size });
      const writable = (view.getUint32(at + REGION.flags, true) & 1) !== 0;
      for (let offset = 0; offset < size; offset += WINDOW) {
        const bytes = new Uint8Array(mapping.view(offset, Math.min(WINDOW, size - offset)));
        windows.push({ guest: guest + offset, bytes, writable });
      }
    }
    return windows;
  }

  has(address: number): boolean {
    return this.#find(address) !== undefined;
  }

  /** @returns how many bytes were read before the first that is no memory */
  read(address: number, into: Uint8Array): number {
    let done = 0;
    while (done < into.length) {
      const window = this.#find(address + done);
      if (window === undefined) break;
      const offset = address + done - window.guest;
      const count = Math.min(into.length - done, window.bytes.length - offset);
      into.set(window.bytes.subarray(offset, offset + count), done);
      done += count;
    }
    return done;
  }

  write(address: number, from: Uint8Array): void {
    for (let done = 0; done < from.length;) {
      const window = this.#find(address + done);
      if (window === undefined) return;
      const offset = address + done - window.guest;
      const count = Math.min(from.length - done, window.bytes.length - offset);
      if (window.writable) window.bytes.set(from.subarray(done, done + count), offset);
      done += count;
    }
  }
}
