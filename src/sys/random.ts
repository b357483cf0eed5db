/**
 * Random bytes as node:crypto has them, of the same source. Loading that module takes a start as long as a tenth of bare Node.js does.
 */
import fs from 'node:fs';

/** Nobody can guess them. */
export function randomBytes(count: number): Uint8Array {
  let source: number;
  try {
    source = fs.openSync('/dev/urandom', 'r');
  } catch {
    // A root folder of the process's own, without devices.
    return process.getBuiltinModule('node:crypto').randomBytes(count);
  }
  try {
    const bytes = new Uint8Array(count);
    fs.readSync(source, bytes);
    return bytes;
  } finally {
    fs.closeSync(source);
  }
}
