/** Ctrl-A, the first key of the terminal's escape sequences. */
const ESCAPE = 0x01;

/**
 * The escape keys of a serial port on a terminal: Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends one Ctrl-A, and Ctrl-A with any
 * other key sends both. The sequence may be split over two reads.
 */
export class EscapeFilter {
  #escaped = false;

  /** @returns the bytes for the guest, and whether the VM is to end; bytes after that are dropped */
  filter(bytes: Uint8Array): { readonly input: Uint8Array; readonly quit: boolean } {
    const input: number[] = [];
    for (const byte of bytes) {
      if (!this.#escaped) {
        if (byte === ESCAPE) this.#escaped = true;
        else input.push(byte);
        continue;
      }
      this.#escaped = false;
      if (byte === 0x78 || byte === 0x58) return { input: Uint8Array.from(input), quit: true };
      if (byte !== ESCAPE) input.push(ESCAPE);
      input.push(byte);
    }
    return { input: Uint8Array.from(input), quit: false };
  }
}
