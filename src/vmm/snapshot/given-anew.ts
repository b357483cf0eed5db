/** What of a machine's configuration is another where it is restored: so one snapshot makes many machines. */
import { checkConfig } from '../../config/check-config.js';
import { readHostFacts } from '../../config/host-facts.js';
import type { RestoreConfig } from '../../config/restore-config.js';
import { type VmConfig, withAllVcpus } from '../../config/vm-config.js';
import { RequestError } from '../machine/machine-error.js';

/** By the names of the configuration's fields. */
export type GivenAnew = Pick<RestoreConfig, 'net' | 'disks' | 'vsock' | 'serial' | 'console'> & {
  /** Descriptors of taps, by network. */
  readonly descriptors: ReadonlyMap<string, readonly number[]>;
};

/** @param saved a snapshot's @throws RequestError */
export function configAnew(saved: VmConfig, anew: GivenAnew): VmConfig {
  const { descriptors, net = [], disks = [], vsock, serial, console } = anew;
  const known = (
    field: string,
    devices: readonly { readonly id?: string | undefined }[],
    ids: readonly { readonly id: string }[],
  ) => {
    const missing = ids.find(({ id }) => !devices.some((device) => device.id === id));
    if (missing !== undefined) throw new RequestError(`${field}: the snapshot has no ${missing.id}`, 'invalid');
  };
  known(
    'net_fds',
    saved.net,
    [...descriptors.keys()].map((id) => ({ id })),
  );
  known('net', saved.net, net);
  known('disks', saved.disks, disks);
  if (vsock !== undefined && saved.vsock === undefined)
    throw new RequestError('vsock: the snapshot has none', 'invalid');
  if (console !== undefined && (console.mode === 'Off') !== (saved.console.mode === 'Off')) {
    throw new RequestError('console: accepted is another place of a console that the snapshot has', 'invalid');
  }
  if (serial !== undefined && (serial.mode === 'Off') !== (saved.serial.mode === 'Off')) {
    throw new RequestError('serial: accepted is another place of a serial port that the snapshot has', 'invalid');
  }
  const config = {
    ...saved,
    net: saved.net.map((device) => {
      const fds = descriptors.get(device.id!);
      if (device.fds !== undefined && fds?.length !== device.fds.length) {
        const accepted = `${device.fds.length} descriptors for ${device.id}, as many as it had`;
        throw new RequestError(`net_fds: accepted are ${accepted}`, 'invalid');
      }
      return { ...device, ...net.find(({ id }) => id === device.id), ...(fds === undefined ? {} : { fds: [...fds] }) };
    }),
    disks: saved.disks.map((device) => ({ ...device, ...disks.find(({ id }) => id === device.id) })),
    ...(saved.vsock === undefined ? {} : { vsock: { ...saved.vsock, ...vsock } }),
    serial: serial ?? saved.serial,
    console: console ?? saved.console,
  };
  const checked = checkConfig(withAllVcpus(config), readHostFacts());
  if ('problem' in checked) {
    const { path, accepted } = checked.problem;
    throw new RequestError(`${path.map(String).join('.')}: accepted is ${accepted}`, 'invalid');
  }
  const { cpus } = checked.config;
  return { ...checked.config, cpus: { ...cpus, boot_vcpus: config.cpus.boot_vcpus } };
}
