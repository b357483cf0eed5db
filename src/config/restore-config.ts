/** What a machine is restored from, and what of it is another here: Cloud Hypervisor's RestoreConfig, and more. */
import { fileURLToPath } from 'node:url';
import * as z from 'zod/mini';
import { defaulted, filePath, flag, optional, required } from './fields.js';
import { characterSchema, macAddress, vsockSchema } from './device-config.js';

/** How memory comes back. */
export const RESTORE_MODES = ['Copy', 'Map', 'OnDemand'] as const;
const MODES_ACCEPTED = 'Copy, Map or OnDemand';

const urlError = 'the URL of a folder, such as file:///tmp/snapshot';
const folderUrl = z
  .string({ error: urlError })
  .check(z.refine((url) => folderPath(url) !== undefined, { error: urlError }));

/** @param url a `file:` URL of a folder @returns its absolute path */
export function folderPath(url: string): string | undefined {
  try {
    const path = fileURLToPath(url).replace(/(?<=.)\/+$/, '');
    return path.includes('\0') || path === '/' ? undefined : path;
  } catch {
    // It is none, or names a host.
    return undefined;
  }
}

export const snapshotSchema = z.strictObject(
  {
    destination_url: required('Folder that is not there yet, or empty', folderUrl),
    // Ours: the reference has clients pause and resume.
    resume: defaulted('Pause a machine that runs, and let it go on', flag, false),
  },
  { error: '{"destination_url": "file:///FOLDER", "resume": true or false}' },
);

const idError = 'the name of a device of the snapshot';
const id = z.string({ error: idError });
const fd = z.int({ error: 'a descriptor' }).check(z.gte(0, { error: 'a descriptor' }));

/** What of a machine is another where it goes on. */
const otherShape = {
  net: optional(
    'Other taps and addresses',
    z.array(z.strictObject({ id, tap: z.optional(z.string()), mac: z.optional(macAddress) })),
  ),
  disks: optional('Other images', z.array(z.strictObject({ id, path: filePath }))),
  vsock: optional(
    'Another socket, or another number of the guest',
    z.partial(z.pick(vsockSchema, { socket: true, cid: true })),
  ),
  serial: optional('Another place for the serial port', characterSchema),
  console: optional('Another place for the console', characterSchema),
};

/** The same, with what comes with a request. */
export const anewShape = {
  net_fds: optional(
    'Descriptors of taps, for networks that had such',
    z.array(z.strictObject({ id, fds: z.optional(z.array(fd)), num_fds: z.optional(fd) })),
  ),
  ...otherShape,
};

const MAX_CLONES = 256;

export const restoreSchema = z
  .strictObject(
    {
      source_url: required('Folder of the snapshot', folderUrl),
      memory_restore_mode: defaulted(
        'Copy: all of it is read; Map: the files are mapped, and stay as they are; OnDemand: it is read as it is touched',
        z.enum(RESTORE_MODES, { error: MODES_ACCEPTED }),
        'Copy',
      ),
      prefault: defaulted('Have pages everywhere before the machine runs', flag, false),
      resume: defaulted('Let it run at once', flag, false),
      ...anewShape,
    },
    { error: '{"source_url": "file:///FOLDER", ...}' },
  )
  .check(({ value, issues }) => {
    if (!value.prefault || value.memory_restore_mode === 'Copy') return;
    issues.push({ code: 'custom', input: value, path: ['prefault'], message: 'it only with memory_restore_mode Copy' });
  });

export const forkSchema = z.strictObject(
  {
    clones: required(
      'Machines to make of this one',
      z
        .array(
          z.strictObject(
            {
              api_socket: required('Socket of the vmm that is to have it', filePath),
              // Descriptors of a request are this process's.
              ...otherShape,
              resume: defaulted('Let it run at once', flag, true),
            },
            { error: '{"api_socket": "/PATH", ...}' },
          ),
        )
        .check(z.minLength(1, { error: 'one clone at the least' }), z.maxLength(MAX_CLONES)),
    ),
  },
  { error: '{"clones": [{"api_socket": "/PATH", ...}]}' },
);

export type ForkConfig = z.infer<typeof forkSchema>;

export type RestoreConfig = z.infer<typeof restoreSchema>;
