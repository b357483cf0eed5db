/** The bodies of requests that are no part of a configuration. */
import { fileURLToPath } from 'node:url';
import * as z from 'zod/mini';
import { refusal } from './bodies.js';
import { optional, required } from '../config/fields.js';

const SECTOR = 512;

const vcpusError = 'a number from 1 on';
const bytesError = 'a number of bytes';
const bytes = z.int({ error: bytesError }).check(z.gte(0, { error: bytesError }));

export const resizeSchema = z.strictObject(
  {
    desired_vcpus: optional(
      'vCPUs that the guest is to have',
      z.int({ error: 'a number of vCPUs' }).check(z.gte(1, { error: vcpusError })),
    ),
    desired_ram: optional('Memory that the guest is to have, in bytes', bytes),
    desired_balloon: optional('Memory that the balloon is to hold, in bytes', bytes),
  },
  { error: '{"desired_vcpus": N, "desired_ram": BYTES, "desired_balloon": BYTES}, of which any may be left out' },
);

export const resizeZoneSchema = z.strictObject(
  {
    id: required('Name of the memory zone', z.string({ error: 'the name of a memory zone' })),
    desired_ram: required('Memory that it is to have, in bytes', bytes),
  },
  { error: '{"id": ZONE, "desired_ram": BYTES}' },
);

const sizeError = `a multiple of ${SECTOR} bytes`;
export const resizeDiskSchema = z.strictObject(
  {
    id: required('Name of the disk', z.string({ error: 'the name of a disk' })),
    desired_size: required(
      'Size of its image, in bytes',
      z
        .int({ error: sizeError })
        .check(z.gte(SECTOR, { error: sizeError }), z.multipleOf(SECTOR, { error: sizeError })),
    ),
    // Ours: the reference never makes a disk smaller.
    shrink: optional('What is behind a smaller size may be lost', z.boolean()),
  },
  { error: '{"id": DISK, "desired_size": BYTES, "shrink": true or false}' },
);

export const removeDeviceSchema = z.strictObject(
  { id: required('Name of the device', z.string({ error: 'the name of a device' })) },
  { error: '{"id": DEVICE}' },
);

const urlError = 'the URL of a file that is not there yet, such as file:///tmp/core';
export const coredumpSchema = z.strictObject(
  { destination_url: z.string({ error: urlError }) },
  { error: '{"destination_url": "file:///PATH"}' },
);

/** @returns an absolute path @throws RequestError */
export function coreFile({ destination_url: url }: z.infer<typeof coredumpSchema>): string {
  try {
    const path = fileURLToPath(url);
    if (!path.includes('\0') && !path.endsWith('/')) return path;
  } catch {
    // It is none, or names a host.
  }
  throw refusal(['destination_url'], urlError);
}
