/**
 * ACPI Machine Language: a function for each term that the tables use, named as in ASL, giving its encoding.
 *
 * ACPI 6.5, chapter 20. Not there: terms that no table of this machine needs.
 */
import { ascii, concat, u16, u32, u64, u8 } from './bytes.js';

/** An encoded term. */
export type Aml = Uint8Array;

/** Value of a PkgLength or of a field's width in bits: 6 bits in one byte, or 4 bits and up to three more bytes (20.2.4). */
export function packedLength(value: number): Aml {
  if (value < 1 << 6) return u8(value);
  const lead = value & 0xf;
  if (value < 1 << 12) return u8(0x40 | lead, value >>> 4);
  if (value < 1 << 20) return u8(0x80 | lead, value >>> 4, value >>> 12);
  return u8(0xc0 | lead, value >>> 4, value >>> 12, value >>> 20);
}

/** A PkgLength counts its own bytes too. */
function packaged(opcode: Aml, ...parts: readonly Aml[]): Aml {
  const body = concat(...parts);
  let own = 1;
  while (packedLength(body.length + own).length > own) own++;
  return concat(opcode, packedLength(body.length + own), body);
}

function nameSegment(name: string): Aml {
  return ascii(name, 4, '_');
}

/** A NameString (20.2.2): segments of up to 4 characters with dots between them, `\` in front when counted from the root. */
export function path(name: string): Aml {
  const root = name.startsWith('\\');
  const segments = name.slice(root ? 1 : 0).split('.');
  const prefix = segments.length === 1 ? u8() : segments.length === 2 ? u8(0x2e) : u8(0x2f, segments.length);
  return concat(u8(...(root ? [0x5c] : [])), prefix, ...segments.map(nameSegment));
}

/** The shortest encoding of an integer (20.2.3). @param value 0 to Number.MAX_SAFE_INTEGER */
export function integer(value: number): Aml {
  if (value <= 1) return u8(value); // ZeroOp, OneOp
  if (value < 2 ** 8) return u8(0x0a, value);
  if (value < 2 ** 16) return concat(u8(0x0b), u16(value));
  if (value < 2 ** 32) return concat(u8(0x0c), u32(value));
  return concat(u8(0x0e), u64(value));
}

/** @param text ASCII */
export function string(text: string): Aml {
  return concat(u8(0x0d), ascii(text), u8(0));
}

/** A seven-character PNP id, such as PNP0A08: letters of 5 bits, then hexadecimal digits, high byte first (19.3.4). */
export function eisaId(id: string): Aml {
  const [a, b, c] = [...ascii(id, 3)].map((letter) => letter & 0x1f) as [number, number, number];
  const letters = (a << 10) | (b << 5) | c;
  const product = parseInt(id.slice(3), 16);
  return u8(0x0c, letters >>> 8, letters, product >>> 8, product);
}

export function buffer(bytes: Uint8Array): Aml {
  return packaged(u8(0x11), integer(bytes.length), bytes);
}

/** @param elements at most 255 */
export function pkg(...elements: readonly Aml[]): Aml {
  return packaged(u8(0x12), u8(elements.length), ...elements);
}

export function scope(name: string, ...terms: readonly Aml[]): Aml {
  return packaged(u8(0x10), path(name), ...terms);
}

export function device(name: string, ...terms: readonly Aml[]): Aml {
  return packaged(u8(0x5b, 0x82), path(name), ...terms);
}

export function name(name: string, value: Aml): Aml {
  return concat(u8(0x08), path(name), value);
}

/** A serialized method. @param args number of arguments, 0 to 7 */
export function method(name: string, args: number, ...terms: readonly Aml[]): Aml {
  return packaged(u8(0x14), path(name), u8(args | 0x08), ...terms);
}

/** RegionSpace (20.2.5.2). */
export const SYSTEM_MEMORY = 0;

export function operationRegion(name: string, space: number, offset: number, length: number): Aml {
  return concat(u8(0x5b, 0x80), path(name), u8(space), integer(offset), integer(length));
}

/** Fields of a region, in bits from its start, accessed by bytes, without lock, other bits written as zeros. */
export function byteField(region: string, fields: readonly { readonly name: string; readonly bits: number }[]): Aml {
  const list = fields.map(({ name, bits }) => concat(nameSegment(name), packedLength(bits)));
  return packaged(u8(0x5b, 0x81), path(region), u8(0x41), ...list);
}

export const LOCAL0: Aml = u8(0x60);

export function store(value: Aml, target: Aml): Aml {
  return concat(u8(0x70), value, target);
}

/** Bitwise and, its result not stored. */
export function and(left: Aml, right: Aml): Aml {
  return concat(u8(0x7b), left, right, u8(0));
}

export function ifTrue(predicate: Aml, ...terms: readonly Aml[]): Aml {
  return packaged(u8(0xa0), predicate, ...terms);
}

export function notify(object: string, value: number): Aml {
  return concat(u8(0x86), path(object), integer(value));
}
