/**
 * Files that are fetched or built once for all clones: $VMM_CACHE, or ~/.cache/vmm.
 *
 * An entry is a folder that appears whole or not at all, so two processes may make the same one; a list of checksums in it
 * is verified when it is used.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

const CHECKSUMS = 'SHA256SUMS';

export function cacheRoot(): string {
  const { VMM_CACHE, XDG_CACHE_HOME } = process.env;
  return VMM_CACHE ?? path.join(XDG_CACHE_HOME ?? path.join(os.homedir(), '.cache'), 'vmm');
}

function checksum(name: string): string {
  return createHash('sha256').update(fs.readFileSync(name)).digest('hex');
}

/**
 * @param name of the entry; names what it is made from, so that another version is another entry
 * @param files that the entry consists of, relative to its folder, as far as they are to be verified
 * @param make fills a new folder
 * @returns the entry's folder
 */
export async function cached(
  name: string,
  files: readonly string[],
  make: (folder: string) => void | Promise<void>,
): Promise<string> {
  const entry = path.join(cacheRoot(), name);
  if (isIntact(entry)) return entry;
  fs.rmSync(entry, { recursive: true, force: true });
  fs.mkdirSync(path.dirname(entry), { recursive: true });
  const folder = fs.mkdtempSync(`${entry}.`);
  try {
    await make(folder);
    const sums = files.map((file) => `${checksum(path.join(folder, file))}  ${file}\n`);
    fs.writeFileSync(path.join(folder, CHECKSUMS), sums.join(''));
    fs.chmodSync(folder, 0o755);
    fs.renameSync(folder, entry);
  } catch (error) {
    fs.rmSync(folder, { recursive: true, force: true });
    // Another process was quicker: its entry is as good.
    if (!isIntact(entry)) throw error;
  }
  return entry;
}

function isIntact(entry: string): boolean {
  try {
    const lines = fs.readFileSync(path.join(entry, CHECKSUMS), 'utf8').split('\n').filter(Boolean);
    return lines.every((line) => {
      const [sum, file] = line.split('  ') as [string, string];
      return checksum(path.join(entry, file)) === sum;
    });
  } catch {
    return false;
  }
}
