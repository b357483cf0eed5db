/** The calls of the API, under /api/v1/: what each takes, and which method of the process's object it is. */
import * as z from 'zod/mini';
import type { Logger } from '../vmm/log/logger.js';
import type { Vmm } from '../vmm/machine/vmm.js';
import { BodyReader, refusal } from './bodies.js';
import { readDevice, readVmConfig, writeVmConfig } from './vm-config.js';

const SECTOR = 512;

/** What the API uses of the process's object. */
export type ApiVmm = Pick<Vmm, keyof Vmm>;

export interface Route {
  readonly method: 'GET' | 'PUT';
  /** @returns the answer's body; undefined: none @throws RequestError, or what failed */
  call(body: unknown): unknown;
}

const bytes = (error: string) => z.optional(z.int({ error }).check(z.gte(0, { error })));

const resizeSchema = z.strictObject(
  {
    desired_vcpus: z.optional(z.int({ error: 'a number of vCPUs' }).check(z.gte(1, { error: 'a number from 1 on' }))),
    desired_ram: bytes('a number of bytes'),
    desired_balloon: bytes('a number of bytes'),
  },
  { error: '{"desired_vcpus": N, "desired_ram": BYTES, "desired_balloon": BYTES}, of which any may be left out' },
);

const sizeError = `a multiple of ${SECTOR} bytes`;
const resizeDiskSchema = z.strictObject(
  {
    id: z.string({ error: 'the name of a disk' }),
    desired_size: z
      .int({ error: sizeError })
      .check(z.gte(SECTOR, { error: sizeError }), z.multipleOf(SECTOR, { error: sizeError })),
    /** Ours: the reference never makes a disk smaller. */
    shrink: z.optional(z.boolean()),
  },
  { error: '{"id": DISK, "desired_size": BYTES, "shrink": true or false}' },
);

const removeDeviceSchema = z.strictObject(
  { id: z.string({ error: 'the name of a device' }) },
  { error: '{"id": DEVICE}' },
);

/** @param version of the product */
export function routes(vmm: ApiVmm, version: string, logger: Logger): ReadonlyMap<string, Route> {
  const reader = new BodyReader((line) => logger.warn(line));
  const get = (call: () => unknown): Route => ({ method: 'GET', call });
  const tell = (call: (body: unknown) => unknown): Route => ({ method: 'PUT', call });
  const put = (call: () => unknown): Route =>
    tell((body) => {
      if (body !== undefined) throw refusal([], 'no body');
      return call();
    });
  const add = (kind: Parameters<typeof readDevice>[1]): [string, Route] => [
    `vm.add-${kind}`,
    tell((body) => vmm.addDevice(kind, readDevice(reader, kind, body))),
  ];
  return new Map([
    ['vmm.ping', get(() => ({ build_version: `v${version}`, version, pid: process.pid, features: [] }))],
    ['vmm.shutdown', put(() => vmm.shutdownVmm('vmm.shutdown'))],
    ['vm.create', tell((body) => vmm.create(readVmConfig(reader, body)))],
    ['vm.delete', put(() => vmm.delete())],
    ['vm.boot', put(() => vmm.boot())],
    ['vm.shutdown', put(() => vmm.shutdown())],
    ['vm.reboot', put(() => vmm.reboot())],
    ['vm.pause', put(() => vmm.pause())],
    ['vm.resume', put(() => vmm.resume())],
    ['vm.power-button', put(() => vmm.powerButton())],
    [
      'vm.info',
      get(() => {
        const info = vmm.info();
        return { ...info, config: writeVmConfig(info.config) };
      }),
    ],
    ...(['disk', 'net', 'pmem', 'vsock'] as const).map(add),
    ['vm.remove-device', tell((body) => vmm.removeDevice(reader.read(removeDeviceSchema, body).id))],
    ['vm.counters', get(() => vmm.counters())],
    ['vm.resize', tell((body) => vmm.resize(reader.read(resizeSchema, body)))],
    [
      'vm.resize-disk',
      tell((body) => {
        const { id, desired_size: size, shrink } = reader.read(resizeDiskSchema, body);
        return vmm.resizeDisk(id, size, shrink ?? false);
      }),
    ],
  ]);
}
