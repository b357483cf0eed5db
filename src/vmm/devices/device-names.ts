/** The names of devices that nobody named: Cloud Hypervisor's, whose numbers run across kinds (`_disk0`, `_net1`). */
import type { DeviceModuleConfig, DiskConfig, NetConfig, PmemConfig, VsockConfig } from '../../config/device-config.js';
import type { VmConfig } from '../../config/vm-config.js';

/** The kinds of devices that come and go while the machine runs. */
export type DeviceKind = 'disk' | 'net' | 'pmem' | 'vsock' | 'module';

type AnyConfig = DiskConfig | NetConfig | PmemConfig | VsockConfig | DeviceModuleConfig;

export class DeviceNames {
  #next = 0;

  /** Names the devices of a configuration that have none, in the order of their slots. */
  nameAll(config: VmConfig): void {
    const { disks, net, pmem, vsock, device_modules: modules } = config;
    const taken = deviceNames(config);
    for (const disk of disks) this.name('disk', disk, taken);
    for (const one of net) this.name('net', one, taken);
    for (const one of pmem) this.name('pmem', one, taken);
    if (vsock !== undefined) this.name('vsock', vsock, taken);
    for (const one of modules) this.name('module', one, taken);
  }

  /** Names a device that has no name. A number is never given twice: whoever looks for a device that is gone finds no other. */
  name(kind: DeviceKind, device: AnyConfig, taken: ReadonlySet<string>): void {
    while (device.id === undefined) {
      const name = `_${kind}${this.#next++}`;
      if (!taken.has(name)) device.id = name;
    }
  }
}

/** Of the devices that are there as long as the machine is; no client can give a device such a name. */
export const FIXED_NAMES = {
  console: '__console',
  rng: '__rng',
  balloon: '__balloon',
  watchdog: '__watchdog',
} as const;

/** The names of those that a configuration has. */
export function fixedNames({ console, rng, balloon, watchdog }: VmConfig): Set<string> {
  return new Set([
    ...(console.mode === 'Off' ? [] : [FIXED_NAMES.console]),
    rng.id ?? FIXED_NAMES.rng,
    ...(balloon === undefined ? [] : [balloon.id ?? FIXED_NAMES.balloon]),
    ...(watchdog ? [FIXED_NAMES.watchdog] : []),
  ]);
}

/** The names that devices of a configuration have, and what else no device may be named. */
export function deviceNames({
  disks,
  net,
  pmem,
  vsock,
  rng,
  balloon,
  memory,
  rate_limit_groups: groups,
  device_modules: modules,
}: VmConfig): Set<string> {
  // A zone has its name whether or not it has a device.
  const all = [...disks, ...net, ...pmem, vsock, rng, balloon, ...modules, ...groups, ...(memory.zones ?? [])];
  return new Set(all.map((device) => device?.id).filter((id) => id !== undefined));
}

/** A device's name, which `DeviceNames` has seen to. */
export function nameOf({ id }: { readonly id?: string | undefined }): string {
  if (id === undefined) throw new Error('A device without a name');
  return id;
}
