/** vm.resize: what a machine is to have from now on. */
import { checkConfig } from '../../config/check-config.js';
import { readHostFacts } from '../../config/host-facts.js';
import type { VmConfig } from '../../config/vm-config.js';
import { ZONES_ALONE } from '../memory/hotplug.js';
import { RequestError } from './machine-error.js';

/** By the names that the API has; what is left out stays as it is. */
export interface Resize {
  readonly desired_vcpus?: number | undefined;
  /** Bytes. */
  readonly desired_ram?: number | undefined;
  /** Bytes that the balloon is to hold. */
  readonly desired_balloon?: number | undefined;
}

const FIELDS: Readonly<Record<string, keyof Resize | undefined>> = {
  'cpus.boot_vcpus': 'desired_vcpus',
  'memory.size': 'desired_ram',
  'balloon.size': 'desired_balloon',
};

/** The configuration of a machine that does not run, with another size. @throws RequestError */
export function resized(config: VmConfig, wanted: Resize): VmConfig {
  const { desired_vcpus: vcpus, desired_ram: ram, desired_balloon: balloon } = wanted;
  if (balloon !== undefined && config.balloon === undefined) {
    throw new RequestError('The machine has no balloon', 'unknown');
  }
  const { cpus, memory } = config;
  if (ram !== undefined && (memory.zones ?? []).length > 0) throw new RequestError(ZONES_ALONE, 'invalid');
  return checked({
    ...config,
    cpus: { ...cpus, boot_vcpus: vcpus ?? cpus.boot_vcpus },
    memory: { ...memory, size: ram ?? memory.size },
    ...(balloon === undefined ? {} : { balloon: { ...config.balloon, size: balloon } }),
  });
}

/** The configuration of a machine that does not run, with another size of a memory zone. @throws RequestError */
export function resizedZone(config: VmConfig, id: string, size: number): VmConfig {
  const zones = config.memory.zones ?? [];
  if (!zones.some((zone) => zone.id === id)) throw new RequestError(`The machine has no memory zone ${id}`, 'unknown');
  const others = zones.map((zone) => (zone.id === id ? { ...zone, size } : zone));
  return checked({ ...config, memory: { ...config.memory, zones: others } });
}

function checked(config: unknown): VmConfig {
  const found = checkConfig(config, readHostFacts());
  if ('config' in found) return found.config;
  const { path, accepted } = found.problem;
  // A zone's number is that of the one that was named.
  const field = path
    .map(String)
    .join('.')
    .replace(/^memory\.zones\.\d+\./, 'memory.');
  throw new RequestError(`${FIELDS[field] ?? field}: accepted is ${accepted}`, 'invalid');
}
