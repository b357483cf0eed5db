/** Answers of the API held against its OpenAPI document. */
import { inspect } from 'node:util';
import Ajv from 'ajv';
import packageJson from '../../package.json' with { type: 'json' };
import { openApiDocument } from '../../src/api/openapi.js';
import { routes } from '../../src/api/routes.js';
import { fakeVmm } from './fake-vmm.js';

interface Response {
  readonly description: string;
  readonly content?: { readonly 'application/json': { readonly schema: object } };
}

export interface Operation {
  readonly operationId: string;
  readonly requestBody?: { readonly content: { readonly 'application/json': { readonly schema: object } } };
  readonly responses: Readonly<Record<string, Response | undefined>>;
}

interface Document {
  readonly openapi: string;
  readonly info: { readonly title: string; readonly version: string };
  readonly paths: Readonly<Record<string, Readonly<Record<string, Operation | undefined>> | undefined>>;
  readonly components: { readonly schemas: Readonly<Record<string, object>> };
}

const quiet = () => undefined;
const logger = { error: quiet, warn: quiet, info: quiet, debug: quiet };

/** As the API serves it. */
export const DOCUMENT = openApiDocument(
  routes(fakeVmm(quiet), packageJson.version, logger),
  packageJson.version,
) as unknown as Document;

/** A copy whose objects have no field that it does not name: what the document leaves open to later versions, these have not. */
function closed(value: unknown): unknown {
  if (typeof value !== 'object' || value === null) return value;
  if (Array.isArray(value)) return value.map(closed);
  const copy = Object.fromEntries(Object.entries(value).map(([name, item]) => [name, closed(item)]));
  return 'properties' in copy && copy['type'] === 'object' ? { additionalProperties: false, ...copy } : copy;
}

/** OpenAPI 3.0's schemas are JSON Schema's of an early draft; what it adds are formats. */
const validator = new Ajv({ schemaId: 'auto', unknownFormats: ['int64'], allErrors: true });
validator.addSchema(closed(DOCUMENT) as object, 'document');

/** Why a value is not what a schema of the document says. */
function problemOf(schema: object, value: unknown): string | undefined {
  const { $ref } = schema as { readonly $ref: string };
  return validator.validate(`document${$ref}`, value) === true ? undefined : validator.errorsText();
}

/** @param name of the call: `vm.info` @throws Error when the document does not have this answer */
export function checkAnswer(method: string, name: string, { status, body }: { status: number; body: unknown }): void {
  const operation = DOCUMENT.paths[`/${name}`]?.[method.toLowerCase()];
  const errors = { $ref: '#/components/schemas/Errors' };
  const said = `${method} ${name}: ${status} ${inspect(body, { depth: 8 }).slice(0, 2000)}`;
  // What is no call of the API is refused all the same.
  const response =
    operation === undefined && [400, 404].includes(status)
      ? { content: { 'application/json': { schema: errors } } }
      : operation?.responses[status];
  if (response === undefined) throw new Error(`The document has no such answer: ${said}`);
  const schema = response.content?.['application/json'].schema;
  const problem =
    schema === undefined ? (body === undefined ? undefined : 'should have no body') : problemOf(schema, body);
  if (problem !== undefined) throw new Error(`Not what the document says, ${problem}: ${said}`);
}

/** @throws Error when the call takes no such body */
export function checkBody(name: string, body: unknown): void {
  const { schema } = DOCUMENT.paths[`/${name}`]!['put']!.requestBody!.content['application/json'];
  const problem = problemOf(schema, body);
  if (problem !== undefined) throw new Error(`Not what the document says, ${problem}: ${JSON.stringify(body)}`);
}
