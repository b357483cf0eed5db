/** What a machine holds on the host from its boot to its end, over all its resets: devices' resources, terminals and sockets. */
import type { VmConfig } from '../../config/vm-config.js';
import { tapName } from '../../net/tap.js';
import { HostResources } from '../host/host-resources.js';
import { openSerialBackend, type SerialBackend } from '../host/serial-backend.js';
import type { GuestLog } from '../log/guest-log.js';
import type { Backends } from './incarnation.js';
import type { MachineParts } from './machine-parts.js';

export interface HostEnds {
  readonly resources: HostResources;
  readonly backends: Backends;
  /** Resolves when the host has what it takes of the guest's output, and all is given back. */
  close(): Promise<void>;
}

/**
 * @param quit called when a user presses the escape key
 * @throws MachineError in one line; nothing is left behind then
 */
export async function openHostEnds(
  { config, kernel, openTaps, ioWorker }: MachineParts,
  guestLog: GuestLog,
  quit: () => void,
): Promise<HostEnds> {
  const resources = new HostResources(kernel, config, openTaps, ioWorker.url);
  const opened: SerialBackend[] = [];
  const close = async () => {
    for (const backend of opened) await backend.close();
    resources.close();
  };
  const open = async (option: 'serial' | 'console') => {
    const tell = (level: 'info' | 'warn', line: string) => guestLog.log(option, level, line);
    const backend = await openSerialBackend(config[option], kernel, { option, quit, tell });
    if (backend !== undefined) opened.push(backend);
    return backend;
  };
  try {
    for (const module of config.device_modules) await resources.addModule(module);
    return { resources, backends: { serial: await open('serial'), console: await open('console') }, close };
  } catch (error) {
    await close().catch(() => undefined);
    throw error;
  }
}

/** The configuration with what the host has named: taps, pseudo-terminals. */
export function namedByHost({ config, kernel }: MachineParts, { resources, backends }: HostEnds): VmConfig {
  const place = (option: 'serial' | 'console') => ({ file: backends[option]?.path, ...config[option] });
  const net = config.net.map((device) => {
    const tap = resources.net.find(({ config: { id } }) => id === device.id)?.taps.at(0);
    return { ...device, tap: tap === undefined ? device.tap : tapName(kernel, tap) };
  });
  return { ...config, net, serial: place('serial'), console: place('console') };
}
