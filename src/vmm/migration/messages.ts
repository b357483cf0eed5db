/** What the two sides of a migration say to each other in words: JSON from another process, which is checked before it is used. */
import * as z from 'zod/mini';
import { MAX_CONNECTIONS } from '../../config/migration-config.js';
import { Frame, type Connection, PAGE_SIZE } from './frames.js';
import { MigrationError } from './migration-error.js';

/** Raised whenever a side that knows the one before would not understand it. */
export const PROTOCOL = 1;

const count = z.int().check(z.gte(0), z.lte(2 ** 32));

const helloSchema = z.object({
  /** Of this program, and the oldest that it understands. */
  protocol: count,
  oldest: count,
  page_size: z.literal(PAGE_SIZE),
  /** How many connections memory is to be sent over; the destination says it again. */
  connections: z.int().check(z.gte(1), z.lte(MAX_CONNECTIONS)),
  /** The destination's, by which further connections of the same migration are known. */
  token: z.optional(z.string().check(z.regex(/^[0-9a-f]{32}$/))),
});
export type Hello = z.infer<typeof helloSchema>;

/** Milliseconds, as nanoseconds in 64 bits: more than a century. */
const LONGEST = 2 ** 42;

const goSchema = z.object({
  /** Whether it ran; else it stays paused. */
  resume: z.boolean(),
  /** When it stood still: milliseconds since 1970 by its host's clock. */
  paused_at: z.int(),
  /** For how long, milliseconds by the monotonic clock. */
  paused_for: z.number().check(z.gte(0), z.lte(LONGEST)),
});
export type Go = z.infer<typeof goSchema>;

export function sayHello(connection: Connection, connections: number, token?: string): Promise<void> {
  const hello: Hello = { protocol: PROTOCOL, oldest: PROTOCOL, page_size: PAGE_SIZE, connections, token };
  return connection.sendJson(Frame.hello, hello);
}

/** @throws MigrationError also where the two do not understand each other */
export function readHello(body: Buffer): Hello {
  const hello = check(helloSchema, body, 'hello');
  if (hello.oldest > PROTOCOL || hello.protocol < PROTOCOL) {
    throw new MigrationError(
      `The other side speaks forms ${hello.oldest} to ${hello.protocol} of the protocol; accepted is ${PROTOCOL}`,
    );
  }
  return hello;
}

export const readGo = (body: Buffer): Go => check(goSchema, body, 'go');

function check<T>(schema: z.ZodMiniType<T>, body: Buffer, what: string): T {
  let input: unknown;
  try {
    input = JSON.parse(body.toString('utf8'));
  } catch {
    throw new MigrationError(`${what}: accepted is JSON`);
  }
  const checked = schema.safeParse(input);
  if (checked.success) return checked.data;
  const { path, message } = checked.error.issues[0];
  throw new MigrationError(`${what}: ${path.map(String).join('.')}: ${message}`);
}
