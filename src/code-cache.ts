/**
 * V8's code cache of a bundle: made by the first start, so that later ones compile nothing.
 *
 * A file's name says all that its content depends on. V8 runs a cache unseen (it compares the version, its flags and the
 * source's length, and has no checksum), so a cache is taken only from a file of this user's own in a folder that nobody
 * else may write, and it is on the disk before it has its name. Without a cache nothing is missing but time.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import v8 from 'node:v8';
import vm from 'node:vm';

/** A cache that was made so long ago may be another version's; who still runs that version makes it again. */
const STALE_MILLISECONDS = 30 * 24 * 3600 * 1000;
const WRITABLE_BY_OTHERS = 0o022;
const CACHE = /^main-.*\.cache$/;

/** Of the bundle with this hash under this Node.js, on this architecture: V8 runs another architecture's code as its own. */
export function cacheName(bundleHash: string): string {
  const { version, arch } = process;
  return `main-${version}-${arch}-${v8.cachedDataVersionTag().toString(16)}-${bundleHash}.cache`;
}

/** Where caches may be, best first: beside the bundle, else in the user's folder for such things. */
export function cacheFolders(bundleFolder: string): string[] {
  const { XDG_CACHE_HOME } = process.env;
  // The XDG base directory specification: a path that is not absolute is ignored.
  const user = XDG_CACHE_HOME !== undefined && path.isAbsolute(XDG_CACHE_HOME) ? XDG_CACHE_HOME : undefined;
  return [bundleFolder, path.join(user ?? path.join(os.homedir(), '.cache'), 'vmm')];
}

function isOwn({ uid, mode }: fs.Stats): boolean {
  return uid === process.geteuid!() && (mode & WRITABLE_BY_OTHERS) === 0;
}

/** Root could do anything else as well. */
function isTrusted(folder: string): boolean {
  const stats = fs.statSync(folder);
  return isOwn(stats) || (stats.uid === 0 && (stats.mode & WRITABLE_BY_OTHERS) === 0);
}

/** What `step` gives for the first folder where it neither fails nor gives nothing. */
function inFirst<T>(folders: readonly string[], step: (folder: string) => T | undefined): T | undefined {
  for (const folder of folders) {
    try {
      const result = step(folder);
      if (result !== undefined) return result;
    } catch {
      // There is none, or it may not be used: the next one.
    }
  }
  return undefined;
}

function readOwn(folder: string, name: string): Buffer | undefined {
  const fd = fs.openSync(path.join(folder, name), fs.constants.O_RDONLY | fs.constants.O_NOFOLLOW);
  try {
    const stats = fs.fstatSync(fd);
    return stats.isFile() && isOwn(stats) && isTrusted(folder) ? fs.readFileSync(fd) : undefined;
  } finally {
    fs.closeSync(fd);
  }
}

export function readCache(folders: readonly string[], name: string): Buffer | undefined {
  return inFirst(folders, (folder) => readOwn(folder, name));
}

/** Several processes may do it at once: each writes a file of its own, and the last one stays. */
function write(folder: string, name: string, bytes: Buffer): true | undefined {
  fs.mkdirSync(folder, { recursive: true, mode: 0o700 });
  if (!isTrusted(folder)) return undefined;
  const temporary = path.join(folder, `${name}.${process.pid}.${Date.now()}`);
  const fd = fs.openSync(temporary, 'wx', 0o600);
  try {
    fs.writeFileSync(fd, bytes);
    fs.fdatasyncSync(fd);
    fs.renameSync(temporary, path.join(folder, name));
  } catch (error) {
    fs.rmSync(temporary, { force: true });
    throw error;
  } finally {
    fs.closeSync(fd);
  }
  return true;
}

function removeStale(folder: string): void {
  for (const name of fs.readdirSync(folder)) {
    const file = path.join(folder, name);
    if (CACHE.test(name) && fs.statSync(file).mtimeMs < Date.now() - STALE_MILLISECONDS) fs.rmSync(file);
  }
}

/** Fails in silence: the next start tries again. */
export function writeCache(folders: readonly string[], name: string, bytes: Buffer): void {
  inFirst(folders, (folder) => {
    if (write(folder, name, bytes) === undefined) return undefined;
    try {
      removeStale(folder);
    } catch {
      // Another process is at it.
    }
    return folder;
  });
}

/**
 * Compiles a bundle with its cache where there is one.
 *
 * @returns the script, and what makes its cache once it has run, unless another thread has: `undefined` where that is not needed
 */
export function compile(
  source: string,
  filename: string,
  hash: string,
): { script: vm.Script; keep: (() => void) | undefined } {
  let folders: string[] = [];
  try {
    folders = cacheFolders(path.dirname(filename));
  } catch {
    // A user without a home.
  }
  const name = cacheName(hash);
  const cachedData = readCache(folders, name);
  const script = new vm.Script(source, { filename, cachedData });
  const isHot = cachedData !== undefined && script.cachedDataRejected !== true;
  const keep = () => {
    if (cachedData === undefined && readCache(folders, name) !== undefined) return;
    writeCache(folders, name, script.createCachedData());
  };
  return { script, keep: isHot ? undefined : keep };
}
