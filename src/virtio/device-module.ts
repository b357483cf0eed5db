/** What a user's own device is: a module that describes it, and makes it on its I/O worker. */
import type { DeviceContext, DeviceQueue, Driver, EventLoop, VirtioDescription, VirtioDevice } from './device.js';
import type { Pop } from './queue/queue.js';
import type { serveQueue } from './queue/serve.js';

/** What the user said of the device. */
export interface DeviceSetup {
  /** Its name, such as `_module0`. */
  readonly id: string;
  /** What `config=` says; empty where nothing. */
  readonly config: string;
}

/** Values that a device works with, given to it so that a module imports nothing. */
export interface DeviceValues {
  readonly Pop: typeof Pop;
  readonly serveQueue: typeof serveQueue;
}

/** What the module exports. */
export interface DeviceModule {
  /** What the device is to its driver. Called before there is a machine, and on another thread than the device. */
  readonly describe: (setup: DeviceSetup) => VirtioDescription;
  /** Makes the device, once for each life of the machine. What it throws is told as a mistake of the user's. */
  readonly create: (context: DeviceContext, setup: DeviceSetup, values: DeviceValues) => VirtioDevice;
}

/**
 * A user's device on its worker. What it throws is a line of the log, and the device needs a reset: until its driver has done that,
 * it is called no more.
 */
export class ModuleDevice implements VirtioDevice {
  readonly #device: VirtioDevice;
  #failed = false;

  /** @throws what `create` throws */
  constructor(
    private readonly context: DeviceContext,
    create: (context: DeviceContext) => VirtioDevice,
  ) {
    this.#device = create({ ...context, loop: this.#guarded(context.loop) });
  }

  get holdsChains(): boolean {
    return this.#device.holdsChains === true;
  }

  activate(driver: Driver): void {
    this.#failed = false;
    this.#run('activate', () => this.#device.activate(driver));
  }

  kick(queue: DeviceQueue): void {
    if (this.#failed) return;
    try {
      this.#device.kick(queue);
    } catch (error) {
      this.#fail('kick', error);
    }
  }

  configWritten(): void {
    this.#run('configWritten', () => this.#device.configWritten?.());
  }

  /** What it throws is for who has asked. */
  sync(): void {
    this.#device.sync?.();
  }

  deactivate(): void {
    this.#end('deactivate', () => this.#device.deactivate());
  }

  close(): void {
    this.#end('close', () => this.#device.close());
  }

  #run(what: string, step: () => void): void {
    if (this.#failed) return;
    try {
      step();
    } catch (error) {
      this.#fail(what, error);
    }
  }

  #fail(what: string, error: unknown): void {
    this.#failed = true;
    this.context.needsReset(`${what}: ${reasonOf(error)}`);
  }

  /** Also of one that has failed: it has to let go of what it has. */
  #end(what: string, step: () => void): void {
    try {
      step();
    } catch (error) {
      this.context.log('warn', `${what}: ${reasonOf(error)}`);
    }
  }

  #guarded(loop: EventLoop): EventLoop {
    return {
      watch: (fd, events, handler) =>
        loop.watch(fd, events, (ready) => this.#run('a handler of events', () => handler(ready))),
      rewatch: (fd, events) => loop.rewatch(fd, events),
      unwatch: (fd) => loop.unwatch(fd),
      timer: (handler) => loop.timer(() => this.#run('a timer', handler)),
      now: () => loop.now(),
    };
  }
}

/** One line, whatever was thrown. */
export function reasonOf(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.split('\n')[0];
}
