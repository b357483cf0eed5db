/** The OpenAPI document (3.0.3, which generators of clients read), made from the table of routes and the schemas. */
import * as z from 'zod/mini';
import { type Route, STATUS } from './route.js';
import { WIRE } from './wire.js';

type Json = Record<string, unknown>;

const INT32_MAX = 2 ** 31 - 1;
const ERRORS = 'Errors';

const reference = (name: string) => ({ $ref: `#/components/schemas/${name}` });
const inJson = (name: string) => ({ content: { 'application/json': { schema: reference(name) } } });

const REFUSALS: Readonly<Record<keyof typeof STATUS, string>> = {
  invalid: 'A mistake in the request',
  unknown: 'Something that is not there',
  conflict: 'A name that is taken, or a device that there is one of',
  busy: 'What may be had later',
  failed: "It failed, or the machine's state does not allow it",
};

/** A schema as generators of clients take it. */
function adapt({ jsonSchema: json }: { readonly jsonSchema: Json }): void {
  // Fields that nobody knows are ignored.
  if (json['additionalProperties'] === false) delete json['additionalProperties'];
  if (json['type'] !== 'integer') return;
  // Without a format they take numbers of 32 bits; and what is exact in a double is no bound of ours.
  if (json['minimum'] === Number.MIN_SAFE_INTEGER) delete json['minimum'];
  const { maximum } = json;
  if (maximum === Number.MAX_SAFE_INTEGER) delete json['maximum'];
  if (typeof maximum !== 'number' || maximum > INT32_MAX) json['format'] = 'int64';
}

function schemas(): Json {
  const names = z.registry<{ id: string }>();
  for (const [id, schema] of Object.entries(WIRE)) names.add(schema, { id });
  const { schemas: made } = z.toJSONSchema(names, {
    target: 'openapi-3.0',
    io: 'input',
    uri: (id) => `#/components/schemas/${id}`,
    override: adapt,
  });
  // Their names are where they stand.
  for (const schema of Object.values(made as Record<string, Json>)) delete schema['$id'];
  const errors = { type: 'array', items: { type: 'string' }, description: 'From the outermost to the cause' };
  return { ...made, [ERRORS]: errors };
}

/** `vm.add-disk` as `vmAddDisk`. */
const operationId = (name: string) => name.replace(/[.-](.)/g, (_, letter: string) => letter.toUpperCase());

function operation(name: string, route: Route): Json {
  const { summary, body, answer, quiet, refuses } = route;
  const refusals = (['invalid', ...refuses, 'failed'] as const).map((kind) => [
    STATUS[kind],
    { description: REFUSALS[kind], ...inJson(ERRORS) },
  ]);
  return {
    operationId: operationId(name),
    summary,
    ...(body === undefined ? {} : { requestBody: { required: true, ...inJson(body) } }),
    responses: {
      ...(answer === undefined ? {} : { 200: { description: 'Done', ...inJson(answer) } }),
      ...(quiet === undefined ? {} : { 204: { description: quiet } }),
      ...Object.fromEntries(refusals),
    },
  };
}

/** @param version of the product */
export function openApiDocument(routes: ReadonlyMap<string, Route>, version: string): Json {
  return {
    openapi: '3.0.3',
    info: {
      title: 'vmm',
      description: 'HTTP/1.1 on a Unix socket. Null counts as absent, and a field that nobody knows is ignored.',
      license: { name: 'Apache-2.0', url: 'https://www.apache.org/licenses/LICENSE-2.0' },
      version,
    },
    servers: [{ url: 'http://localhost/api/v1' }],
    paths: Object.fromEntries(
      [...routes].map(([name, route]) => [`/${name}`, { [route.method.toLowerCase()]: operation(name, route) }]),
    ),
    components: { schemas: schemas() },
  };
}
