/** npm packages that are run, not imported: fetched through npm's own configuration. */
import fs from 'node:fs';
import path from 'node:path';
import { cached } from './cache.js';
import { note, run } from './kernels.js';

/** The newest release of each line of Node.js that `vmm` is tried with, besides the one that runs the tests. */
export const NODE_RELEASES = ['22.23.3', '24.21.0', '26.10.0'] as const;

/** Fetches a package into a folder that may not be there yet. */
export function unpackNpm(spec: string, target: string): void {
  fs.mkdirSync(target, { recursive: true });
  run('npm', ['pack', '--silent', spec], target);
  const [archive] = fs.readdirSync(target);
  run('tar', ['-xzf', archive, '--strip-components=1', '--no-same-owner'], target);
  fs.rmSync(path.join(target, archive));
}

/** @returns the executable of that release of Node.js, for this machine */
export async function nodeRelease(version: string): Promise<string> {
  const binary = 'bin/node';
  const entry = await cached(`node/${version}-${process.arch}`, [binary], (target) => {
    note(`Fetching Node.js ${version}`);
    const folder = path.join(target, 'package');
    unpackNpm(`node-linux-${process.arch}@${version}`, folder);
    fs.mkdirSync(path.join(target, 'bin'));
    fs.renameSync(path.join(folder, binary), path.join(target, binary));
    // Headers and npm itself are not needed.
    fs.rmSync(folder, { recursive: true });
  });
  return path.join(entry, binary);
}
