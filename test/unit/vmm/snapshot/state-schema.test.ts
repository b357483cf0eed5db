/** What a saved machine is on the disk, and what of a file that somebody else may have written is taken for one. */
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { MACHINE_STATE_VERSION, type SavedMachine } from '../../../../src/vmm/snapshot/saved-machine.js';
import { SnapshotError } from '../../../../src/vmm/snapshot/snapshot-error.js';
import { decodeMachine, encodeMachine } from '../../../../src/vmm/snapshot/state-schema.js';
import { armMachine, x86Machine } from '../../../support/saved-machines.js';

type Texts = ReturnType<typeof encodeMachine>;
type Tree = Record<string, unknown>;

const MACHINES: Readonly<Record<string, SavedMachine>> = {
  'x86 under KVM': x86Machine('kvm'),
  'x86 under the Microsoft hypervisor': x86Machine('mshv'),
  Arm: armMachine(),
};

test.each(Object.entries(MACHINES))('a machine of %s comes back as it was', (_name, machine) => {
  const texts = encodeMachine(machine);
  expect(decodeMachine(texts)).toEqual(machine);
  // Nothing is lost where it is not seen.
  expect(JSON.parse(encodeMachine(decodeMachine(texts)).state)).toEqual(JSON.parse(texts.state));
});

test('a machine has its generation ID, and one from before there was such has none', () => {
  const machine = x86Machine('kvm');
  const { board } = machine.life;
  expect(decodeMachine(encodeMachine(machine)).life.board.generation).toBeUndefined();
  const life = { ...machine.life, board: { ...board, generation: 0xe_f000 } };
  expect(decodeMachine(encodeMachine({ ...machine, life })).life).toEqual(life);
});

test('a machine may have more queues than vCPUs by now', () => {
  const machine = x86Machine('kvm');
  const { boot_vcpus, max_vcpus } = machine.config.cpus;
  const [disk] = machine.config.disks;
  const config = { ...machine.config, disks: [{ ...disk, num_queues: max_vcpus }] };
  const texts = encodeMachine({ ...machine, config });
  expect(boot_vcpus).toBeLessThan(max_vcpus);
  expect(decodeMachine(texts).config).toEqual(config);
});

describe('one line says what is refused', () => {
  const machine = x86Machine('kvm');
  const whole = encodeMachine(machine);
  /** @param path of a field, which is put, or removed if the value is undefined */
  const put = (file: keyof Texts, path: string, value?: unknown): Texts => {
    const tree = JSON.parse(whole[file]) as Tree;
    const names = path.split('.');
    const last = names.pop()!;
    const owner = names.reduce((at, name) => at[name] as Tree, tree);
    owner[last] = value;
    return { ...whole, [file]: JSON.stringify(tree) };
  };
  const state = (path: string, value?: unknown) => put('state', path, value);
  const vcpu = (path: string, value?: unknown) => state(`life.board.vcpus.0.${path}`, value);
  const levels = (count: number) => `${'['.repeat(count)}${']'.repeat(count)}`;
  const { vcpus } = machine.life.board;
  const range = machine.life.memory[0];

  const cases: readonly (readonly [string, Texts, RegExp])[] = [
    ['no JSON', { ...whole, state: '{' }, /^state: accepted is JSON, and whole$/],
    ['no text', { ...whole, config: '' }, /^config: accepted is JSON, and whole$/],
    ['null', { ...whole, state: 'null' }, /^state: /],
    ['null for a configuration', { ...whole, config: 'null' }, /^config: /],
    ['a number for a configuration', { ...whole, config: '5' }, /^config: /],
    ['a list for a configuration', { ...whole, config: '[]' }, /^config: /],
    [
      'a newer form, whatever is in it',
      { ...whole, state: JSON.stringify({ version: 9, oldest: MACHINE_STATE_VERSION + 1 }) },
      /^state: form 9; accepted are those up to 1$/,
    ],
    ['no version', state('version'), /^state: version: /],
    ['a field whose name has lines', state('a\nb\u001b[2J', 1), /^state: .* a b \[2J/],
    ['a field that nobody knows', state('life.more', 1), /^state: life: .*more/],
    ['a register that nobody knows', vcpu('registers.r16', '0x0'), /^state: life\.board\.vcpus\.0\.registers: .*r16/],
    ['a register that is missing', vcpu('registers.rip'), /^state: .*registers\.rip: /],
    ['a number for text', vcpu('registers.rip', 5), /^state: .*registers\.rip: /],
    ['65 bits', vcpu('registers.rip', `0x1${'0'.repeat(16)}`), /^state: .*registers\.rip: /],
    ['bytes that are none', vcpu('xsave', '!!!!'), /^state: .*xsave: /],
    ['too many bytes', vcpu('xsave', 'AAAA'.repeat(2 ** 15 + 1)), /^state: .*xsave: /],
    ['no processor at all', state('life.board.vcpus', []), /^state: life\.present: /],
    ['another architecture', state('life.board.architecture', 'riscv'), /^state: life\.board\.architecture: /],
    ['another hypervisor', state('hypervisor', 'xen'), /^state: hypervisor: /],
    [
      'a vCPU that is not there',
      state('life.present', [0, vcpus.length]),
      /^state: life\.present: accepted are vCPUs whose state is there$/,
    ],
    ['a vCPU twice', state('life.present', [0, 0]), /^state: life\.present: /],
    ['no vCPU', state('life.present', []), /^state: life\.present: /],
    [
      'more vCPUs than the machine can have',
      state('life.built.cpus', { boot_vcpus: 1, max_vcpus: 1 }),
      /^state: life\.board\.vcpus: accepted are up to \d vCPUs$/,
    ],
    [
      'stretches of memory at one place',
      state('life.memory', [range, range]),
      /^state: life\.memory: accepted are stretches that do not overlap$/,
    ],
    [
      'a generation ID that ends outside',
      state('life.board.generation', range.address + range.size - 8),
      /^state: life\.board\.generation: accepted is an address of its memory$/,
    ],
    ['a generation ID that is nowhere', state('life.board.generation', -16), /^state: life\.board\.generation: /],
    ['words that are none', state('life.units.serial.fields.output', [-1]), /^state: .*output\.0: /],
    ['a configuration not accepted', put('config', 'memory.size', -1), /^config: memory\.size: /],
    ['a device that is none', put('config', 'disks', [5]), /^config: disks\.0: /],
    ['a field of the configuration', put('config', 'more', 5), /^config: .*more/],
    ['what it was built of', state('life.built.memory', { size: '1' }), /^config: memory\.size: /],
    ['nothing that it was built of', state('life.built.cpus', null), /^config: /],
    ['levels', { ...whole, state: levels(100_000) }, /^state: accepted are up to 32 levels of objects and lists$/],
    ['levels without an end', { ...whole, config: '['.repeat(2 ** 25) }, /^config: accepted are up to 32 levels/],
    ['levels of what is looked at later', state('life.built.cpus', JSON.parse(levels(1_000))), /^state: /],
  ];
  test.each(cases)('%s', (_name, texts, line) => {
    const begun = performance.now();
    const decode = () => decodeMachine(texts);
    expect(decode).toThrow(SnapshotError);
    expect(decode).toThrow(line);
    expect(decode).not.toThrow(/\n/);
    expect(performance.now() - begun).toBeLessThan(5_000);
  });
});

/** Every object and list in a tree. */
function nodes(tree: unknown, found: Tree[] = []): Tree[] {
  if (typeof tree !== 'object' || tree === null) return found;
  found.push(tree as Tree);
  for (const item of Object.values(tree)) nodes(item, found);
  return found;
}

const WRONG: readonly unknown[] = [
  ...[
    -1,
    0,
    0.5,
    1e300,
    2 ** 32,
    2 ** 53,
    -(2 ** 63),
    null,
    true,
    '',
    '0x',
    '0xffffffffffffffff',
    '-0x1',
    'AAAA',
    '\0',
  ],
  ...['__proto__', [], {}, [[]], { version: 1 }, [null], 'x'.repeat(200_000)],
];
const mutation = fc.record({
  file: fc.constantFrom('state' as const, 'config' as const),
  kind: fc.constantFrom('cut', 'flip', 'replace', 'remove', 'add', 'lengthen', 'swap'),
  where: fc.nat(2 ** 30),
  which: fc.nat(2 ** 30),
  value: fc.constantFrom(...WRONG),
  name: fc.constantFrom('__proto__', 'constructor', 'toString', 'version', 'length', '0', 'more'),
});
type Mutation = typeof mutation extends fc.Arbitrary<infer M> ? M : never;

function mutated(texts: Texts, { file, kind, where, which, value, name }: Mutation): Texts {
  const text = texts[file];
  if (kind === 'cut') return { ...texts, [file]: text.slice(0, where % text.length) };
  if (kind === 'flip') {
    const bytes = Buffer.from(text);
    bytes[where % bytes.length] ^= 1 << (which % 8);
    return { ...texts, [file]: bytes.toString() };
  }
  const tree = JSON.parse(text) as unknown;
  const all = nodes(tree);
  const node = all[where % all.length];
  const keys = Object.keys(node);
  const key = keys[which % Math.max(1, keys.length)] ?? '0';
  if (kind === 'replace') node[key] = value;
  else if (kind === 'remove') Reflect.deleteProperty(node, key);
  else if (kind === 'add' && !Array.isArray(node)) Object.defineProperty(node, name, { value, enumerable: true });
  else if (kind === 'swap') {
    const other = all[which % all.length];
    node[key] = structuredClone(Object.values(other)[0]);
  } else if (Array.isArray(node)) node.push(...Array<unknown>(which % 300).fill(node[0] ?? value));
  return { ...texts, [file]: JSON.stringify(tree) };
}

/** Of few registers, and few bytes in a row: every kind of field is hit. */
function short(machine: SavedMachine): Texts {
  const { config, state } = encodeMachine(machine);
  const tree = JSON.parse(state, (_key, value: unknown) => {
    if (typeof value === 'string' && value.length > 64) return value.slice(0, 8);
    return Array.isArray(value) && value.length > 4 ? value.slice(0, 2) : value;
  }) as unknown;
  const texts = { config, state: JSON.stringify(tree) };
  decodeMachine(texts);
  return texts;
}

test('of texts with something wrong in them each is a machine, or refused', () => {
  const originals = Object.values(MACHINES).map(short);
  const original = fc.nat(originals.length - 1);
  let taken = 0;
  let refused = 0;
  fc.assert(
    fc.property(original, fc.array(mutation, { minLength: 1, maxLength: 3 }), (index, [first, ...more]) => {
      let changed = mutated(originals[index], first);
      for (const next of more) {
        try {
          changed = mutated(changed, next);
        } catch {
          // It is no JSON any more.
          break;
        }
      }
      try {
        decodeMachine(changed);
        taken++;
      } catch (error) {
        expect(error).toBeInstanceOf(SnapshotError);
        expect((error as Error).message.split('\n')).toHaveLength(1);
        refused++;
      }
    }),
    { numRuns: 400 },
  );
  expect(taken).toBeGreaterThan(10);
  expect(refused).toBeGreaterThan(50);
  expect(({} as Tree)['version']).toBeUndefined();
});
