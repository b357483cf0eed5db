/** What the build makes of the API's schemas: the OpenAPI document, and the types of the TypeScript API written out. */
import packageJson from '../package.json' with { type: 'json' };
import { openApiDocument } from '../src/api/openapi.js';
import { type ApiVmm, routes } from '../src/api/routes.js';

/** Of OpenAPI 3.0, as far as the document uses it. */
interface Schema {
  readonly $ref?: string;
  readonly allOf?: readonly Schema[];
  readonly type?: string;
  readonly enum?: readonly unknown[];
  readonly anyOf?: readonly Schema[];
  readonly items?: Schema;
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly additionalProperties?: Schema;
  readonly required?: readonly string[];
  readonly description?: string;
  readonly default?: unknown;
}

const quiet = () => undefined;
const logger = { error: quiet, warn: quiet, info: quiet, debug: quiet };
/** Nobody calls what the table describes. */
const document = openApiDocument(routes({} as ApiVmm, packageJson.version, logger), packageJson.version);

export const documentText = `${JSON.stringify(document, null, 2)}\n`;

function comment({ description, default: value }: Schema, indent: string): string {
  const standard = value === undefined ? undefined : `Default: ${JSON.stringify(value)}.`;
  const text = [description === undefined ? undefined : `${description}.`, standard].filter(Boolean).join(' ');
  return text === '' ? '' : `${indent}/** ${text} */\n`;
}

function fields({ properties = {}, required = [] }: Schema, indent: string): string {
  const lines = Object.entries(properties).map(([name, field]) => {
    const type = typeText(field, `${indent}  `);
    const declared = required.includes(name) ? `${name}: ${type}` : `${name}?: ${type} | undefined`;
    return `${comment(field, `${indent}  `)}${indent}  ${declared};\n`;
  });
  return `{\n${lines.join('')}${indent}}`;
}

function typeText(schema: Schema, indent = ''): string {
  const { $ref, allOf, anyOf, type, enum: values, items, properties, additionalProperties } = schema;
  if ($ref !== undefined) return $ref.replace(/^.*\//, '');
  if (allOf !== undefined) return allOf.map((part) => typeText(part, indent)).join(' & ');
  if (anyOf !== undefined) return anyOf.map((part) => typeText(part, indent)).join(' | ');
  if (values !== undefined) return values.map((value) => JSON.stringify(value).replaceAll('"', "'")).join(' | ');
  if (type === 'integer') return 'number';
  if (items !== undefined) return `Array<${typeText(items, indent)}>`;
  if (properties !== undefined) return fields(schema, indent);
  if (additionalProperties !== undefined) return `Record<string, ${typeText(additionalProperties, indent)}>`;
  return type ?? 'unknown';
}

function declaration([name, schema]: readonly [string, Schema]): string {
  const isObject = schema.properties !== undefined;
  return isObject ? `export interface ${name} ${fields(schema, '')}\n` : `export type ${name} = ${typeText(schema)};\n`;
}

const { schemas } = document['components'] as { readonly schemas: Readonly<Record<string, Schema>> };

/** In place of src/sdk/types.ts. */
export const typesText = Object.entries(schemas).map(declaration).join('\n');
