/**
 * The kernel's own description of the Microsoft hypervisor's ABI: linux/mshv.h and include/hyperv/*.h from the newest kernel
 * packages that Debian has, found and fetched through the machine's apt configuration and kept in the cache.
 */
import fs from 'node:fs';
import path from 'node:path';
import { cached } from '../lab/cache.js';
import { aptFor, run, unpack } from '../lab/kernels.js';

const HYPERVISOR = ['hvgdk.h', 'hvgdk_mini.h', 'hvgdk_ext.h', 'hvhdk.h', 'hvhdk_mini.h'];

/** @returns a folder with linux/mshv.h and hyperv/*.h, for a compiler's include path */
export async function mshvHeaders(): Promise<string> {
  const files = ['linux/mshv.h', ...HYPERVISOR.map((file) => `hyperv/${file}`)];
  return cached('mshv-headers-1', files, (folder) => {
    const options = aptFor('backports', 'x86_64');
    const found = run('apt-cache', [...options, 'search', '--names-only', '^linux-headers-[0-9.+deb]+-common$']);
    const names = found.split('\n').map((line) => line.split(' ')[0]);
    const newest = names.sort((one, other) => one.localeCompare(other, 'en', { numeric: true })).at(-1);
    if (newest === undefined || newest === '') throw new Error('No package of kernel headers in the apt lists');
    run('apt-get', [...options, 'download', newest], folder);
    unpack(folder, folder);
    const source = path.join(folder, 'usr', 'src', newest, 'include');
    fs.mkdirSync(path.join(folder, 'linux'));
    fs.mkdirSync(path.join(folder, 'hyperv'));
    fs.copyFileSync(path.join(source, 'uapi', 'linux', 'mshv.h'), path.join(folder, 'linux', 'mshv.h'));
    for (const file of HYPERVISOR) {
      fs.copyFileSync(path.join(source, 'hyperv', file), path.join(folder, 'hyperv', file));
    }
    fs.rmSync(path.join(folder, 'usr'), { recursive: true });
  });
}
