/** Where a machine is sent, and how; where one is received: Cloud Hypervisor's SendMigrationData and ReceiveMigrationData, and more. */
import net from 'node:net';
import * as z from 'zod/mini';
import { defaulted, filePath, flag, optional, required, wholeNumber } from './fields.js';
import { anewShape } from './restore-config.js';

export type MigrationAddress = { readonly path: string } | { readonly host: string; readonly port: number };

/** Who listens without saying where is not to be reached from outside. */
const LOOPBACK = '127.0.0.1';
const MAX_PORT = 65_535;
/** Of a Unix socket (unix(7)). Bytes. */
const MAX_PATH = 107;
const ADDRESS_ACCEPTED = 'unix:PATH or tcp:HOST:PORT';

/** @returns undefined: it is none */
export function migrationAddress(url: string): MigrationAddress | undefined {
  const unix = /^unix:(?:\/\/)?(\/[^\0]*)$/.exec(url)?.[1];
  if (unix !== undefined) return Buffer.byteLength(unix) <= MAX_PATH ? { path: unix } : undefined;
  const [, bracketed, plain, digits] = (/^tcp:(?:\[([^\]]+)\]|([^:/[\]]*)):(\d{1,5})$/.exec(url) ?? []) as (
    string | undefined
  )[];
  const host = bracketed ?? plain;
  const port = Number(digits);
  if (host === undefined || !(port >= 1 && port <= MAX_PORT)) return undefined;
  if (bracketed !== undefined && !net.isIPv6(bracketed)) return undefined;
  return { host: host === '' ? LOOPBACK : host, port };
}

const url = z
  .string({ error: ADDRESS_ACCEPTED })
  .check(z.refine((text) => migrationAddress(text) !== undefined, { error: ADDRESS_ACCEPTED }));

const tlsFolder = optional('Folder with certificates and keys, which each side shows the other', filePath);

function checkTls({ value, issues }: z.core.ParsePayload<{ address: string; tls_dir?: string | undefined }>): void {
  if (value.tls_dir === undefined || value.address.startsWith('tcp:')) return;
  issues.push({ code: 'custom', input: value, path: ['tls_dir'], message: 'it with tcp:HOST:PORT' });
}

export const TIMEOUT_STRATEGIES = ['Cancel', 'Ignore'] as const;
export const MAX_CONNECTIONS = 128;
const SECONDS_A_DAY = 86_400;

export const sendMigrationSchema = z
  .strictObject(
    {
      destination_url: required('Where it is received', url),
      downtime_ms: defaulted('How long it may stand still, milliseconds', wholeNumber(1, SECONDS_A_DAY * 1000), 300),
      timeout_s: defaulted('How long all of it may take, seconds', wholeNumber(1, SECONDS_A_DAY), 3600),
      timeout_strategy: defaulted(
        'Then: Cancel: it goes on where it is; Ignore: it stands still for longer',
        z.enum(TIMEOUT_STRATEGIES, { error: 'Cancel or Ignore' }),
        'Cancel',
      ),
      connections: defaulted('Memory is sent over so many', wholeNumber(1, MAX_CONNECTIONS), 1),
      tls_dir: tlsFolder,
      local: defaulted('The other side is on this host: it gets the memory itself, which is shared', flag, false),
      // Ours.
      verify: defaulted('Compare all memory before it goes on there, which takes time', flag, false),
      auto_converge: defaulted('Hold vCPUs back that write faster than memory is sent', flag, true),
    },
    { error: '{"destination_url": "unix:PATH", ...}' },
  )
  .check(({ value, issues }) => {
    checkTls({ value: { address: value.destination_url, tls_dir: value.tls_dir }, issues });
    if (!value.local) return;
    const refuse = (path: string, message: string) =>
      issues.push({ code: 'custom', input: value, path: [path], message });
    if (!value.destination_url.startsWith('unix:')) refuse('destination_url', 'unix:PATH with local');
    if (value.connections > 1) refuse('connections', '1 with local');
  });

export type SendMigrationConfig = z.infer<typeof sendMigrationSchema>;

export const receiveMigrationSchema = z
  .strictObject(
    {
      receiver_url: required('Where it is sent to', url),
      tls_dir: tlsFolder,
      ...anewShape,
    },
    { error: '{"receiver_url": "unix:PATH", ...}' },
  )
  .check(({ value, issues }) => {
    checkTls({ value: { address: value.receiver_url, tls_dir: value.tls_dir }, issues });
  });

export type ReceiveMigrationConfig = z.infer<typeof receiveMigrationSchema>;
