/**
 * The process's events, for programs: each a JSON object of several lines and an empty line, as Cloud Hypervisor writes them. Who
 * does not read, has gone, or is a disk that is full, loses events and holds nothing up.
 */
import fs from 'node:fs';
import { OptionError } from '../config/option-syntax.js';
import type { ProcessOptions } from '../config/vm-config.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { HostOutput, openInherited, openOutputFile, type OutputTarget } from '../vmm/host/host-output.js';
import type { EventSink } from '../vmm/log/event-sink.js';
import type { Logger } from '../vmm/log/logger.js';

export interface EventMonitor {
  readonly tell: EventSink;
  /** Resolves when every event is written, or nobody takes them. */
  readonly close: () => Promise<void>;
}

/** @throws OptionError when nothing can be written there */
export function openEventMonitor(
  place: NonNullable<ProcessOptions['eventMonitor']>,
  kernel: HostKernel,
  logger: Logger,
): EventMonitor {
  const output = new HostOutput(kernel, openTarget(place), {
    hold: true,
    lines: true,
    refused: (reason) => logger.warn(`Events are lost: ${reason}`),
    lost: (lines) => logger.warn(`${lines} lines of events were lost`),
  });
  const tell: EventSink = (source, event, properties) => {
    // Monotonic, since the process started.
    const now = performance.now();
    const secs = Math.floor(now / 1000);
    const timestamp = { secs, nanos: Math.floor((now - secs * 1000) * 1e6) };
    const text = JSON.stringify({ timestamp, source, event, properties: properties ?? null }, null, 2);
    output.write(Buffer.from(`${text}\n\n`));
  };
  return { tell, close: () => output.close() };
}

function openTarget(place: NonNullable<ProcessOptions['eventMonitor']>): OutputTarget {
  try {
    if ('path' in place) return openOutputFile(place.path, { truncate: true });
    const kind = fs.fstatSync(place.fd);
    // What Node.js has open itself: epoll instances, eventfds.
    if (!(kind.isFile() || kind.isFIFO() || kind.isSocket() || kind.isCharacterDevice())) throw new Error('not a file');
    return openInherited(place.fd);
  } catch (error) {
    const [typed, accepted] =
      'fd' in place
        ? [`fd=${place.fd}`, 'a descriptor that is open, of a file, FIFO, socket or terminal']
        : [`path=${place.path}`, 'a file that can be written, or a FIFO that somebody reads'];
    throw new OptionError(
      `--event-monitor ${typed}`,
      `${accepted}${error instanceof Error ? `: ${error.message}` : ''}`,
    );
  }
}
