/** vm.resize: what a machine is to have from now on. */
import { checkConfig } from '../../config/check-config.js';
import { readHostFacts } from '../../config/host-facts.js';
import type { VmConfig } from '../../config/vm-config.js';
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
  const checked = checkConfig(
    {
      ...config,
      cpus: { ...cpus, boot_vcpus: vcpus ?? cpus.boot_vcpus },
      memory: { ...memory, size: ram ?? memory.size },
      ...(balloon === undefined ? {} : { balloon: { ...config.balloon, size: balloon } }),
    },
    readHostFacts(),
  );
  if ('config' in checked) return checked.config;
  const { path, accepted } = checked.problem;
  const field = path.map(String).join('.');
  throw new RequestError(`${FIELDS[field] ?? field}: accepted is ${accepted}`, 'invalid');
}
