/** The composition root of an I/O worker: it builds its devices and serves their queues until main ends it. */
import fs from 'node:fs';
import os from 'node:os';
import { parentPort, receiveMessageOnPort } from 'node:worker_threads';
import { BlockDevice } from '../block/block-device.js';
import { openEngine } from '../block/engines/engine.js';
import { openImage } from '../block/formats/open-image.js';
import { monotonicClock } from '../state/monotonic-clock.js';
import { WrittenPages, type WrittenPagesHandle } from '../memory/written-pages.js';
import { undoAll } from '../sys/close-all.js';
import { EPOLL, type HostKernel } from '../sys/host-kernel.js';
import { tapControl } from '../net/tap.js';
import { IntxLines } from '../pci/intx.js';
import { VhostNetDevice } from '../net/vhost-device.js';
import { BalloonDevice } from '../virtio/devices/balloon.js';
import { BytePipe } from '../virtio/devices/byte-pipe.js';
import { ConsoleDevice } from '../virtio/devices/console.js';
import type { DeviceContext, VirtioDevice } from '../virtio/device.js';
import { EntropyDevice } from '../virtio/devices/entropy.js';
import { EpollLoop } from '../virtio/transport/epoll-loop.js';
import { GroupLimiter } from '../virtio/limiter-group.js';
import { type DeviceModule, reasonOf } from '../virtio/device-module.js';
import { MemDevice } from '../virtio/devices/mem.js';
import { NetDevice } from '../virtio/devices/net/net.js';
import { PmemDevice } from '../virtio/devices/pmem.js';
import { RateLimiter, type LimiterOptions } from '../virtio/rate-limiter.js';
import { VirtioRunner } from '../virtio/transport/runner.js';
import { VsockDevice } from '../virtio/devices/vsock/vsock.js';
import { WatchdogDevice } from '../virtio/devices/watchdog.js';
import {
  type BackendSpec,
  type IoCommand,
  type IoMessage,
  IoOrder,
  type IoWorkerStart,
  type LimitGroup,
  type ServedDevice,
} from '../vmm/devices/device-specs.js';
import type { ModuleQuestion } from '../vmm/host/device-module.js';
import { GuestLog } from '../vmm/log/guest-log.js';
import { HostPages } from '../vmm/memory/host-pages.js';
import { attachMemory, attachPart } from '../vmm/memory/memory-part.js';
import { attachSignals } from './backends.js';
import { describeModule, type Import, loadModule, makeDevice } from './device-module.js';
import { Outbox } from './outbox.js';
import { startData } from './start-data.js';

/** Transfers under way for each disk. */
const ENGINE_DEPTH = 128;
/**
 * Steps of niceness (sched(7)) that a worker is behind the vCPUs. On a CPU that they share, a busy worker would otherwise stop the
 * guest at each kick, and each packet would cost an exit, an interrupt and two switches; so it lets the driver queue more first.
 * A worker that uses little of the CPU runs at once all the same. docs/performance.md has what other numbers give.
 */
const NICENESS = 1;
const MAX_NICENESS = 19;

/** Does what main started the thread for. */
export function startIoThread(kernel: HostKernel, importModule: Import): void {
  const data = startData() as IoWorkerStart | { readonly question: ModuleQuestion };
  if ('question' in data) {
    void describeModule(data.question, importModule).then((answer) => parentPort!.postMessage(answer));
  } else if (data.modules.length === 0) runIoThread(kernel, data, new Map());
  else void runWithModules(kernel, data, importModule);
}

/** What it rejects with is the thread's error. */
async function runWithModules(kernel: HostKernel, data: IoWorkerStart, importModule: Import): Promise<void> {
  const modules = new Map<string, DeviceModule>();
  for (const file of data.modules) modules.set(file, await loadModule(file, importModule));
  runIoThread(kernel, data, modules);
  // Whatever a module has left open.
  process.exit();
}

/** Serves queues until main ends the worker. */
function runIoThread(kernel: HostKernel, data: IoWorkerStart, modules: ReadonlyMap<string, DeviceModule>): void {
  const thread = kernel.threadId();
  fs.writeFileSync(`/proc/self/task/${thread}/comm`, data.name);
  try {
    os.setPriority(thread, Math.min(os.getPriority(thread) + NICENESS, MAX_NICENESS));
  } catch {
    // A sandbox that forbids it: slower where CPUs are shared, and nothing else.
  }
  if (data.affinity !== undefined) kernel.setAffinity(data.affinity);
  const post = (message: IoMessage) => parentPort!.postMessage(message);
  const loop = new EpollLoop(kernel);
  const memory = attachMemory(data.memory, kernel);
  const pages = new HostPages(kernel, memory);
  const command = new Int32Array(data.command);
  pages.written = attachWritten(data.written);

  const guestLog = new GuestLog((level, line, leftOut) => post({ kind: 'log', level, line, leftOut }));
  const outbox = new Outbox(data.mail, post);

  function limiter(options: LimiterOptions | undefined): RateLimiter | undefined {
    return options === undefined ? undefined : new RateLimiter(options, () => loop.now());
  }

  /** It protects the host, so its time goes on while the machine is paused: the buckets fill, and no further. */
  function groupLimiter({ limits, state }: LimitGroup): GroupLimiter {
    return new GroupLimiter(limits, state, () => monotonicClock() / 1e6);
  }

  function attachWritten(handle: WrittenPagesHandle | undefined): WrittenPages | undefined {
    return handle === undefined ? undefined : WrittenPages.attach(kernel, handle);
  }

  function build(spec: BackendSpec, context: DeviceContext): VirtioDevice {
    switch (spec.kind) {
      case 'block': {
        const { readonly, serial, format, buffered, sparse, group } = spec;
        const image = openImage(kernel, spec);
        const { engine } = orClose(image, () => openEngine(kernel, spec.direct, ENGINE_DEPTH, spec.engine));
        if (engine.name !== spec.engine) context.log('warn', `${spec.engine} failed here, so ${engine.name} it is`);
        return new BlockDevice(context, {
          ...{ readonly, serial, image, engine, buffered, sparse },
          raw: format === 'raw',
          limiter: group === undefined ? limiter(spec.limits) : groupLimiter(group),
        });
      }
      case 'net':
        return new NetDevice(context, {
          taps: spec.taps,
          receiveLimit: limiter(spec.limits),
          transmitLimit: limiter(spec.limits),
          control: tapControl(kernel),
        });
      case 'vhost-net': {
        const { taps, calls } = spec;
        return new VhostNetDevice(context, { taps, control: tapControl(kernel), calls });
      }
      case 'vsock':
        return new VsockDevice(context, spec);
      case 'console':
        return new ConsoleDevice(context, { pipe: new BytePipe(spec.pipe), wake: spec.wake });
      case 'entropy':
        return new EntropyDevice(context, { source: spec.source });
      case 'mem': {
        const discard = (address: number, length: number) => pages.discard(address, length);
        const populate = spec.populate
          ? (address: number, length: number) => pages.populate(address, length)
          : undefined;
        return new MemDevice(context, { plugged: spec.plugged, discard, populate });
      }
      case 'balloon':
        return new BalloonDevice(context, { discard: (address, length) => pages.discard(address, length) });
      case 'pmem':
        return new PmemDevice(context, { fd: spec.fd });
      case 'module':
        return makeDevice(modules.get(spec.file)!, spec, context);
      case 'watchdog':
        return new WatchdogDevice(context, { expired: () => context.emit({ kind: 'watchdog-expired' }) });
    }
  }

  const signals = attachSignals(data.hypervisor, kernel, data.vm);
  const intx = IntxLines.attach(data.intx, signals);
  const runners = new Map<string, VirtioRunner>();
  function add({ handle, queues, backend }: ServedDevice): void {
    const emit = (device: string, message: unknown) => outbox.send({ kind: 'device', device, message });
    const log = (level: 'info' | 'warn', line: string) => guestLog.log(handle.id, level, line);
    const services = { kernel, loop, wake: data.wake, memory, signals, intx, log, emit };
    const runner = new VirtioRunner(handle, queues, services, (context) => build(backend, context));
    const { written } = pages;
    if (written !== undefined) orClose(runner, () => track(runner, written));
    runners.set(handle.id, runner);
  }

  function drop(device: string): void {
    const runner = runners.get(device);
    runners.delete(device);
    runner?.close();
  }

  function obey(order: IoCommand, held: boolean): void {
    switch (order.kind) {
      case 'control':
        runners.get(order.device)?.control(order.message);
        return;
      case 'serve':
        add(order.device);
        // What its driver has done by now, nobody has told this worker.
        if (held) runners.get(order.device.handle.id)!.pause();
        else runners.get(order.device.handle.id)!.update();
        return;
      case 'drop':
        drop(order.device);
        return;
      case 'sync':
        syncAll();
        return;
      case 'add-memory':
        // The host's kernel would mark what lies behind the bitmap.
        if (pages.written?.covers(order.part.range) === false)
          throw new Error('It does not fit what is watched of guest memory');
        standingStill(held, () => memory.add(attachPart(order.part, kernel)));
        return;
      case 'memory-kind':
        memory.setKind(order.part.range.address, order.part.kind);
        return;
      case 'remove-memory':
        standingStill(held, () => {
          for (const runner of runners.values()) runner.loseMemory(order.part.range);
          memory.remove(order.part.range.address);
        });
        return;
      case 'track-writes':
        standingStill(held, () => {
          pages.written = attachWritten(order.pages);
          for (const runner of runners.values()) track(runner, pages.written);
        });
    }
  }

  /** All that can. @throws Error with what the first could not */
  function syncAll(): void {
    let failure: string | undefined;
    for (const [id, runner] of runners) {
      try {
        runner.sync();
      } catch (error) {
        failure ??= `${id}: ${reasonOf(error)}`;
      }
    }
    if (failure !== undefined) throw new Error(failure);
  }

  /** Nothing is under way meanwhile. */
  function standingStill(held: boolean, change: () => void): void {
    if (!held) for (const runner of runners.values()) runner.pause();
    try {
      change();
    } finally {
      if (!held) for (const runner of runners.values()) runner.resume();
    }
  }

  function takeOrders(held: boolean): void {
    for (let received = receiveMessageOnPort(parentPort!); received !== undefined;) {
      const order = received.message as IoCommand;
      let failure: string | undefined;
      try {
        obey(order, held);
      } catch (error) {
        failure = reasonOf(error);
      }
      if (order.kind !== 'control') post({ kind: 'answer', failure });
      received = receiveMessageOnPort(parentPort!);
    }
  }

  for (const device of data.devices) add(device);
  loop.watch(data.wake, EPOLL.IN | EPOLL.EDGE, () => {
    takeOrders(false);
    for (const runner of runners.values()) runner.update();
    outbox.flush();
  });
  for (let word = Atomics.load(command, 0); (word & IoOrder.stop) === 0; word = Atomics.load(command, 0)) {
    if ((word & IoOrder.hold) === 0) loop.turn(-1);
    else loop.standStill(() => holdStill());
  }

  /** Serves nothing until it is let go; what comes meanwhile waits where it is, but for main's commands. */
  function holdStill(): void {
    for (const runner of runners.values()) runner.pause();
    for (;;) {
      const word = Atomics.load(command, 0);
      // At its end they are closed as they are.
      if ((word & IoOrder.stop) !== 0) return;
      if ((word & IoOrder.hold) === 0) break;
      post({ kind: 'held', word });
      takeOrders(true);
      Atomics.wait(command, 0, word);
    }
    for (const runner of runners.values()) runner.resume();
  }

  for (const device of [...runners.keys()]) {
    try {
      drop(device);
    } catch (error) {
      // Such as the host's, when an image is synced for the last time. The others are closed all the same.
      post({ kind: 'close-failed', device, reason: reasonOf(error) });
    }
  }
  guestLog.close();
  loop.unwatch(data.wake);
  loop.close();
}

/** @throws Error that names the device */
function track(runner: VirtioRunner, written: WrittenPages | undefined): void {
  try {
    runner.trackWrites(written);
  } catch (error) {
    throw new Error(`${runner.handle.id}: ${reasonOf(error)}`, { cause: error });
  }
}

/** What is made beside something that is closed when that fails. */
function orClose<T>(beside: { close(): void }, make: () => T): T {
  try {
    return make();
  } catch (error) {
    return undoAll(error, [() => beside.close()]);
  }
}
