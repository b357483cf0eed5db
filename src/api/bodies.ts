/**
 * What clients write in a body, read as Cloud Hypervisor reads it: null is absent, and a field that nobody knows is ignored, and logged
 * once. A refusal names the field as the client wrote it.
 */
import type * as z from 'zod/mini';
import { isDeep, MAX_DEPTH } from '../config/deep-json.js';
import { RequestError } from '../vmm/machine/machine-error.js';

/** Names that are remembered, against a client that makes up new ones; later ones are not logged. */
const MAX_REMEMBERED = 256;

/** Which values of a field that no schema knows ask for nothing that is not there, by `fieldPattern`. */
export type Unbuilt = ReadonlyMap<string, (value: unknown) => boolean>;

type Path = readonly PropertyKey[];

/** A field as one would write it: `disks[0].path`. */
export function fieldName(path: Path): string {
  return path
    .map((part) => (typeof part === 'number' ? `[${part}]` : `.${String(part)}`))
    .join('')
    .replace(/^\./, '');
}

/** The same of every element of a list: `disks[].path`. */
const fieldPattern = (path: Path): string => fieldName(path).replace(/\[\d+\]/g, '[]');

/** @param text JSON @throws RequestError */
export function parseBody(text: string): unknown {
  if (isDeep(text)) throw refusal([], `a body of up to ${MAX_DEPTH} levels of objects and lists`);
  try {
    return JSON.parse(text);
  } catch {
    throw refusal([], 'a body in JSON');
  }
}

/** A copy without what is null. */
export function withoutNulls(value: unknown): unknown {
  if (typeof value !== 'object' || value === null) return value ?? undefined;
  if (Array.isArray(value)) return value.map(withoutNulls);
  const present = Object.entries(value).filter(([, item]) => item !== null);
  // Not by assignment: "__proto__" is a field like any other.
  return Object.fromEntries(present.map(([name, item]) => [name, withoutNulls(item)]));
}

export class BodyReader {
  readonly #ignored = new Set<string>();

  /** @param log told once of each field that is ignored */
  constructor(private readonly log: (line: string) => void) {}

  /** @throws RequestError */
  read<T>(schema: z.ZodMiniType<T>, body: unknown): T {
    const checked = schema.safeParse(this.known(schema, withoutNulls(body)));
    if (checked.success) return checked.data;
    const { path, message } = checked.error.issues[0];
    throw refusal(path, message);
  }

  /**
   * @param input a copy, of which fields are taken away
   * @param unbuilt fields that are known, and refused where they ask for something
   * @param place of the input among those
   * @returns it, with no field that the schema does not know
   * @throws RequestError
   */
  known(schema: z.ZodMiniType, input: unknown, unbuilt: Unbuilt = new Map(), place = ''): unknown {
    for (const issue of schema.safeParse(input).error?.issues ?? []) {
      if (issue.code !== 'unrecognized_keys') continue;
      const owner = issue.path.reduce<unknown>((at, part) => Reflect.get(at as object, part), input) as object;
      for (const key of issue.keys) {
        const path = [...issue.path, key];
        const asksForNothing = unbuilt.get(`${place}${fieldPattern(path)}`);
        if (asksForNothing === undefined) this.ignore(fieldPattern(path), 'there is no such field');
        else if (!asksForNothing(Reflect.get(owner, key)))
          throw refusal(path, 'null: what it asks for is not built yet');
        Reflect.deleteProperty(owner, key);
      }
    }
    return input;
  }

  /** Logs it, unless it has before. */
  ignore(name: string, reason: string): void {
    if (this.#ignored.has(name) || this.#ignored.size === MAX_REMEMBERED) return;
    this.#ignored.add(name);
    this.log(`API: ${shorten(name)} is ignored: ${reason}`);
  }
}

export function refusal(path: Path, accepted: string, kind: RequestError['kind'] = 'invalid'): RequestError {
  const field = path.length === 0 ? '' : `${fieldName(path)}: `;
  return new RequestError(`${field}accepted is ${accepted}`, kind);
}

const MAX_SHOWN = 160;

/** A client's own text, for a message. */
export function shorten(text: string): string {
  return text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}...` : text;
}
