/** Whatever is typed, the answer is a command or an OptionError of one line. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { CPUS_SUB_OPTIONS, MEMORY_SUB_OPTIONS } from '../../../src/cli/options.js';
import { parseCommandLine } from '../../../src/cli/parse.js';
import { formatSize } from '../../../src/config/host-facts.js';
import { OptionError } from '../../../src/config/option-syntax.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import type { MemoryConfig } from '../../../src/config/memory-config.js';
import type { CpusConfig, VmConfig } from '../../../src/config/vm-config.js';

const host = { cpus: [0, 1, 2, 5], hugepageSizes: [2 ** 21, 2 ** 30], numaNodes: [0, 2] };

function answers(argv: readonly string[]): void {
  try {
    const command = parseCommandLine(argv, host);
    if (command.kind === 'run') {
      expect(vmConfigSchema.parse(command.config)).toEqual(command.config);
      expect(Number.isSafeInteger(command.process.verbosity)).toBe(true);
    }
  } catch (error) {
    if (!(error instanceof OptionError)) throw error;
    expect(error.message).toMatch(/^[^\p{Cc}\u2028\u2029]{1,400}$/u);
    expect(error.message).toContain(': accepted is ');
  }
}

const VALID = [
  '--kernel k --initramfs=i --cmdline quiet --pvpanic --hypervisor kvm --log-file l -vv',
  '--kernel k --cpus boot=2,max=4,topology=2:2:1:1,max_phys_bits=40,affinity=[0@[0-2],3@[5]]',
  '--kernel k --memory size=1G,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=1G,shared=on,hugepages=on,hugepage_size=2M,prefault=on,thp=off,mergeable=off',
  '--kernel k --serial file="a,b" --console off',
  'doctor --json',
];

test('random text', () => {
  const word = fc.oneof(
    fc.string({ unit: 'binary' }),
    fc.constantFrom('--', '-', '---', '--=', '-=', '__proto__', '[]'),
  );
  const flag = fc.tuple(fc.constantFrom('', '-', '--', '--cpus=', '--memory=', '--serial=', '--kernel='), word);
  fc.assert(
    fc.property(
      fc.array(
        fc.oneof(
          word,
          flag.map(([prefix, text]) => prefix + text),
        ),
        { maxLength: 4 },
      ),
      (argv) => answers(argv),
    ),
    { numRuns: 300, interruptAfterTimeLimit: 5000 },
  );
});

test('names that every object has', () => {
  for (const name of [...Object.getOwnPropertyNames(Object.prototype), 'prototype', 'length', '_', '$0', '--']) {
    for (const argv of [[`--${name}`], [`--${name}=1`, '--kernel', 'k'], [`--${name}.a=1`], [name]]) answers(argv);
    for (const flag of ['cpus', 'memory', 'serial', 'console', 'hypervisor'])
      answers([`--kernel=k`, `--${flag}=${name}=1`]);
  }
});

test('valid lines with a piece cut, doubled or replaced', () => {
  const edit = fc.record({
    line: fc.constantFrom(...VALID),
    at: fc.nat(120),
    length: fc.nat(4),
    text: fc.string({
      unit: fc.constantFrom('[', ']', '"', ',', '=', '@', ':', '-', '0', '9', 'K', ' ', '\n', '\0', 'é'),
      maxLength: 3,
    }),
  });
  fc.assert(
    fc.property(edit, ({ line, at, length, text }) =>
      answers((line.slice(0, at) + text + line.slice(at + length)).split(' ')),
    ),
    { numRuns: 400, interruptAfterTimeLimit: 5000 },
  );
});

const onOff = (value: boolean): string => (value ? 'on' : 'off');

function formatCpus(cpus: CpusConfig): string {
  const { topology: t, affinity } = cpus;
  const parts: Record<string, string | undefined> = {
    boot: String(cpus.boot_vcpus),
    max: String(cpus.max_vcpus),
    topology: t && [t.threads_per_core, t.cores_per_die, t.dies_per_package, t.packages].join(':'),
    max_phys_bits: String(cpus.max_phys_bits),
    affinity: affinity && `[${affinity.map(({ vcpu, host_cpus }) => `${vcpu}@[${host_cpus.join(',')}]`).join(',')}]`,
  };
  return CPUS_SUB_OPTIONS.flatMap(({ name }) => (parts[name] === undefined ? [] : [`${name}=${parts[name]}`])).join(
    ',',
  );
}

function formatMemory(memory: MemoryConfig): string {
  return MEMORY_SUB_OPTIONS.flatMap(({ name, field }) => {
    const value = memory[field];
    if (value === undefined) return [];
    if (value === 'Acpi' || value === 'VirtioMem') return [`${name}=${value === 'Acpi' ? 'acpi' : 'virtio-mem'}`];
    return [`${name}=${typeof value === 'boolean' ? onOff(value) : formatSize(value)}`];
  }).join(',');
}

function formatSerial({ mode, file, socket }: VmConfig['serial']): string {
  const path = file ?? socket;
  return path === undefined ? mode.toLowerCase() : `${mode.toLowerCase()}="${path.replaceAll('"', '""')}"`;
}

const path = fc.string({ minLength: 1, unit: 'grapheme' }).filter((text) => !text.includes('\0'));

const topology = fc.record({
  threads_per_core: fc.integer({ min: 1, max: 2 }),
  cores_per_die: fc.integer({ min: 1, max: 5 }),
  dies_per_package: fc.integer({ min: 1, max: 5 }),
  packages: fc.integer({ min: 1, max: 5 }),
});

const cpus = topology.chain((shape) => {
  const max = shape.threads_per_core * shape.cores_per_die * shape.dies_per_package * shape.packages;
  const pin = fc.record({
    vcpu: fc.nat(max - 1),
    host_cpus: fc.uniqueArray(fc.constantFrom(...host.cpus), { minLength: 1 }),
  });
  return fc.record(
    {
      boot_vcpus: fc.integer({ min: 1, max }),
      max_vcpus: fc.constant(max),
      max_phys_bits: fc.integer({ min: 36, max: 52 }),
      topology: fc.constant(shape),
      affinity: fc.uniqueArray(pin, { selector: ({ vcpu }) => vcpu, minLength: 1, maxLength: 4 }),
    },
    { requiredKeys: ['boot_vcpus', 'max_vcpus', 'max_phys_bits'] },
  );
});

const memory = fc
  .record({
    size: fc.integer({ min: 1, max: 1000 }).map((gib) => gib * 2 ** 30),
    hotplug: fc.option(fc.tuple(fc.nat(9), fc.integer({ min: 10, max: 1000 })), { nil: undefined }),
    hugepage_size: fc.option(fc.constantFrom(...host.hugepageSizes), { nil: undefined }),
    shared: fc.boolean(),
    prefault: fc.boolean(),
    thp: fc.boolean(),
    mergeable: fc.boolean(),
  })
  .map(({ hotplug, ...value }) => ({
    ...value,
    ...(hotplug !== undefined && {
      hotplug_method: 'VirtioMem',
      hotplugged_size: hotplug[0] * 2 ** 30,
      hotplug_size: hotplug[1] * 2 ** 30,
    }),
    hugepages: value.hugepage_size !== undefined,
    mergeable: value.mergeable && !value.shared,
  }));

const serial = fc.oneof(
  fc.constantFrom('Off', 'Null', 'Tty', 'Pty').map((mode) => ({ mode })),
  path.map((file) => ({ mode: 'File', file })),
  path.map((socket) => ({ mode: 'Socket', socket })),
);

test('a configuration written as options is read back the same', () => {
  const config = fc.record({
    payload: fc.record({ kernel: path, initramfs: path, cmdline: path }, { requiredKeys: ['kernel'] }),
    cpus,
    memory,
    serial,
    console: fc.constant({ mode: 'Off' }),
    pvpanic: fc.boolean(),
  });
  fc.assert(
    fc.property(config, (drawn) => {
      const wanted = vmConfigSchema.parse(drawn);
      const { payload } = wanted;
      const argv = [
        ...Object.entries(payload).map(([name, value]) => `--${name}=${value}`),
        `--cpus=${formatCpus(wanted.cpus)}`,
        `--memory=${formatMemory(wanted.memory)}`,
        `--serial=${formatSerial(wanted.serial)}`,
        '--console=off',
        ...(wanted.pvpanic ? ['--pvpanic'] : []),
      ];
      expect(parseCommandLine(argv, host)).toEqual({ kind: 'run', config: wanted, process: { verbosity: 0 } });
    }),
    { numRuns: 200, interruptAfterTimeLimit: 5000 },
  );
});
