/**
 * Guests with more than busybox: a Debian root file system as a disk image, and fio and iperf3 for an initramfs.
 *
 * The root has no systemd, nor any package's start script: sysvinit with an inittab of its own, one script and one getty,
 * shows a login prompt 3 seconds after the kernel starts it, under nested emulation.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { cached } from '../lab/cache.js';
import { cpio, file, folder, link } from '../lab/cpio.js';
import { aptOf, aptOfSuite, type Architecture, type Kernel, moduleBytes, moduleFiles, unpack } from '../lab/kernels.js';
import { isNeverCalled, writeStub } from './stub-library.js';

const SYSTEM_PATH = ['/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin', '/sbin', '/bin'];
const ENVIRONMENT = { ...process.env, PATH: `${process.env['PATH'] ?? ''}:${SYSTEM_PATH.join(':')}` };

/** Which Debian package has a command that a test or a benchmark may need. */
const PACKAGES = {
  fakeroot: 'fakeroot',
  fio: 'fio',
  ip: 'iproute2',
  iperf3: 'iperf3',
  mke2fs: 'e2fsprogs',
  mmdebstrap: 'mmdebstrap',
  modprobe: 'kmod',
  'qemu-img': 'qemu-utils',
  'qemu-system-x86_64': 'qemu-system-x86',
} as const;

export type Command = keyof typeof PACKAGES;

function run(command: string, args: readonly string[], env: NodeJS.ProcessEnv = ENVIRONMENT): string {
  return execFileSync(command, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'], maxBuffer: 2 ** 26, env });
}

function note(line: string): void {
  process.stderr.write(`${line}\n`);
}

function commandPath(command: string): string | undefined {
  const folders = ENVIRONMENT.PATH.split(':').filter(Boolean);
  return folders.map((name) => path.join(name, command)).find((name) => fs.existsSync(name));
}

/**
 * Installs the packages of missing commands where this process may; a lab has the commands of its host.
 *
 * @throws when one is missing; says what to type
 */
export function needCommands(commands: readonly Command[]): void {
  const missing = [
    ...new Set(commands.filter((name) => commandPath(name) === undefined).map((name) => PACKAGES[name])),
  ];
  if (missing.length === 0) return;
  const install = ['install', '-y', '--no-install-recommends', ...missing];
  if (process.env['VMM_IN_LAB'] !== undefined || process.getuid!() !== 0)
    throw new Error(`Missing on this host; type: sudo apt-get ${install.join(' ')}`);
  note(`Installing ${missing.join(', ')}`);
  const env = { ...ENVIRONMENT, DEBIAN_FRONTEND: 'noninteractive' };
  const apt = (args: readonly string[]) => spawnSync('apt-get', args, { stdio: ['ignore', 'ignore', 'pipe'], env });
  if (apt(install).status === 0) return;
  apt(['update']);
  const { status, stderr } = apt(install);
  if (status !== 0) throw new Error(`apt-get ${install.join(' ')}: ${String(stderr).trim().split('\n').at(-1)}`);
}

export type Tool = 'fio' | 'iperf3' | 'fwts';

/** The Firmware Test Suite is in no release of Debian before this one. */
const FWTS_SUITE = 'forky';

/** What a program needs, by its path in the guest. */
interface Closure {
  readonly program: string;
  /** The program, its dynamic linker and libraries: files here. */
  readonly files: ReadonlyMap<string, string>;
  /** Libraries that it never calls: their names. */
  readonly stubs: ReadonlyMap<string, string>;
}

/** Where a library or the dynamic linker is: its path in the guest, and a file here. */
type Find = (name: string) => readonly [place: string, source: string];

function closure(place: string, program: string, find: Find): Closure {
  const files = new Map([[place, program]]);
  const stubs = new Map<string, string>();
  // A map goes on with what is added while it is walked.
  for (const source of files.values()) {
    const needed = run('readelf', ['-d', '-l', source]).matchAll(/\(NEEDED\).*\[(.*)\]|interpreter: \/(.*)\]/g);
    for (const [, ...names] of needed) {
      const name = names.join('');
      const [library, file] = find(name);
      if (isNeverCalled(name)) stubs.set(library, name);
      else if (!files.has(library)) files.set(library, file);
    }
  }
  return { program, files, stubs };
}

/** A tool of this host. */
function hostClosure(tool: Exclude<Tool, 'fwts'>): Closure {
  needCommands([tool]);
  const program = fs.realpathSync(commandPath(tool)!);
  const libraries = [...run('ldd', [program]).matchAll(/(?:^|=>)\s*(\/\S+)/gm)].map(([, name]) => name);
  return closure(`/usr/bin/${tool}`, program, (name) => {
    const library = libraries.find((candidate) => path.basename(candidate) === path.basename(name));
    if (library === undefined) throw new Error(`No ${name} for ${tool}`);
    return [library, library];
  });
}

/** The same out of packages that are not this host's own. */
async function packagedClosure(tool: Tool, architecture: Architecture): Promise<Closure> {
  const root = await cached(`guest-tools/${tool}-${architecture}`, [`usr/bin/${tool}`], (target) => {
    note(`Fetching ${tool} for ${architecture}`);
    const options = tool === 'fwts' ? aptOfSuite(FWTS_SUITE, architecture) : aptOf(architecture);
    const packageOf = tool === 'fwts' ? tool : PACKAGES[tool];
    const only = ['recommends', 'suggests', 'conflicts', 'breaks', 'replaces', 'enhances'].map(
      (name) => `--no-${name}`,
    );
    const depends = run('apt-cache', [...options, 'depends', '--recurse', ...only, packageOf]);
    // A name of its own line is a package; in angle brackets it is only a promise of one.
    const names = [...new Set(depends.match(/^[a-z0-9][\w.+-]*$/gm))];
    const archives = path.join(target, 'archives');
    fs.mkdirSync(archives);
    execFileSync('apt-get', [...options, 'download', ...names], { cwd: archives, stdio: ['ignore', 'ignore', 'pipe'] });
    unpack(archives, target);
    fs.rmdirSync(archives);
  });
  // Some libraries lie in folders of their package's own, where its other libraries look for them.
  const libraries = fs
    .readdirSync(root, { recursive: true, encoding: 'utf8' })
    .filter((name) => /\.so[.\d]*$/.test(name));
  return closure(`/usr/bin/${tool}`, path.join(root, 'usr', 'bin', tool), (name) => {
    const place = libraries.find(
      (candidate) => [name, `usr/${name}`].includes(candidate) || path.basename(candidate) === name,
    );
    if (place === undefined) throw new Error(`No ${name} in the packages of ${tool} for ${architecture}`);
    // The dynamic linker is asked for by its path, which newer packages have below usr.
    return [`/${name.includes('/') ? name : place}`, fs.realpathSync(path.join(root, place))];
  });
}

/**
 * A tool with its dynamic linker and libraries, to be put behind a guest's initramfs.
 *
 * @returns a cpio archive; the tool is /usr/bin/NAME in it
 */
export async function guestTools(tool: Tool, architecture: Architecture = 'x86_64'): Promise<string> {
  const own = architecture === hostArchitecture();
  const { program, files, stubs } =
    own && tool !== 'fwts' ? hostClosure(tool) : await packagedClosure(tool, architecture);
  // Another version of any of them makes another archive.
  const identity = createHash('sha256');
  for (const [name, source] of files) {
    const { size, mtimeMs } = fs.statSync(source);
    identity.update(`${name} ${size} ${Math.floor(mtimeMs)}\n`);
  }
  const key = identity.digest('hex').slice(0, 16);
  const entry = await cached(`guest-tools/${tool}-2-${key}`, [], (target) => {
    const made = [...stubs].map(([place, library]): [string, string] => {
      const stub = path.join(target, library);
      writeStub(program, library, own ? 'gcc' : `${architecture}-linux-gnu-gcc`, stub);
      return [place, stub];
    });
    const all = [...files, ...made];
    const names = all.map(([name]) => name.slice(1));
    const folders = new Set<string>();
    for (const name of names)
      for (let parent = path.dirname(name); parent !== '.'; parent = path.dirname(parent)) folders.add(parent);
    const entries = [
      ...[...folders].sort().map(folder),
      ...all.map(([name, source]) => file(name.slice(1), fs.readFileSync(source), 0o100755)),
    ];
    fs.writeFileSync(path.join(target, 'tools.cpio'), cpio(entries));
  });
  return path.join(entry, 'tools.cpio');
}

function hostArchitecture(): Architecture {
  return process.arch === 'arm64' ? 'aarch64' : 'x86_64';
}

/** Loads modules of the running kernel, of which a lab has the files only in the cache. */
export function loadModules(image: Kernel, names: readonly string[]): void {
  for (const name of names) {
    const status = [[], ['-d', image.root]].map(
      (where) => spawnSync('modprobe', [...where, name], { stdio: 'ignore', env: ENVIRONMENT }).status,
    );
    if (!status.includes(0)) throw new Error(`Cannot load the kernel module ${name}; is ${image.release} running?`);
  }
}

const ROOT_PACKAGES = ['sysvinit-core', 'e2fsprogs', 'fio', 'iperf3', 'iproute2', 'kmod'];
const IMAGE_SIZE = '1G';

/** What finds the root, and so is in the initramfs. */
const ROOT_MODULES = ['virtio_pci', 'virtio_blk', 'ext4'];
/** Loaded always, for devices that come later; there is no udev. */
const EARLY_MODULES = ['virtio_blk', 'virtio_net'];
/** Loaded for what the machine has, or by the kernel. */
const MODULES = [
  ...[...ROOT_MODULES, ...EARLY_MODULES, 'virtio_scsi', 'virtio_console', 'virtio_rng', 'virtio_balloon', 'virtio_mem'],
  ...['virtio_pmem', 'nd_pmem', 'virtiofs', 'vmw_vsock_virtio_transport', 'button', 'evdev', 'nvme'],
];

const INITTAB = `id:2:initdefault:
si::sysinit:/etc/guest/start
l0:0:wait:/etc/guest/stop -p
l6:6:wait:/etc/guest/stop -r
ca:12345:ctrlaltdel:/sbin/shutdown -r now
S0:2345:respawn:/sbin/agetty --keep-baud 115200 ttyS0 linux
`;

const START = `#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
for mount in proc:/proc sysfs:/sys devtmpfs:/dev; do
  mountpoint -q \${mount#*:} || mount -t \${mount%:*} \${mount%:*} \${mount#*:}
done
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock
mount -t tmpfs tmp /tmp
mount -o remount,rw /
hostname guest
ip link set lo up
modprobe -a -b -q ${EARLY_MODULES.join(' ')} $(find /sys/devices -name modalias -exec cat {} + | sort -u)
`;

const STOP = `#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
killall5 -15
sync
umount -a -r -t nosysfs,noproc,nodevtmpfs,notmpfs
mount -o remount,ro /
case $1 in
  -p) exec halt -f -p -d ;;
  *) exec reboot -f -d ;;
esac
`;

/** apt's sources of this machine's release, without those of others than the distribution. */
function sources(): string[] {
  const codename = /^VERSION_CODENAME=(.*)$/m.exec(fs.readFileSync('/etc/os-release', 'utf8'))?.[1];
  if (codename === undefined) throw new Error('/etc/os-release names no release');
  const format = '$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)';
  const lines = run('apt-get', ['indextargets', '--format', format, 'Created-By: Packages']).split('\n');
  const found = lines.flatMap((line) => {
    const [uri, release = '', part, origin] = line.split(' ') as (string | undefined)[];
    const ours = release.split('-')[0] === codename && part === 'main' && origin === 'Debian';
    return ours ? [`deb ${uri} ${release} ${part}`] : [];
  });
  if (found.length === 0) throw new Error(`No Debian mirror of ${codename} in the apt configuration`);
  return [codename, ...new Set(found)];
}

/** How this machine's apt fetches: proxies, time-outs and the like. */
function fetchOptions(): string {
  return run('apt-config', ['dump', '--no-empty', '--format', '%F "%v";%n', 'Acquire'])
    .split('\n')
    .filter((line) => !line.startsWith('Acquire::IndexTargets') && !line.startsWith('Acquire::Changelogs'))
    .join('\n');
}

/** Files that make the installed packages a guest. */
function writeExtras(extras: string, image: Kernel): void {
  const write = (name: string, content: string | Buffer, mode = 0o644) => {
    const target = path.join(extras, name);
    fs.mkdirSync(path.dirname(target), { recursive: true });
    fs.writeFileSync(target, content, { mode });
  };
  write('etc/inittab', INITTAB);
  write('etc/guest/start', START, 0o755);
  write('etc/guest/stop', STOP, 0o755);
  write('etc/hostname', 'guest\n');
  write('etc/hosts', '127.0.0.1 localhost guest\n');
  write('etc/fstab', '');
  const from = path.join(image.root, 'lib', 'modules', image.release);
  const to = path.join('usr', 'lib', 'modules', image.release);
  for (const name of moduleFiles(image, MODULES)) {
    write(path.join(to, path.relative(from, name)).replace(/\.xz$/, ''), moduleBytes(name));
  }
  for (const name of ['modules.builtin', 'modules.builtin.modinfo', 'modules.order']) {
    if (fs.existsSync(path.join(from, name))) write(path.join(to, name), fs.readFileSync(path.join(from, name)));
  }
}

/** Run as root, or as what looks like it. */
const ASSEMBLE = `
set -e
cd "$1"
mkdir root
tar -C root --exclude='./dev/*' -xf root.tar
cp -r extras/. root
depmod -b root "$2"
sed -i 's/^root:[^:]*:/root::/' root/etc/shadow
mke2fs -q -t ext4 -L root -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -d root root.ext4 ${IMAGE_SIZE}
rm -rf root root.tar extras
`;

/**
 * A raw ext4 image of a Debian system with fio, iperf3 and the kernel's modules: root logs in on ttyS0 without a password.
 *
 * It is shared, so boot a copy or an overlay of it (`qemu-img create -b`), with {@link rootInitramfs}.
 */
export async function rootImage(image: Kernel): Promise<string> {
  const [codename, ...lines] = sources();
  // Not verified when it is used: in a lab reading it all takes longer than a boot.
  const entry = await cached(`guest-root/1-${codename}-${image.release}`, ['packages'], (target) => {
    const isRoot = process.getuid!() === 0;
    needCommands(['mmdebstrap', 'mke2fs', 'modprobe', ...(isRoot ? [] : (['fakeroot'] as const))]);
    note(`Building a Debian ${codename} root file system`);
    const options = path.join(target, 'apt.conf');
    fs.writeFileSync(options, fetchOptions());
    const excluded = ['/usr/share/doc/*', '/usr/share/man/*', '/usr/share/locale/*', '/usr/share/info/*'];
    run('mmdebstrap', [
      ...['--quiet', '--variant=minbase', `--include=${ROOT_PACKAGES.join(',')}`, `--aptopt=${options}`],
      ...excluded.map((glob) => `--dpkgopt=path-exclude=${glob}`),
      `--customize-hook=chroot "$1" dpkg-query -W >"$1/packages"`,
      ...['--customize-hook=download /packages ' + path.join(target, 'packages'), '--customize-hook=rm "$1/packages"'],
      ...[codename, path.join(target, 'root.tar'), ...lines],
    ]);
    writeExtras(path.join(target, 'extras'), image);
    const assemble = ['sh', '-c', ASSEMBLE, 'sh', target, image.release];
    const command = isRoot ? assemble : ['fakeroot', ...assemble];
    run(command[0], command.slice(1));
    fs.rmSync(options);
  });
  return path.join(entry, 'root.ext4');
}

const ROOT_INIT = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/list); do insmod /modules/$module; done
root=/dev/vda init=/sbin/init mode=ro
for word in $(cat /proc/cmdline); do
  case $word in
    root=*|init=*) eval "$word" ;;
    ro|rw) mode=$word ;;
  esac
done
until [ -b "$root" ]; do usleep 20000; done
mount -t ext4 -o "$mode" "$root" /new || exec sh
mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
exec switch_root /new "$init"
`;

/** The initramfs that {@link rootImage} boots with: stock kernels have the disk's driver as a module. */
export async function rootInitramfs(image: Kernel): Promise<string> {
  const entry = await cached(`guest-root/initramfs-2-${image.release}`, ['initramfs'], (target) => {
    const files = moduleFiles(image, ROOT_MODULES);
    const names = files.map((name) => path.basename(name).replace(/\.xz$/, ''));
    const entries = [
      ...['bin', 'dev', 'modules', 'new', 'proc', 'sys'].map(folder),
      { name: 'dev/console', mode: 0o020600, device: [5, 1] as const },
      file('bin/busybox', fs.readFileSync('/bin/busybox'), 0o100755),
      link('bin/sh', 'busybox'),
      file('modules/list', names.join('\n')),
      ...files.map((name, index) => file(`modules/${names[index]}`, moduleBytes(name))),
      file('init', ROOT_INIT, 0o100755),
    ];
    fs.writeFileSync(path.join(target, 'initramfs'), cpio(entries));
  });
  return path.join(entry, 'initramfs');
}
