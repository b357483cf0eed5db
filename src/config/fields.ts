/**
 * The fields that configurations are made of. zod's small form: its schemas have no methods of their own, and a process that makes a
 * hundred of them to check one configuration is done in a quarter of the time.
 */
import * as z from 'zod/mini';

/** What is accepted where no schema says it: a value of the type. */
const TYPES: Readonly<Record<string, string | undefined>> = {
  boolean: 'true or false',
  object: 'an object',
  array: 'a list',
  string: 'text',
};

z.config({
  localeError: (issue) => {
    if (issue.code === 'unrecognized_keys') return `only fields that exist, not ${issue.keys.join(', ')}`;
    return issue.code === 'invalid_type' ? TYPES[issue.expected] : undefined;
  },
  // To compile a function for each schema first would take longer than to check with it once.
  jitless: true,
});

type Schema = z.core.$ZodType;
/** The fields of a section, by name. */
export type Shape = Readonly<Record<string, Schema>>;

/** A schema of its own, with what the help says of it. */
function described<T extends Schema>(schema: T, help: string): T {
  z.globalRegistry.add(schema, { description: help });
  return schema;
}

/** What the help says of a field. */
export function helpOf(schema: Schema): string {
  return z.globalRegistry.get(schema)?.description ?? '';
}

/** A field that has to be there. */
export function required<T extends z.ZodMiniType>(help: string, schema: T): T {
  return described(schema.clone(), help);
}

export function optional<T extends Schema>(help: string, schema: T): z.ZodMiniOptional<T> {
  return described(z.optional(schema), help);
}

/** A field that has a value where none is given. */
export function defaulted<T extends Schema>(
  help: string,
  schema: T,
  value: z.core.util.NoUndefined<z.output<T>>,
): z.ZodMiniDefault<T> {
  return described(z._default(schema, value), help);
}

/** A section that is checked as this input where it is not given. */
export function section<T extends Schema>(help: string, schema: T, input: z.input<T>): z.ZodMiniPrefault<T> {
  return described(z.prefault(schema, input), help);
}

export const flag = z.boolean({ error: 'true or false' });

export function wholeNumber(min: number, max: number, what = 'a number'): z.ZodMiniNumberFormat {
  const error = `${what} from ${min} to ${max}`;
  return z.int({ error }).check(z.gte(min, { error }), z.lte(max, { error }));
}

/** Text of one form. @param more what else it has to be */
export function text(
  pattern: RegExp,
  error: string,
  more: (value: string) => boolean = () => true,
): z.ZodMiniString<string> {
  return z.string({ error }).check(z.regex(pattern, { error }), z.refine(more, { error }));
}

/** Names that start with __ are those of devices that nobody named. */
export const deviceName = text(
  /^(?!__)[\w.:-]{1,64}$/,
  'a name that does not start with __, up to 64 letters, digits, and - _ . :',
);

/** A NUL would end the string early in the kernel's eyes. */
export const filePath = text(/^[^\0]+$/, 'the path of a file');
