/** Where machines are sent, and how. */
import { expect, test } from '@jest/globals';
import { migrationAddress, receiveMigrationSchema, sendMigrationSchema } from '../../../src/config/migration-config.js';

test.each([
  ['unix:/run/a', { path: '/run/a' }],
  ['unix:///run/a', { path: '/run/a' }],
  [`unix:/${'a'.repeat(106)}`, { path: `/${'a'.repeat(106)}` }],
  [`unix:/${'a'.repeat(107)}`, undefined],
  [`unix:/${'ä'.repeat(54)}`, undefined],
  ['unix:a', undefined],
  ['unix:', undefined],
  ['unix:/a\0b', undefined],
  ['tcp:host:5', { host: 'host', port: 5 }],
  ['tcp:192.0.2.1:65535', { host: '192.0.2.1', port: 65_535 }],
  ['tcp::5', { host: '127.0.0.1', port: 5 }],
  ['tcp:[::1]:5', { host: '::1', port: 5 }],
  ['tcp:[host]:5', undefined],
  ['tcp:::1:5', undefined],
  ['tcp:host:0', undefined],
  ['tcp:host:65536', undefined],
  ['tcp:host', undefined],
  ['tcp:host:5x', undefined],
  ['http://host:5', undefined],
  ['/run/a', undefined],
  ['', undefined],
])('%j', (url, address) => {
  expect(migrationAddress(url)).toEqual(address);
});

const URL = 'tcp:host:5';
const issue = (schema: typeof sendMigrationSchema | typeof receiveMigrationSchema, input: unknown) => {
  const { error } = schema.safeParse(input);
  return error === undefined ? undefined : `${error.issues[0].path.join('.')}: ${error.issues[0].message}`;
};

test('what is left out', () => {
  expect(sendMigrationSchema.parse({ destination_url: URL })).toEqual({
    ...{ destination_url: URL, downtime_ms: 300, timeout_s: 3600, timeout_strategy: 'Cancel', connections: 1 },
    ...{ local: false, verify: false, auto_converge: true },
  });
  expect(receiveMigrationSchema.parse({ receiver_url: URL })).toEqual({ receiver_url: URL });
});

test.each([
  [{ downtime_ms: 1, timeout_s: 86_400, timeout_strategy: 'Ignore', connections: 128, tls_dir: '/tls' }, undefined],
  [{ downtime_ms: 0 }, /^downtime_ms: /],
  [{ downtime_ms: 86_400_001 }, /^downtime_ms: /],
  [{ timeout_s: 0 }, /^timeout_s: /],
  [{ timeout_s: 1.5 }, /^timeout_s: /],
  [{ timeout_strategy: 'cancel' }, /^timeout_strategy: .*Cancel or Ignore/],
  [{ connections: 0 }, /^connections: /],
  [{ connections: 129 }, /^connections: /],
  [{ verify: 1 }, /^verify: /],
  [{ destination_url: 'unix:/a', local: true }, undefined],
  [{ local: true }, /^destination_url: unix:PATH with local$/],
  [{ destination_url: 'unix:/a', local: true, connections: 2 }, /^connections: 1 with local$/],
  [{ destination_url: 'unix:/a', tls_dir: '/tls' }, /^tls_dir: it with tcp:HOST:PORT$/],
  [{ destination_url: 'a' }, /^destination_url: unix:PATH or tcp:HOST:PORT$/],
  [{ more: 1 }, /more|destination_url/],
])('sent with %j', (more, line) => {
  const said = issue(sendMigrationSchema, { destination_url: URL, ...more });
  if (line === undefined) expect(said).toBeUndefined();
  else expect(said).toMatch(line);
  expect(said ?? '').not.toMatch(/\n/);
});

test.each([
  [{ tls_dir: '/tls', net: [{ id: 'net' }] }, undefined],
  [{ receiver_url: 'unix:/a', tls_dir: '/tls' }, /^tls_dir: it with tcp:HOST:PORT$/],
  [{ receiver_url: undefined }, /^receiver_url: /],
  [{ destination_url: URL }, /destination_url|receiver_url/],
])('received with %j', (more, line) => {
  const said = issue(receiveMigrationSchema, { receiver_url: URL, ...more });
  if (line === undefined) expect(said).toBeUndefined();
  else expect(said).toMatch(line);
});
