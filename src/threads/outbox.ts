/**
 * What a worker tells main. However often a guest makes its devices tell something, only so many messages are on their way;
 * beyond that a device's message of one kind replaces the one before it, and waits until main has read.
 */
import { IN_FLIGHT_LIMIT, type IoMessage, Mail } from '../vmm/devices/device-specs.js';

type DeviceMessage = Extract<IoMessage, { kind: 'device' }>;

export class Outbox {
  readonly #words: Int32Array;
  readonly #held = new Map<string, DeviceMessage>();

  /** @param mail shared with main, which signals this worker's wake-up event when there is room again */
  constructor(
    mail: SharedArrayBuffer,
    private readonly post: (message: IoMessage) => void,
  ) {
    this.#words = new Int32Array(mail);
  }

  send(message: DeviceMessage): void {
    const { kind } = message.message as { readonly kind?: unknown };
    this.#held.set(`${message.device} ${String(kind)}`, message);
    this.flush();
  }

  /** Called when there may be room. */
  flush(): void {
    const words = this.#words;
    for (const [key, message] of this.#held) {
      if (Atomics.load(words, Mail.inFlight) >= IN_FLIGHT_LIMIT) {
        Atomics.store(words, Mail.waiting, 1);
        // Main may have read everything before it could see this.
        if (Atomics.load(words, Mail.inFlight) >= IN_FLIGHT_LIMIT) return;
      }
      this.#held.delete(key);
      Atomics.add(words, Mail.inFlight, 1);
      this.post(message);
    }
  }
}
