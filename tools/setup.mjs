// `npm start`, `npm test`, `npm run lab` and `npm run bench` come through here: it makes sure that what they need is there,
// then runs them. Plain JavaScript without dependencies, since it runs before anything is installed.
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');
process.chdir(root);

const MIN_NODE = [20, 19];

// Debian packages: the lab's emulator, the guest's user space, unpacking of modules and kernels.
const GUEST = ['qemu-system-x86', 'busybox-static', 'kmod', 'xz-utils'];
// The Arm lab's emulator.
const ARM = ['qemu-system-arm'];
// What compiles the probes, judges the tables and makes certificates, besides; and compiles what runs on Arm.
const TEST = [
  'acpica-tools',
  'device-tree-compiler',
  'gcc',
  'libc6-dev',
  'openssl',
  'util-linux',
  'procps',
  'qemu-utils',
];
const CROSS = ['gcc-aarch64-linux-gnu', 'libc6-dev-arm64-cross'];
// What guests and networks of end-to-end tests and benchmarks are made of.
const DEVICES = ['e2fsprogs', 'fio', 'iperf3', 'iproute2', 'mmdebstrap'];

const FOR_LAB = process.argv.some((word) => word.includes('aarch64')) ? [...GUEST, ...ARM] : GUEST;

const COMMANDS = {
  install: { packages: [...GUEST, ...ARM, ...TEST, ...CROSS, ...DEVICES] },
  start: { packages: FOR_LAB, program: 'dist/tools/start.js' },
  lab: { packages: FOR_LAB, program: 'dist/tools/lab.js' },
  bench: { packages: [...GUEST, ...DEVICES, 'gcc', 'libc6-dev'], program: 'dist/tools/bench.js' },
  test: { packages: [...GUEST, ...ARM, ...TEST, ...CROSS, ...DEVICES], program: 'dist/tools/test.js' },
};

function note(line) {
  process.stderr.write(`${line}\n`);
}

function fail(line) {
  note(line);
  process.exit(1);
}

/** Runs a step; its output is shown only when it fails. */
function step(title, command, args) {
  note(`${title} ...`);
  const { status, stdout, stderr, error } = spawnSync(command, args, { encoding: 'utf8', maxBuffer: 2 ** 26 });
  if (status === 0) return;
  process.stderr.write(`${stdout ?? ''}${stderr ?? ''}`);
  fail(`${command} ${args.join(' ')} failed${error === undefined ? '' : `: ${error.message}`}`);
}

function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major > MIN_NODE[0] || (major === MIN_NODE[0] && minor >= MIN_NODE[1])) return;
  fail(`Node.js ${MIN_NODE.join('.')} or later is needed; this is ${process.versions.node}`);
}

function mtime(file) {
  return fs.statSync(file, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

/** The packages of a lock file and their versions; none where there is no such file. */
function locked(file) {
  const text = fs.existsSync(file) ? fs.readFileSync(file, 'utf8') : '{"packages":{}}';
  return Object.entries(JSON.parse(text).packages).filter(([name]) => name !== '');
}

function installNodePackages() {
  // npm writes down what it has installed. Optional packages are other platforms'.
  const installed = new Map(locked('node_modules/.package-lock.json').map(([name, { version }]) => [name, version]));
  const isThere = ([name, { version, optional }]) => optional === true || installed.get(name) === version;
  if (locked('package-lock.json').every(isThere)) return;
  // The versions are those of the lock file; `npm ci` would besides demand that it lists what other platforms need, which
  // not every registry has.
  step('Installing npm packages', 'npm', ['install', '--no-save', '--no-audit', '--no-fund']);
}

function installDebianPackages(packages) {
  const query = spawnSync('dpkg-query', ['-W', '-f', '${Package} ${db:Status-Status}\n', ...packages], {
    encoding: 'utf8',
  });
  if (query.error !== undefined)
    fail(`This set-up knows Debian only. Install by hand what these packages hold: ${packages.join(' ')}`);
  const installed = new Set(
    query.stdout
      .split('\n')
      .filter((line) => line.endsWith(' installed'))
      .map((line) => line.split(' ')[0]),
  );
  const missing = packages.filter((name) => !installed.has(name));
  if (missing.length === 0) return;
  const isRoot = process.getuid() === 0;
  const sudo = isRoot ? [] : ['sudo', '-n'];
  const allowed = isRoot || spawnSync('sudo', ['-n', 'true']).status === 0;
  if (!allowed) fail(`Debian packages are missing. Type: sudo apt-get install ${missing.join(' ')}`);
  const apt = [...sudo, 'env', 'DEBIAN_FRONTEND=noninteractive', 'apt-get', '-q'];
  step('Updating the lists of Debian packages', apt[0], [...apt.slice(1), 'update']);
  const install = [...apt.slice(1), 'install', '-y', '--no-install-recommends', ...missing];
  step(`Installing the Debian packages ${missing.join(' ')}`, apt[0], install);
}

/** The newest change of a file below a folder. */
function newest(folder) {
  return fs
    .readdirSync(folder, { withFileTypes: true })
    .map((entry) => path.join(folder, entry.name))
    .reduce((time, file) => Math.max(time, mtime(file), fs.statSync(file).isDirectory() ? newest(file) : 0), 0);
}

function build() {
  const sources = Math.max(...['src', 'test', 'tools'].map(newest), mtime('package.json'), mtime('package-lock.json'));
  if (mtime('dist/.built') > sources) return;
  step('Building', process.execPath, ['tools/build.mjs']);
}

const [name, ...args] = process.argv.slice(2);
const command = COMMANDS[name];
if (command === undefined) fail(`usage: setup.mjs ${Object.keys(COMMANDS).join('|')} [ARGUMENTS]`);
checkNode();
installNodePackages();
installDebianPackages(command.packages);
build();
if (command.program !== undefined) {
  const child = spawn(process.execPath, [command.program, ...args], { stdio: 'inherit' });
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal));
  child.on('exit', (status, signal) => {
    process.exitCode = status ?? 128 + os.constants.signals[signal];
  });
}
