import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import {
  KINDS,
  OptionError,
  parseIntegerList,
  parseSubOptions,
  printable,
  splitList,
  unquote,
} from '../../../src/config/option-syntax.js';

describe('splitList', () => {
  test.each([
    ['a=1,b=2', ['a=1', 'b=2']],
    ['a=[1,2],b=3', ['a=[1,2]', 'b=3']],
    ['a=[0@[1,2],1@[3]],b', ['a=[0@[1,2],1@[3]]', 'b']],
    ['a="x,y",b', ['a="x,y"', 'b']],
    ['a="[",b', ['a="["', 'b']],
    ['a="say ""hi, you""",b', ['a="say ""hi, you"""', 'b']],
    ['', ['']],
    ['a,,b', ['a', '', 'b']],
  ])('%s', (text, parts) => expect(splitList(text)).toEqual(parts));

  test.each(['[', ']', '][', '[[]', '"', 'a="b""', '[0@[1]'])('does not balance: %s', (text) =>
    expect(splitList(text)).toBeUndefined(),
  );

  test('pieces joined by commas give the text back', () => {
    fc.assert(
      fc.property(fc.string({ unit: fc.constantFrom('a', '=', ',', '[', ']', '"', '@'), maxLength: 40 }), (text) => {
        const parts = splitList(text);
        if (parts !== undefined) expect(parts.join(',')).toBe(text);
      }),
    );
  });
});

test('quotes are taken away, a doubled one stays as one', () => {
  expect(unquote('"a,b"')).toBe('a,b');
  expect(unquote('x"a ""b"""y')).toBe('xa "b"y');
  expect(unquote('""')).toBe('');
  fc.assert(
    fc.property(fc.string(), (text) => {
      const quoted = `"${text.replaceAll('"', '""')}"`;
      expect(splitList(quoted)).toEqual([quoted]);
      expect(unquote(quoted)).toBe(text);
    }),
  );
});

describe('kinds of value', () => {
  test.each([
    [KINDS.number, '0', 0],
    [KINDS.number, '007', 7],
    [KINDS.number, '"12"', 12],
    [KINDS.number, '9007199254740991', Number.MAX_SAFE_INTEGER],
    [KINDS.size, '512', 512],
    [KINDS.size, '4K', 4096],
    [KINDS.size, '1M', 2 ** 20],
    [KINDS.size, '5G', 5 * 2 ** 30],
    [KINDS.toggle, 'on', true],
    [KINDS.toggle, 'ON', true],
    [KINDS.word, '"Raw"', 'raw'],
    [KINDS.toggle, 'true', true],
    [KINDS.toggle, 'off', false],
    [KINDS.toggle, 'false', false],
    [KINDS.topology, '2:4:1:3', { threads_per_core: 2, cores_per_die: 4, dies_per_package: 1, packages: 3 }],
    [KINDS.affinity, '[0@[0,2-4],1@7]', [{ vcpu: 0, host_cpus: [0, 2, 3, 4] }, { vcpu: 1, host_cpus: [7] }]], // prettier-ignore
  ])('%o reads %s', (kind, raw, value) => expect(kind.parse(raw)).toEqual(value));

  test.each([
    ...['-1', '1.5', '0x1', '1e3', ' 1', '', '9007199254740992', '٣'].map((raw) => [KINDS.number, raw] as const),
    ...['1k', '1T', '1MB', 'K', '-1K', '1.5G', '1 G'].map((raw) => [KINDS.size, raw] as const),
    ...['yes', '1', 'toString'].map((raw) => [KINDS.toggle, raw] as const),
    ...['1:1:1', '1:1:1:1:1', '1:1:1:', 'a:1:1:1'].map((raw) => [KINDS.topology, raw] as const),
    ...['0@[0]', '[]', '[0]', '[0@]', '[0@[]]', '[@[0]]', '[0@0@0]', '[a@0]', '[0@a]', '[0@0,]', '[0@0]]'].map(
      (raw) => [KINDS.affinity, raw] as const,
    ),
  ])('%o refuses %s', (kind, raw) => expect(kind.parse(raw)).toBeUndefined());
});

describe('integer lists', () => {
  test('brackets are optional', () => {
    expect(parseIntegerList('0,2-4')).toEqual([0, 2, 3, 4]);
    expect(parseIntegerList('[0,2-4]')).toEqual([0, 2, 3, 4]);
  });

  test('a range rises', () => {
    expect(parseIntegerList('2-1')).toBeUndefined();
    expect(parseIntegerList('2-2')).toBeUndefined();
  });

  test.each(['', '[]', '1-', '-1', '1-2-3', '1,', 'a', '[1', '[[1]]'])('malformed: %s', (text) =>
    expect(parseIntegerList(text)).toBeUndefined(),
  );

  test('has at most 8192 numbers, whatever the ranges', () => {
    expect(parseIntegerList('0-8191')).toHaveLength(8192);
    expect(parseIntegerList('0-8192')).toBeUndefined();
    expect(parseIntegerList('0-8191,0')).toBeUndefined();
    expect(parseIntegerList('0-9007199254740991')).toBeUndefined();
  });
});

describe('sub-options', () => {
  const subOptions = [
    { name: 'boot', field: 'boot_vcpus', kind: KINDS.number },
    { name: 'label', field: 'label', kind: KINDS.text },
  ];
  const read = (text: string): unknown => parseSubOptions('--x', text, subOptions).fields;

  test('fill the fields of the configuration', () => {
    expect(read('boot=2,label="a=,b"')).toEqual({ boot_vcpus: 2, label: 'a=,b' });
    expect(read('label=a=b')).toEqual({ label: 'a=b' });
  });

  test('an empty value counts as not set, and so does an empty list', () => {
    for (const text of ['boot=', 'boot= ', '', ' ']) expect(read(text)).toEqual({});
  });

  test('keep what was typed, for messages', () => {
    expect(parseSubOptions('--x', 'boot="2"', subOptions).typed).toEqual(new Map([['boot_vcpus', 'boot="2"']]));
  });

  test.each([
    ['boots=2', '--x boots=2: accepted is a list of boot=, label='],
    ['__proto__=2', '--x __proto__=2: accepted is a list of boot=, label='],
    [',', '--x ,: accepted is a list of boot=, label='],
    ['boot=1,', '--x boot=1,: accepted is a list of boot=, label='],
    ['boot', '--x boot: accepted is boot=N'],
    ['boot=1,boot=2', '--x boot=2: accepted is boot= once'],
    ['boot=two', '--x boot=two: accepted is a whole number'],
    ['label=[', '--x label=[: accepted is text whose brackets and quotes balance'],
  ])('refuses %s', (text, message) => {
    expect(() => read(text)).toThrow(OptionError);
    // An error object compares whole messages, where a string would look for a part.
    expect(() => read(text)).toThrow(new Error(message));
  });
});

test('messages are one line of bounded length', () => {
  expect(printable('a\n\u001b[31m\u2028é')).toBe('a\\u{a}\\u{1b}[31m\\u{2028}é');
  expect(new OptionError(`--x ${'y'.repeat(1000)}`, 'z').message).toHaveLength(160 + '...: accepted is z'.length);
});
