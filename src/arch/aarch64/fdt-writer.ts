/** A flattened devicetree (Devicetree Specification v0.4, chapter 5): nodes and properties written in order. */

const MAGIC = 0xd00d_feed;
const VERSION = 17;
const LAST_COMPATIBLE_VERSION = 16;
const HEADER_SIZE = 40;
/** One entry of zeros ends the list of reserved memory. */
const RESERVATIONS_SIZE = 16;

const BEGIN_NODE = 1;
const END_NODE = 2;
const PROPERTY = 3;
const END = 9;

/** A cell is a 32-bit number; a bigint takes two. */
export type Cell = number | bigint;
/** `true`: an empty property. */
export type PropertyValue = true | string | readonly string[] | readonly Cell[] | Uint8Array;

export class FdtWriter {
  readonly #parts: Buffer[] = [];
  readonly #strings = new Map<string, number>();
  #stringsSize = 0;

  /** A node with what `fill` puts into it. */
  node(name: string, fill: () => void): void {
    this.#parts.push(cells([BEGIN_NODE]), padded(Buffer.from(`${name}\0`)));
    fill();
    this.#parts.push(cells([END_NODE]));
  }

  property(name: string, value: PropertyValue): void {
    const bytes = encode(value);
    let offset = this.#strings.get(name);
    if (offset === undefined) {
      offset = this.#stringsSize;
      this.#strings.set(name, offset);
      this.#stringsSize += name.length + 1;
    }
    this.#parts.push(cells([PROPERTY, bytes.length, offset]), padded(bytes));
  }

  /** The whole of it. @param bootCpu hardware id of the processor that boots */
  finish(bootCpu = 0): Uint8Array {
    const structure = Buffer.concat([...this.#parts, cells([END])]);
    const strings = Buffer.from([...this.#strings.keys()].map((name) => `${name}\0`).join(''));
    const structureAt = HEADER_SIZE + RESERVATIONS_SIZE;
    const stringsAt = structureAt + structure.length;
    const header = cells([
      ...[MAGIC, stringsAt + strings.length, structureAt, stringsAt, HEADER_SIZE, VERSION, LAST_COMPATIBLE_VERSION],
      ...[bootCpu, strings.length, structure.length],
    ]);
    return Buffer.concat([header, Buffer.alloc(RESERVATIONS_SIZE), structure, strings]);
  }
}

function cells(values: readonly Cell[]): Buffer {
  const bytes = Buffer.alloc(values.reduce<number>((sum, value) => sum + (typeof value === 'bigint' ? 8 : 4), 0));
  let at = 0;
  for (const value of values) {
    at = typeof value === 'bigint' ? bytes.writeBigUInt64BE(value, at) : bytes.writeUInt32BE(value, at);
  }
  return bytes;
}

function encode(value: PropertyValue): Buffer {
  if (value === true) return Buffer.alloc(0);
  if (typeof value === 'string') return Buffer.from(`${value}\0`);
  if (value instanceof Uint8Array) return Buffer.from(value);
  return typeof value[0] === 'string'
    ? Buffer.from((value as readonly string[]).map((text) => `${text}\0`).join(''))
    : cells(value as readonly Cell[]);
}

/** Everything starts on a multiple of 4 bytes. */
function padded(bytes: Buffer): Buffer {
  return Buffer.concat([bytes, Buffer.alloc(-bytes.length & 3)]);
}
