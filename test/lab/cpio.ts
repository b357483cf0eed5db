/** initramfs archives in the "newc" form (Linux, Documentation/driver-api/early-userspace/buffer-format.rst). */

export interface CpioEntry {
  /** Path without a leading slash. */
  readonly name: string;
  /** File type and permissions, as in stat(2). */
  readonly mode: number;
  /** A file's content, or a link's target. */
  readonly data?: Uint8Array;
  /** Major and minor number of a device node. */
  readonly device?: readonly [number, number];
}

export function file(name: string, data: Uint8Array | string, mode = 0o100644): CpioEntry {
  return { name, mode, data: Buffer.from(data) };
}

export function folder(name: string): CpioEntry {
  return { name, mode: 0o040755 };
}

export function link(name: string, target: string): CpioEntry {
  return { name, mode: 0o120777, data: Buffer.from(target) };
}

function pad(length: number): Buffer {
  return Buffer.alloc(-length & 3);
}

/** One archive, its length a multiple of 4, so that archives can be put one behind the other. */
export function cpio(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = [];
  [...entries, { name: 'TRAILER!!!', mode: 0 } as CpioEntry].forEach(({ name, mode, data, device }, index) => {
    const content = Buffer.from(data ?? []);
    const path = Buffer.from(`${name}\0`);
    const [major, minor] = device ?? [0, 0];
    const fields = [index + 1, mode, 0, 0, 1, 0, content.length, 0, 0, major, minor, path.length, 0];
    const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`);
    parts.push(header, path, pad(header.length + path.length), content, pad(content.length));
  });
  return Buffer.concat(parts);
}
