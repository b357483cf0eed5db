import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals';
import { cacheFolders, cacheName, compile, readCache, writeCache } from '../../../src/code-cache.js';

const NAME = cacheName('0123abcd');
const BYTES = Buffer.from('a cache');
let root: string;
let first: string;
let second: string;

beforeEach(() => {
  root = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-code-cache-'));
  [first, second] = ['first', 'second'].map((name) => path.join(root, name));
  fs.mkdirSync(first, { mode: 0o755 });
});

afterEach(() => {
  jest.restoreAllMocks();
  fs.rmSync(root, { recursive: true });
});

const modeOf = (file: string) => fs.statSync(file).mode & 0o777;

test('the name says version, architecture and bundle', () => {
  expect(NAME).toMatch(new RegExp(`^main-${process.version}-${process.arch}-[0-9a-f]+-0123abcd\\.cache$`));
});

test.each([
  ['/somewhere', '/somewhere/vmm'],
  ['relative', path.join(os.homedir(), '.cache/vmm')],
  [undefined, path.join(os.homedir(), '.cache/vmm')],
])('XDG_CACHE_HOME=%s', (value, folder) => {
  const before = process.env['XDG_CACHE_HOME'];
  try {
    if (value === undefined) delete process.env['XDG_CACHE_HOME'];
    else process.env['XDG_CACHE_HOME'] = value;
    expect(cacheFolders('/bundle')).toEqual(['/bundle', folder]);
  } finally {
    if (before === undefined) delete process.env['XDG_CACHE_HOME'];
    else process.env['XDG_CACHE_HOME'] = before;
  }
});

describe('a cache', () => {
  test('is its user’s alone, and nothing is left beside it', () => {
    for (const bytes of [BYTES, Buffer.from('another')]) {
      writeCache([first, second], NAME, bytes);
      expect(readCache([first, second], NAME)).toEqual(bytes);
    }
    expect(fs.readdirSync(root)).toEqual(['first']);
    expect(fs.readdirSync(first)).toEqual([NAME]);
    expect(modeOf(path.join(first, NAME))).toBe(0o600);
  });

  test('goes to the next folder, which is made, where the first may not be written', () => {
    fs.writeFileSync(path.join(root, 'file'), '');
    writeCache([path.join(root, 'file'), path.join(second, 'deep')], NAME, BYTES);
    expect(readCache([path.join(root, 'file'), path.join(second, 'deep')], NAME)).toEqual(BYTES);
    expect(modeOf(path.join(second, 'deep'))).toBe(0o700);
  });

  test('is nowhere, without a word, where no folder will do', () => {
    fs.writeFileSync(path.join(root, 'file'), '');
    writeCache([path.join(root, 'file')], NAME, BYTES);
    expect(readCache([path.join(root, 'file'), second], NAME)).toBeUndefined();
    writeCache([], NAME, BYTES);
  });

  test.each(['775', '757', '1777'])('is not put into a folder of mode %s', (mode) => {
    fs.chmodSync(first, mode);
    writeCache([first, second], NAME, BYTES);
    expect(fs.readdirSync(first)).toEqual([]);
    expect(readCache([second], NAME)).toEqual(BYTES);
  });

  test('of an older version goes after a while', () => {
    const old = path.join(first, 'main-v20.0.0-x64-0-0.cache');
    const recent = path.join(first, 'main-v20.0.1-x64-0-0.cache');
    const other = path.join(first, 'main.js');
    for (const file of [old, recent, other]) fs.writeFileSync(file, '');
    for (const file of [old, other]) fs.utimesSync(file, 0, 0);
    writeCache([first], NAME, BYTES);
    expect(fs.readdirSync(first).sort()).toEqual([NAME, path.basename(recent), 'main.js'].sort());
  });
});

describe('what another user may have written is not run', () => {
  beforeEach(() => writeCache([first], NAME, BYTES));

  test.each(['775', '757', '1777'])('in a folder of mode %s', (mode) => {
    fs.chmodSync(first, mode);
    expect(readCache([first], NAME)).toBeUndefined();
  });

  test.each(['620', '602'])('a file of mode %s', (mode) => {
    fs.chmodSync(path.join(first, NAME), mode);
    expect(readCache([first], NAME)).toBeUndefined();
  });

  test('a link', () => {
    fs.mkdirSync(second);
    fs.symlinkSync(path.join(first, NAME), path.join(second, NAME));
    expect(readCache([second], NAME)).toBeUndefined();
    expect(readCache([second, first], NAME)).toEqual(BYTES);
  });

  test('no file', () => {
    fs.mkdirSync(path.join(second, NAME), { recursive: true });
    expect(readCache([second], NAME)).toBeUndefined();
  });

  test('the file of somebody else', () => {
    const users = process as { geteuid: () => number };
    jest.spyOn(users, 'geteuid').mockReturnValue(users.geteuid() + 1);
    expect(readCache([first], NAME)).toBeUndefined();
  });
});

describe('compiling', () => {
  const bundle = () => path.join(first, 'main.js');
  const source = '(function () { return (function inner() { return 42; })(); })';
  const run = (text: string, hash: string) => {
    const { script, keep } = compile(text, bundle(), hash);
    const result = (script.runInThisContext() as () => number)();
    return { result, keep };
  };

  test('the first start makes the cache, the second takes it', () => {
    const cold = run(source, 'aa');
    expect(cold.result).toBe(42);
    cold.keep!();
    expect(fs.readdirSync(first)).toEqual([cacheName('aa')]);
    expect(run(source, 'aa')).toEqual({ result: 42, keep: undefined });
  });

  test('of two threads that started cold, the first to end makes it', () => {
    const [one, other] = [run(source, 'aa'), run(source, 'aa')];
    one.keep!();
    const made = fs.statSync(path.join(first, cacheName('aa'))).ino;
    other.keep!();
    expect(fs.statSync(path.join(first, cacheName('aa'))).ino).toBe(made);
  });

  test('a cache of another bundle is not looked at', () => {
    run(source, 'aa').keep!();
    expect(run(source, 'bb').keep).toBeDefined();
  });

  test('a cache that V8 rejects is made again', () => {
    writeCache([first], cacheName('aa'), Buffer.alloc(1000));
    const cold = run(source, 'aa');
    expect(cold.result).toBe(42);
    cold.keep!();
    expect(run(source, 'aa').keep).toBeUndefined();
  });
});
