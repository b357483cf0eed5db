/**
 * Shared libraries that define what a program asks of them, and end it when it calls that: they stand for large ones that it is
 * linked to and never calls. Debian's fio is linked to Ceph's, Gluster's and other storage's libraries, 75 MiB that a guest would
 * unpack and relocate at each start.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

/** Of fio: storage over networks, and persistent memory. */
const NEVER_CALLED = /^lib(gfapi|ibverbs|nbd|pmem|pmemblk|rados|rbd|rdmacm)\.so\.\d+$/;

export function isNeverCalled(library: string): boolean {
  return NEVER_CALLED.test(library);
}

function readelf(...args: readonly string[]): string {
  return execFileSync('readelf', ['-W', ...args], { encoding: 'utf8', maxBuffer: 2 ** 24 });
}

/** The versions that a program's symbols of a library have. */
function versionsOf(program: string, library: string): string[] {
  const [, needs = ''] = readelf('-V', program).split('Version needs section');
  const part = needs.split(/File: /).find((text) => text.startsWith(`${library} `)) ?? '';
  return [...part.matchAll(/Name: (\S+)/g)].map(([, name]) => name);
}

/**
 * @param compiler for the program's architecture
 * @param target where the library is written
 */
export function writeStub(program: string, library: string, compiler: string, target: string): void {
  const wanted = [...readelf('--dyn-syms', program).matchAll(/ GLOBAL +\w+ +UND (\w+)@?(\S*)/g)];
  const prefix = /^lib(\w+)/.exec(library)![1];
  // Libraries without versions begin their names with their own.
  const groups = new Map(versionsOf(program, library).map((version): [string, string[]] => [version, []]));
  const plain: string[] = [];
  for (const [, name, version] of wanted) {
    if (version !== '') groups.get(version)?.push(name);
    else if (name.startsWith(`${prefix}_`)) plain.push(name);
  }
  const names = [...plain, ...[...groups.values()].flat()];
  fs.mkdirSync(path.dirname(target), { recursive: true });
  fs.writeFileSync(`${target}.c`, names.map((name) => `void ${name}(void) { __builtin_trap(); }\n`).join(''));
  const script = [...groups].map(
    ([version, members]) => `${version} { ${members.map((name) => `${name};`).join(' ')} };`,
  );
  fs.writeFileSync(`${target}.map`, `${script.join('\n')}\n`);
  const versions = groups.size === 0 ? [] : [`-Wl,--version-script=${target}.map`];
  const options = ['-shared', '-nostdlib', '-fPIC', '-w', `-Wl,-soname=${library}`, ...versions];
  execFileSync(compiler, [...options, '-o', target, `${target}.c`], { stdio: ['ignore', 'ignore', 'pipe'] });
  for (const kind of ['c', 'map']) fs.rmSync(`${target}.${kind}`);
}
