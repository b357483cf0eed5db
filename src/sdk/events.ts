/** Events as `--event-monitor` writes them: JSON objects with an empty line after each. */
import { EventEmitter, on, once } from 'node:events';
import type { Readable } from 'node:stream';
import type { CallOptions } from './connection.js';

export interface VmmEvent {
  /** Since the process started. */
  readonly timestamp: { readonly secs: number; readonly nanos: number };
  readonly source: 'vmm' | 'vm' | 'guest' | 'virtio-device';
  /** Such as `booted` or `device-removed`. */
  readonly event: string;
  readonly properties: Readonly<Record<string, string>> | null;
}

export class EventSource {
  readonly #events = new EventEmitter();
  #ended = false;

  /** @internal */
  constructor(stream: Readable) {
    // Each reader listens, and so does each wait.
    this.#events.setMaxListeners(0);
    let text = '';
    stream.setEncoding('utf8');
    stream.on('data', (part: string) => {
      const events = `${text}${part}`.split('\n\n');
      text = events.pop()!;
      for (const event of events) this.#events.emit('event', JSON.parse(event));
    });
    stream.on('error', () => undefined);
    stream.on('close', () => {
      this.#ended = true;
      this.#events.emit('end');
    });
  }

  /** What happens from now on, to the end of the process. @throws the signal's reason, to who reads */
  from({ signal }: CallOptions = {}): AsyncIterableIterator<VmmEvent> {
    signal?.throwIfAborted();
    // It listens from here on, whenever it is read.
    const events = on(this.#events, 'event', { ...(signal && { signal }), close: ['end'] });
    if (this.#ended) this.#events.emit('end');
    const result = ({ done, value }: IteratorResult<unknown[], unknown>): IteratorResult<VmmEvent, undefined> =>
      done === true ? { done, value: undefined } : { done: false, value: value[0] as VmmEvent };
    return {
      next: async () => {
        try {
          return result((await events.next()) as IteratorResult<unknown[], unknown>);
        } catch (error) {
          signal?.throwIfAborted();
          throw error;
        }
      },
      return: async () => result((await events.return!()) as IteratorResult<unknown[], unknown>),
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }

  /** Resolves with the next event, or when the signal is aborted. */
  async next(signal: AbortSignal): Promise<void> {
    await once(this.#events, 'event', { signal }).catch(() => undefined);
  }
}
