/** The names of devices that were given none: Cloud Hypervisor's, numbered across all kinds in the order of their slots. */
import type { VmConfig } from './vm-config.js';

const PREFIXES = { disks: '_disk', net: '_net', pmem: '_pmem', vsock: '_vsock' } as const;
export type NamedKind = keyof typeof PREFIXES;

export class DeviceNames {
  #next = 0;

  /** Gives each device of a configuration its name. */
  fill(config: VmConfig): void {
    const taken = new Set(
      Object.keys(PREFIXES).flatMap((kind) => devices(config, kind as NamedKind).map(({ id }) => id)),
    );
    for (const kind of ['disks', 'net', 'pmem', 'vsock'] as const) {
      for (const device of devices(config, kind)) device.id ??= this.#name(kind, taken);
    }
  }

  #name(kind: NamedKind, taken: ReadonlySet<string | undefined>): string {
    for (;;) {
      const name = `${PREFIXES[kind]}${this.#next++}`;
      if (!taken.has(name)) return name;
    }
  }
}

function devices(config: VmConfig, kind: NamedKind): { id?: string | undefined }[] {
  return [config[kind] ?? []].flat();
}
