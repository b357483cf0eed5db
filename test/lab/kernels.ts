/** Stock Debian kernels, found and fetched through the machine's own apt configuration. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { cached, cacheRoot } from './cache.js';

export type Flavour = 'cloud' | 'generic' | 'backports';
export type Architecture = 'x86_64' | 'aarch64';

export interface Kernel {
  /** As `uname -r` says it. */
  readonly release: string;
  readonly vmlinuz: string;
  /** The folder that holds lib/modules/RELEASE. */
  readonly root: string;
}

/** The metapackages without the architecture. */
const METAPACKAGES: Readonly<Record<Flavour, string>> = {
  cloud: 'linux-image-cloud',
  generic: 'linux-image',
  backports: 'linux-image-cloud',
};
/** What Debian calls them. */
const DEBIAN_ARCHITECTURES: Readonly<Record<Architecture, string>> = { x86_64: 'amd64', aarch64: 'arm64' };
const BACKPORTS = 'trixie-backports';
const KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg';

export function run(command: string, args: readonly string[], cwd?: string): string {
  return execFileSync(command, args, { cwd, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'], maxBuffer: 2 ** 26 });
}

export function note(line: string): void {
  process.stderr.write(`${line}\n`);
}

/**
 * Options that make apt use lists of its own, so that neither root nor the machine's lists are needed, and know nothing of
 * what the machine has installed.
 */
function privateApt(folder: string, architecture: Architecture, sources?: string): string[] {
  fs.mkdirSync(path.join(folder, 'lists', 'partial'), { recursive: true });
  fs.mkdirSync(path.join(folder, 'archives', 'partial'), { recursive: true });
  const debian = DEBIAN_ARCHITECTURES[architecture];
  const options = [`Dir::State::Lists=${folder}/lists`, `Dir::Cache=${folder}`, 'APT::Sandbox::User=root'];
  options.push('Dir::State::Status=/dev/null', `APT::Architecture=${debian}`, `APT::Architectures=${debian}`);
  if (sources !== undefined) {
    const file = path.join(folder, 'sources.list');
    fs.writeFileSync(file, sources);
    options.push(`Dir::Etc::SourceList=${file}`, 'Dir::Etc::SourceParts=/dev/null');
  }
  return options.flatMap((option) => ['-o', option]);
}

/** The mirror of the machine's own release. */
function mirror(): string {
  const codename = /^VERSION_CODENAME=(.*)$/m.exec(fs.readFileSync('/etc/os-release', 'utf8'))?.[1];
  const targets = run('apt-get', ['indextargets', '--format', '$(SITE) $(RELEASE) $(COMPONENT)']).split('\n');
  const site = targets
    .map((line) => line.split(' '))
    .find(([, release, part]) => release === codename && part === 'main')?.[0];
  if (site === undefined) throw new Error(`No Debian mirror of ${codename} in the apt configuration`);
  return site;
}

/** Apt options for an architecture's packages of the machine's own release, with fresh lists. */
export function aptOf(architecture: Architecture): string[] {
  const options = privateApt(path.join(cacheRoot(), 'apt', `own-${architecture}`), architecture);
  run('apt-get', [...options, 'update']);
  return options;
}

/** Apt options under which the flavour's package can be found, with fresh lists. */
export function aptFor(flavour: Flavour, architecture: Architecture): string[] {
  if (flavour !== 'backports') {
    const own = run('dpkg', ['--print-architecture']).trim() === DEBIAN_ARCHITECTURES[architecture];
    if (own && dependency([], metapackage(flavour, architecture)) !== undefined) return [];
    return aptOf(architecture);
  }
  return aptOfSuite(BACKPORTS, architecture);
}

/** Apt options for the packages of another of Debian's suites, with fresh lists. */
export function aptOfSuite(suite: string, architecture: Architecture): string[] {
  const folder = path.join(cacheRoot(), 'apt', `${suite}-${architecture}`);
  const options = privateApt(folder, architecture, `deb [signed-by=${KEYRING}] ${mirror()} ${suite} main\n`);
  run('apt-get', [...options, 'update']);
  return options;
}

function metapackage(flavour: Flavour, architecture: Architecture): string {
  return `${METAPACKAGES[flavour]}-${DEBIAN_ARCHITECTURES[architecture]}`;
}

/** The package with the kernel itself, which the metapackage depends on. */
function dependency(options: readonly string[], name: string): string | undefined {
  const output = run('apt-cache', [...options, 'depends', name]);
  return /^ +Depends: (linux-image-\d\S+)$/m.exec(output)?.[1];
}

/** Unpacks the Debian packages that lie in a folder, and removes them. */
export function unpack(archives: string, target: string): void {
  for (const name of fs.readdirSync(archives).filter((file) => file.endsWith('.deb'))) {
    run('dpkg-deb', ['-x', path.join(archives, name), target]);
    fs.rmSync(path.join(archives, name));
  }
}

/** The newest kernel of a flavour; at most once a day the newest is looked for. */
export async function kernel(flavour: Flavour, architecture: Architecture = 'x86_64'): Promise<Kernel> {
  const day = new Date().toISOString().slice(0, 10);
  const marker = path.join(cacheRoot(), 'kernels', `${metapackage(flavour, architecture)}.${flavour}.${day}`);
  let name: string;
  if (fs.existsSync(marker)) name = fs.readFileSync(marker, 'utf8');
  else {
    const wanted = metapackage(flavour, architecture);
    const found = dependency(aptFor(flavour, architecture), wanted);
    if (found === undefined) throw new Error(`No package ${wanted} in the apt lists`);
    name = found;
    fs.mkdirSync(path.dirname(marker), { recursive: true });
    fs.writeFileSync(`${marker}.${process.pid}`, name);
    fs.renameSync(`${marker}.${process.pid}`, marker);
  }
  const release = name.replace('linux-image-', '').replace('-unsigned', '');
  const vmlinuz = path.join('boot', `vmlinuz-${release}`);
  const root = await cached(path.join('kernels', name), [vmlinuz], (folder) => {
    note(`Fetching the Debian package ${name}`);
    const options = aptFor(flavour, architecture);
    // Packages of late leave the kernel and its modules to two others.
    const parts = run('apt-cache', [...options, 'depends', name]).match(/linux-(binary|modules)-\S+$/gm) ?? [];
    // apt checks the packages against the release's signed checksums.
    run('apt-get', [...options, 'download', name, ...parts], folder);
    unpack(folder, folder);
    // Newer packages keep everything below usr, and the kernel with its modules.
    if (!fs.existsSync(path.join(folder, 'lib'))) fs.symlinkSync('usr/lib', path.join(folder, 'lib'));
    if (!fs.existsSync(path.join(folder, vmlinuz))) {
      fs.mkdirSync(path.join(folder, 'boot'), { recursive: true });
      fs.symlinkSync(path.join('..', 'lib', 'modules', release, 'vmlinuz'), path.join(folder, vmlinuz));
    }
    run('/sbin/depmod', ['-b', folder, release]);
  });
  return { release, vmlinuz: path.join(root, vmlinuz), root };
}

/** Module files in the order in which they have to be loaded, with all that they need. */
export function moduleFiles({ root, release }: Kernel, names: readonly string[]): string[] {
  const folder = path.join(root, 'lib', 'modules', release);
  const dependencies = new Map<string, string[]>();
  const byName = new Map<string, string>();
  for (const line of fs.readFileSync(path.join(folder, 'modules.dep'), 'utf8').split('\n')) {
    const [module, needs] = line.split(':') as [string, string | undefined];
    if (needs === undefined) continue;
    dependencies.set(module, needs.split(' ').filter(Boolean));
    byName.set(
      path
        .basename(module)
        .replace(/\.ko.*$/, '')
        .replaceAll('-', '_'),
      module,
    );
  }
  const files: string[] = [];
  const builtIn = fs.readFileSync(path.join(folder, 'modules.builtin'), 'utf8').replaceAll('-', '_');
  for (const name of names) {
    const module = byName.get(name.replaceAll('-', '_'));
    if (module === undefined) {
      if (builtIn.includes(`/${name.replaceAll('-', '_')}.ko`)) continue;
      throw new Error(`Kernel ${release} has no module ${name}`);
    }
    // modules.dep lists what a module needs, the nearest first.
    for (const file of [...dependencies.get(module)!].reverse().concat(module)) {
      if (!files.includes(file)) files.push(file);
    }
  }
  return files.map((file) => path.join(folder, file));
}

/** An initramfs has no xz: compressed modules are unpacked. */
export function moduleBytes(file: string): Buffer {
  if (!file.endsWith('.xz')) return fs.readFileSync(file);
  return execFileSync('xz', ['-dc', file], { maxBuffer: 2 ** 26 });
}
