/** Moves bytes between the serial device and its host end, on main, with backpressure both ways. */
import type { SerialBackend } from './serial-backend.js';

const CHUNK = 4096;
/** Bytes of input that may wait for a guest that does not read; then its sender is held back. */
const INPUT_LIMIT = 64 * 1024;
/** A guest writes byte by byte; what it writes within this time is taken at once, as each taking costs two threads a switch. */
const GATHER_MILLISECONDS = 2;

/** A character device's end for main. */
export interface BytePort {
  /** Bytes from the guest. @returns how many */
  drainTransmit(into: Uint8Array): number;
  /** Bytes for the guest. @returns how many it had room for */
  receive(bytes: Uint8Array): number;
}

export class SerialPump {
  readonly #chunk = new Uint8Array(CHUNK);
  /** Input that the device had no room for yet. */
  #waiting: Uint8Array = new Uint8Array(0);
  #stalled = false;
  #timer: NodeJS.Timeout | undefined;

  /** @param backend none: output is thrown away and no input comes */
  constructor(
    private readonly device: BytePort,
    private readonly backend: SerialBackend | undefined,
  ) {
    if (backend === undefined) return;
    backend.onDrain = () => {
      this.#stalled = false;
      this.#drain();
    };
    backend.onInput = (bytes) => {
      this.#waiting = this.#waiting.length === 0 ? bytes : Buffer.concat([this.#waiting, bytes]);
      return this.input() || this.#waiting.length < INPUT_LIMIT;
    };
    backend.resume();
  }

  /** The device has bytes for the host. */
  output(): void {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#drain();
    }, GATHER_MILLISECONDS);
  }

  #drain(): void {
    while (!this.#stalled) {
      const count = this.device.drainTransmit(this.#chunk);
      if (count === 0) return;
      if (this.backend !== undefined) this.#stalled = !this.backend.write(this.#chunk.subarray(0, count));
    }
  }

  /** The device may have room. @returns whether all input so far is with it */
  input(): boolean {
    if (this.#waiting.length > 0) this.#waiting = this.#waiting.subarray(this.device.receive(this.#waiting));
    if (this.#waiting.length > 0) return false;
    this.backend?.resume();
    return true;
  }

  /** Takes all that the device holds: what is left with it when it is saved is said once more by who goes on. */
  flush(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    // A host end that holds output back has room for what a device holds.
    for (let count = this.device.drainTransmit(this.#chunk); count > 0;) {
      this.backend?.write(this.#chunk.subarray(0, count));
      count = this.device.drainTransmit(this.#chunk);
    }
  }

  /** The device goes away: its last bytes are written, the host end stays. */
  close(): void {
    this.flush();
    if (this.backend === undefined) return;
    this.backend.onDrain = () => undefined;
    this.backend.onInput = () => false;
  }
}
