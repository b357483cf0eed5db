/** Little-endian fields and checksums, of which every firmware table consists. For set-up code: each call allocates. */

export function u8(...values: number[]): Uint8Array {
  return Uint8Array.from(values);
}

export function u16(value: number): Uint8Array {
  return Uint8Array.of(value, value >>> 8);
}

export function u32(value: number): Uint8Array {
  return Uint8Array.of(value, value >>> 8, value >>> 16, value >>> 24);
}

/** @param value 0 to Number.MAX_SAFE_INTEGER */
export function u64(value: number): Uint8Array {
  return concat(u32(value % 2 ** 32), u32(Math.floor(value / 2 ** 32)));
}

/** Text cut or filled with `filler` to `length` bytes. */
export function ascii(text: string, length = text.length, filler = ' '): Uint8Array {
  return new Uint8Array(Buffer.from(text.padEnd(length, filler).slice(0, length), 'latin1'));
}

export function concat(...parts: readonly Uint8Array[]): Uint8Array {
  const bytes = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/** Sets the zero byte at `at` so that the sum of the first `length` bytes is 0 modulo 256. */
export function setChecksum(bytes: Uint8Array, at: number, length = bytes.length): Uint8Array {
  bytes[at] = -bytes.subarray(0, length).reduce((sum, byte) => sum + byte, 0);
  return bytes;
}

export function alignUp(value: number, alignment: number): number {
  return Math.ceil(value / alignment) * alignment;
}
