/**
 * The virtio console (virtio 1.3, 5.3), one port, on an I/O worker. Its bytes go to main through a {@link BytePipe}, since
 * terminals and sockets are Node streams there. Not modelled: multiple ports, emergency write.
 */
import type { BytePipe } from './byte-pipe.js';
import {
  type DeviceContext,
  type DeviceQueue,
  type Driver,
  type VirtioDescription,
  type VirtioDevice,
  VirtioType,
} from '../device.js';
import { Pop } from '../queue/queue.js';

const RECEIVE = 0;
const TRANSMIT = 1;
const FEATURE_SIZE = 0;
/** Words of the device's own: bytes of the transmit chain in hand that are in the pipe already. */
const Own = { sent: 0 } as const;
/** Copied at a time. */
const CHUNK = 4096;

export function consoleDescription(queueSize: number): VirtioDescription {
  return {
    type: VirtioType.Console,
    classCode: 0x078000,
    features: [FEATURE_SIZE],
    queueSizes: [queueSize, queueSize],
    config: new Uint8Array(12),
    writable: [],
    counters: [],
  };
}

export interface ConsoleOptions {
  readonly pipe: BytePipe;
  /** Signalled by main: there is input, or room for output. */
  readonly wake: number;
}

/** What main says: the terminal's size. */
export interface ConsoleSize {
  readonly columns: number;
  readonly rows: number;
}

export class ConsoleDevice implements VirtioDevice {
  #queues: Driver['queues'] = [];
  readonly #chunk = new Uint8Array(CHUNK);
  #broken = false;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: ConsoleOptions,
  ) {
    context.loop.watch(options.wake, 1, () => {
      context.kernel.drainEvent(options.wake);
      for (const queue of this.#queues) if (queue !== undefined) this.kick(queue);
    });
    // In a machine that was restored nobody has heard of it.
    if (options.pipe.output.used > 0) context.emit({ kind: 'console-output' });
  }

  activate({ queues }: Driver): void {
    this.#queues = queues;
    this.#broken = false;
  }

  kick(queue: DeviceQueue): void {
    if (this.#broken) return;
    if (queue.index === TRANSMIT) this.#transmit(queue);
    else if (queue.index === RECEIVE) this.#receive(queue);
    queue.signal();
  }

  #transmit(queue: DeviceQueue): void {
    const { ring } = queue;
    const { output } = this.options.pipe;
    const { own } = this.context;
    for (;;) {
      const taken = ring.pop();
      if (taken === Pop.Broken) {
        this.#break(ring.fault);
        return;
      }
      if (taken === Pop.Empty) {
        if (!ring.resumeKicks()) return;
        continue;
      }
      const { chain } = ring;
      // Of a state that was loaded it may be any number.
      let sent = own[Own.sent] >>> 0;
      while (sent < chain.readableBytes) {
        const count = chain.read(sent, this.#chunk, 0, Math.min(CHUNK, output.room));
        if (count === 0) {
          // Main makes room and wakes this worker.
          ring.unpop();
          this.context.emit({ kind: 'console-output' });
          return;
        }
        const written = output.write(this.#chunk, 0, count);
        sent += written;
        own[Own.sent] = sent;
        // Main has read everything before this: it has to be told that there is more.
        if (output.used <= written) this.context.emit({ kind: 'console-output' });
      }
      own[Own.sent] = 0;
      ring.push(chain.id, 0);
    }
  }

  #receive(queue: DeviceQueue): void {
    const { ring } = queue;
    const { input } = this.options.pipe;
    let received = false;
    while (input.used > 0) {
      const taken = ring.pop();
      if (taken === Pop.Broken) {
        this.#break(ring.fault);
        return;
      }
      if (taken === Pop.Empty) {
        if (!ring.resumeKicks()) break;
        continue;
      }
      const { chain } = ring;
      const count = input.read(this.#chunk, 0, Math.min(CHUNK, chain.writableBytes));
      chain.write(0, this.#chunk, 0, count);
      ring.push(chain.id, count);
      received = true;
    }
    if (received) this.context.emit({ kind: 'console-room' });
  }

  #break(fault: string): void {
    this.#broken = true;
    this.context.needsReset(fault);
  }

  deactivate(): void {
    this.#queues = [];
  }

  control(message: unknown): void {
    const { columns, rows } = message as ConsoleSize;
    const { config } = this.context;
    this.context.changeConfig(() => config.set([columns & 0xff, columns >> 8, rows & 0xff, rows >> 8]));
  }

  close(): void {
    this.context.loop.unwatch(this.options.wake);
  }
}
