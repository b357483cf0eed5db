/** The host's pages behind guest memory, for devices by which a guest gives memory back and takes it. Any thread. */
import type { GuestMemory, MemoryKind } from '../../memory/guest-memory.js';
import type { WrittenPages } from '../../memory/written-pages.js';
import { errnoName, errnoText, type HostKernel, SystemError } from '../../sys/host-kernel.js';

export class HostPages {
  /** Where pages that are given back are marked, as they have changed. */
  written: WrittenPages | undefined;

  constructor(
    private readonly kernel: HostKernel,
    private readonly memory: GuestMemory,
  ) {}

  /**
   * Gives a range back to the host: it reads as zeros then. What is no RAM in it stays, as a file behind persistent memory keeps
   * what it has; so does the copy of a file, where the guest would find the file's contents again.
   *
   * @throws SystemError where the host refuses
   */
  discard(address: number, length: number): void {
    try {
      // What is shared cannot be given back in this process alone.
      this.#each(address, length, (host, count, kind) =>
        kind === 'copy' ? 0 : this.kernel.discardRaw(host, count, kind === 'shared'),
      );
    } finally {
      this.written?.mark(address, length);
    }
  }

  /** Has all pages of a range there. @throws SystemError where the host has none left; some may be there then */
  populate(address: number, length: number): void {
    this.#each(address, length, (host, count) => this.kernel.populateRaw(host, count));
  }

  /** @param call returns a negated errno */
  #each(address: number, length: number, call: (host: number, count: number, kind: MemoryKind) => number): void {
    const { memory } = this;
    for (let at = address, end = address + length; at < end;) {
      const count = Math.min(memory.hostLength(at), end - at);
      const kind = memory.kindAt(at);
      if (kind === undefined || kind === 'device') return;
      const errno = -call(memory.hostAddress(at, count), count, kind);
      if (errno > 0) throw new SystemError(errnoName(errno), errno, 'madvise', errnoText(errno));
      at += count;
    }
  }
}
