/**
 * AML, byte by byte (ACPI 6.5, chapter 20): the terms that this machine's DSDT is made of, each a function that gives its
 * encoding. Resource descriptors are those of 6.4.
 */

/** Bytes, each a character up to U+00FF: terms nest deeply, and V8 joins strings without copying them. */
export type Aml = string;

export function bytes(...values: number[]): Aml {
  return String.fromCharCode(...values);
}

/** A name or a path: segments of up to four characters between dots, from the root with a leading backslash. */
function nameString(path: string): Aml {
  const root = path.startsWith('\\') ? '\\' : '';
  const segments = path.replace('\\', '').split('.');
  const names = segments.map((segment) => segment.padEnd(4, '_')).join('');
  if (segments.length === 1) return root + names;
  const prefix = segments.length === 2 ? bytes(0x2e) : bytes(0x2f, segments.length);
  return root + prefix + names;
}

/** Upper-case digits for a name. */
export function hex(value: number, digits: number): string {
  return value.toString(16).toUpperCase().padStart(digits, '0');
}

/** PkgLength counts itself: 20.2.4. One byte up to 63, else a nibble and one to three bytes. */
export function withPackageLength(content: Aml): Aml {
  if (content.length + 1 < 0x40) return bytes(content.length + 1) + content;
  for (let extra = 1; extra <= 3; extra++) {
    const length = content.length + 1 + extra;
    if (length >= 2 ** (4 + 8 * extra)) continue;
    return bytes((extra << 6) | (length & 0xf)) + little(length >> 4, extra) + content;
  }
  throw new RangeError(`AML package of ${content.length} bytes`);
}

function little(value: number, count: number): Aml {
  let result = '';
  for (let rest = value, index = 0; index < count; index++, rest = Math.floor(rest / 256)) result += bytes(rest % 256);
  return result;
}

export function integer(value: number): Aml {
  if (value === 0 || value === 1) return bytes(value);
  if (value < 0x100) return bytes(0x0a, value);
  if (value < 0x1_0000) return bytes(0x0b) + little(value, 2);
  if (value < 0x1_0000_0000) return bytes(0x0c) + little(value, 4);
  return bytes(0x0e) + little(value, 8);
}

export function string(text: string): Aml {
  return bytes(0x0d) + text + bytes(0);
}

/** A compressed EISA id such as `PNP0A08`: 19.3.4. */
export function eisaId(id: string): Aml {
  const letter = (index: number) => id.charCodeAt(index) - 0x40;
  const vendor = (letter(0) << 10) | (letter(1) << 5) | letter(2);
  const product = parseInt(id.slice(3), 16);
  return bytes(0x0c, vendor >> 8, vendor & 0xff, product >> 8, product & 0xff);
}

export function name(path: string, value: Aml): Aml {
  return bytes(0x08) + nameString(path) + value;
}

export function scope(path: string, ...terms: Aml[]): Aml {
  return bytes(0x10) + withPackageLength(nameString(path) + terms.join(''));
}

export function device(path: string, ...terms: Aml[]): Aml {
  return bytes(0x5b, 0x82) + withPackageLength(nameString(path) + terms.join(''));
}

/** A serialized method. */
export function method(path: string, args: number, ...terms: Aml[]): Aml {
  return bytes(0x14) + withPackageLength(nameString(path) + bytes(args | 0x08) + terms.join(''));
}

export function packageOf(...elements: Aml[]): Aml {
  return bytes(0x12) + withPackageLength(bytes(elements.length) + elements.join(''));
}

/** An operation region in system memory. */
export function memoryRegion(path: string, address: number, length: number): Aml {
  return bytes(0x5b, 0x80) + nameString(path) + bytes(0x00) + integer(address) + integer(length);
}

/** How wide the accesses to a region's fields are: 20.2.5.2. */
export const FieldAccess = { Byte: 1, Dword: 3 } as const;
export type FieldAccess = (typeof FieldAccess)[keyof typeof FieldAccess];

/** A gap between fields has no name. */
export const GAP = '';

/**
 * Fields of a region, without lock; each is a name and its width in bits. A write to a part of an access's width has zeros in
 * the rest of it: preserving that would read a register first, which may have effects, and write back bits that acknowledge.
 */
export function fields(region: string, access: FieldAccess, ...list: [name: string, bits: number][]): Aml {
  const WRITE_AS_ZEROS = 2 << 5;
  const encoded = list.map(([field, bits]) => (field === GAP ? bytes(0) : nameString(field)) + fieldWidth(bits));
  return bytes(0x5b, 0x81) + withPackageLength(nameString(region) + bytes(access | WRITE_AS_ZEROS) + encoded.join(''));
}

/** A field's width is encoded like a PkgLength that does not count itself. */
function fieldWidth(bits: number): Aml {
  return bits < 0x40 ? bytes(bits) : bytes(0x40 | (bits & 0xf), bits >> 4);
}

export const LOCAL0: Aml = bytes(0x60);
export const ARG0: Aml = bytes(0x68);
export const ARG1: Aml = bytes(0x69);
export const ARG3: Aml = bytes(0x6b);

export function returnValue(value: Aml): Aml {
  return bytes(0xa4) + value;
}

/** A reference to a named object. */
export function reference(path: string): Aml {
  return nameString(path);
}

export function store(source: Aml, target: Aml): Aml {
  return bytes(0x70) + source + target;
}

export function increment(target: Aml): Aml {
  return bytes(0x75) + target;
}

/** Sum; the result is not stored. */
export function add(left: Aml, right: Aml): Aml {
  return bytes(0x72) + left + right + bytes(0x00);
}

export function subtract(left: Aml, right: Aml, target: Aml): Aml {
  return bytes(0x74) + left + right + target;
}

export function equal(left: Aml, right: Aml): Aml {
  return bytes(0x93) + left + right;
}

export function lessThan(left: Aml, right: Aml): Aml {
  return bytes(0x95) + left + right;
}

/** A call of a method. */
export function call(path: string, ...args: Aml[]): Aml {
  return nameString(path) + args.join('');
}

/** A mutex of synchronization level 0: 20.2.5.2. */
export function mutex(path: string): Aml {
  return bytes(0x5b, 0x01) + nameString(path) + bytes(0x00);
}

/** Terms that run with a mutex held, however long it takes to get it. */
export function locked(path: string, ...terms: Aml[]): Aml {
  const FOREVER = bytes(0xff, 0xff);
  return bytes(0x5b, 0x23) + nameString(path) + FOREVER + terms.join('') + bytes(0x5b, 0x27) + nameString(path);
}

export function shiftLeft(value: Aml, count: Aml, target: Aml): Aml {
  return bytes(0x79) + value + count + target;
}

/** Bitwise and; the result is not stored. */
export function and(left: Aml, right: Aml): Aml {
  return bytes(0x7b) + left + right + bytes(0x00);
}

export function ifThen(predicate: Aml, ...terms: Aml[]): Aml {
  return bytes(0xa0) + withPackageLength(predicate + terms.join(''));
}

export function whileTrue(predicate: Aml, ...terms: Aml[]): Aml {
  return bytes(0xa2) + withPackageLength(predicate + terms.join(''));
}

export function notify(path: string, value: Aml): Aml {
  return bytes(0x86) + nameString(path) + value;
}

export function buffer(content: Aml): Aml {
  return bytes(0x11) + withPackageLength(integer(content.length) + content);
}

/** Names the 64 bits of a buffer from a byte on. */
export function qwordField(source: Aml, byte: number, path: string): Aml {
  return bytes(0x8f) + source + integer(byte) + nameString(path);
}

/** A buffer of resource descriptors with the end tag; its checksum of 0 means none. */
export function resourceTemplate(...descriptors: Aml[]): Aml {
  return buffer(descriptors.join('') + bytes(0x79, 0x00));
}

/** I/O ports, 16-bit decoded: 6.4.2.5. */
export function io(port: number, length: number): Aml {
  return bytes(0x47, 0x01) + little(port, 2) + little(port, 2) + bytes(0x01, length);
}

/** An edge-triggered, active-high, exclusive interrupt: 6.4.3.6. */
export function interrupt(gsi: number): Aml {
  const CONSUMER_EDGE = 0x03;
  return bytes(0x89) + little(6, 2) + bytes(CONSUMER_EDGE, 1) + little(gsi, 4);
}

export function memory32Fixed(address: number, length: number): Aml {
  return bytes(0x86) + little(9, 2) + bytes(0x01) + little(address, 4) + little(length, 4);
}

/** Address space descriptors of a bridge: 6.4.3.5. Both ends fixed, positively decoded, producer. */
const WINDOW_FLAGS = 0x0c;

/** Granularity, first and last address, translation, length; of `size` bytes each. */
function addressRange(first: number, last: number, size: number): Aml {
  return [0, first, last, 0, last - first + 1].map((value) => little(value, size)).join('');
}

export function wordBusNumber(first: number, last: number): Aml {
  return bytes(0x88) + little(13, 2) + bytes(0x02, WINDOW_FLAGS, 0x00) + addressRange(first, last, 2);
}

export function wordIo(first: number, last: number): Aml {
  const ENTIRE_RANGE = 0x03;
  return bytes(0x88) + little(13, 2) + bytes(0x01, WINDOW_FLAGS, ENTIRE_RANGE) + addressRange(first, last, 2);
}

const READ_WRITE = 0x01;
/** Of ordinary memory; other windows are of registers. */
export const CACHEABLE = 0x02;

/** @param end exclusive */
export function dwordMemory(start: number, end: number): Aml {
  return bytes(0x87) + little(23, 2) + bytes(0x00, WINDOW_FLAGS, READ_WRITE) + addressRange(start, end - 1, 4);
}

/** @param end exclusive */
export function qwordMemory(start: number, end: number, caching = 0): Aml {
  return (
    bytes(0x8a) + little(43, 2) + bytes(0x00, WINDOW_FLAGS, READ_WRITE | caching) + addressRange(start, end - 1, 8)
  );
}
