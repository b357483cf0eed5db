/** The OpenAPI document: that it is one, and that it says what the API does. */
import { describe, expect, test } from '@jest/globals';
import { writeVmConfig } from '../../../src/api/vm-config.js';
import { routes } from '../../../src/api/routes.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { checkAnswer, checkBody, DOCUMENT, type Operation } from '../../support/api-document.js';
import { fakeVmm } from '../../support/fake-vmm.js';

const quiet = () => undefined;
const logger = { error: quiet, warn: quiet, info: quiet, debug: quiet };

const operations = Object.entries(DOCUMENT.paths).flatMap(([path, methods]) =>
  Object.entries(methods!).map(([method, operation]) => ({ path, method, operation: operation! })),
);

describe('it is an OpenAPI document', () => {
  test('of the version that generators of clients read', () => {
    expect(DOCUMENT.openapi).toBe('3.0.3');
    expect(DOCUMENT.info).toMatchObject({ title: 'vmm', version: expect.stringMatching(/^\d+\.\d+\.\d+$/) });
    expect(Object.keys(DOCUMENT)).toEqual(['openapi', 'info', 'servers', 'paths', 'components']);
  });

  test('whose references lead somewhere, and whose components are all used', () => {
    const found = [...JSON.stringify(DOCUMENT).matchAll(/"\$ref":"([^"]*)"/g)].map(([, to]) => to);
    const names = Object.keys(DOCUMENT.components.schemas).map((name) => `#/components/schemas/${name}`);
    expect([...new Set(found)].sort()).toEqual(names.sort());
  });

  /** Of the specification's Schema Object, 4.7.24, what is used here. */
  const KEYWORDS = new Set([
    ...['type', 'format', 'description', 'default', 'enum', 'allOf', '$ref', 'properties', 'additionalProperties'],
    ...['required', 'items', 'minItems', 'maxItems', 'minimum', 'maximum', 'multipleOf', 'pattern'],
  ]);

  function checkSchema(schema: Record<string, unknown>): void {
    for (const keyword of Object.keys(schema)) expect(KEYWORDS).toContain(keyword);
    // "This object cannot be extended with additional properties": 4.7.23.1.
    if ('$ref' in schema) expect(Object.keys(schema)).toEqual(['$ref']);
    if (schema['type'] === 'array') expect(schema).toHaveProperty('items');
    // A number of bytes is more than the 32 bits that clients read without a format.
    if (schema['type'] === 'integer') expect(Number(schema['maximum'] ?? 0) < 2 ** 31 || 'format' in schema).toBe(true);
    const { properties, allOf, items, additionalProperties } = schema as Record<string, object | undefined>;
    const named = { ...properties, ...allOf } as Record<string, object>;
    for (const part of [...Object.values(named), items, additionalProperties])
      if (part !== undefined) checkSchema(part as Record<string, unknown>);
  }

  test.each(Object.entries(DOCUMENT.components.schemas))('whose schemas are those of OpenAPI: %s', (_, schema) => {
    checkSchema(schema as Record<string, unknown>);
  });

  test('whose operations have names and answers of their own', () => {
    expect(new Set(operations.map(({ operation }) => operation.operationId)).size).toBe(operations.length);
    expect(operations.find(({ path }) => path === '/vm.add-disk')?.operation.operationId).toBe('vmAddDisk');
    for (const { operation } of operations) {
      const { summary, responses } = operation as Operation & { summary: string };
      expect(summary).toMatch(/^[A-Z][^]*[^.]$/);
      expect('200' in responses || '204' in responses).toBe(true);
      for (const response of Object.values(responses)) expect(response!.description).not.toBe('');
      for (const status of ['400', '500']) expect(responses).toHaveProperty(status);
    }
  });
});

test('it has the calls of the API', () => {
  const served = [...routes(fakeVmm(quiet), '1', logger)].map(([name, { method }]) => `${method} /${name}`);
  expect(operations.map(({ path, method }) => `${method.toUpperCase()} ${path}`)).toEqual(served);
});

/** With every section and field that a machine may have. */
const FULL = vmConfigSchema.parse({
  payload: { kernel: '/k', initramfs: '/i', cmdline: 'quiet' },
  cpus: {
    ...{ boot_vcpus: 2, max_vcpus: 4, affinity: [{ vcpu: 0, host_cpus: [0] }] },
    topology: { threads_per_core: 1, cores_per_die: 4, dies_per_package: 1, packages: 1 },
  },
  memory: { size: 2 ** 33, hotplug_method: 'VirtioMem', hotplug_size: 2 ** 33, hotplugged_size: 2 ** 21 },
  disks: [
    { path: '/d', image_type: 'qcow2', queue_affinity: [{ queue_index: 0, host_cpus: [1] }] },
    { path: '/e', rate_limiter_config: { bandwidth: { size: 2 ** 40, refill_time: 100 } } },
    { path: '/f', rate_limit_group: 'g' },
  ],
  rate_limit_groups: [{ id: 'g', rate_limiter_config: { ops: { size: 10, refill_time: 100 } } }],
  net: [{ mac: '12:34:56:78:9A:bc', ip: '192.168.249.1', mask: '255.255.255.0' }, { fds: [3] }],
  balloon: {},
  pmem: [{ file: '/p' }],
  vsock: { cid: 3, socket: '/s' },
  device_modules: [{ path: '/m', config: 'text' }],
  serial: { mode: 'Socket', socket: '/t' },
});

test('what vm.info tells of every device is what it says', () => {
  const info = { config: writeVmConfig(FULL), state: 'Created', memory_actual_size: 2 ** 33 };
  const written = JSON.parse(JSON.stringify(info)) as { config: object };
  checkAnswer('GET', 'vm.info', { status: 200, body: written });
  // And what is read.
  checkBody('vm.create', written.config);
});

test.each([
  ['GET', 'vm.info', 204, undefined, 'no such answer'],
  ['GET', 'vm.info', 418, ['x'], 'no such answer'],
  ['GET', 'vm.nothing', 200, {}, 'no such answer'],
  ['GET', 'vm.info', 200, { state: 'Running' }, 'config'],
  ['GET', 'vmm.ping', 200, { build_version: 'v', version: 'v', pid: 'p', features: [] }, 'pid should be integer'],
  [
    'GET',
    'vmm.ping',
    200,
    { build_version: 'v', version: 'v', pid: 1, features: [], more: 1 },
    'additional properties',
  ],
  ['PUT', 'vm.boot', 204, {}, 'should have no body'],
  ['PUT', 'vm.boot', 500, 'text', 'should be array'],
  ['PUT', 'vm.boot', 429, [], 'no such answer'],
])('an answer that it has not is seen: %s %s %s (%#)', (method, name, status, body, problem) => {
  expect(() => checkAnswer(method, name, { status, body })).toThrow(problem);
});
