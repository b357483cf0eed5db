/**
 * What a snapshot's state file and a migration's state have to be: they come from outside, so nothing of them is used before it has passed
 * here. 64-bit numbers are text such as 0x1f, bytes are base64.
 */
import * as z from 'zod/mini';
import { isDeep, MAX_DEPTH } from '../../config/deep-json.js';
import { MAX_VCPUS, vmConfigSchema } from '../../config/vm-config.js';
import type { Hypervisor, HypervisorName } from '../../hypervisor/hypervisor.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { GENERATION_SIZE } from '../boards/board.js';
import { MACHINE_STATE_VERSION, type SavedLife, type SavedMachine } from './saved-machine.js';
import { foreignText } from '../machine/machine-error.js';
import { SnapshotError } from './snapshot-error.js';

/** Bytes of one piece of a hypervisor's own state: an XSAVE area with AMX has 11 KiB, the nested state 12. */
const MAX_BYTES = 2 ** 16;
/** Of registers, words and the like in one list. */
const MAX_LIST = 2 ** 16;
const MAX_DEVICES = 16 * 32;
/** Guest physical addresses have at most 52 bits. */
const MAX_ADDRESS = 2 ** 52;
const MAX_NAME = 80;

const u8 = z.int().check(z.gte(0), z.lte(0xff));
const u16 = z.int().check(z.gte(0), z.lte(0xffff));
const u32 = z.int().check(z.gte(0), z.lte(0xffff_ffff));
const bit = z.int().check(z.gte(0), z.lte(1));
const address = z.int().check(z.gte(0), z.lt(MAX_ADDRESS));
const vcpu = z.int().check(z.gte(0), z.lt(MAX_VCPUS));
const name = z.string().check(z.minLength(1), z.maxLength(MAX_NAME));
const u64 = z.pipe(
  z.string().check(z.regex(/^0x[0-9a-f]{1,16}$/)),
  z.transform((text: string) => BigInt(text)),
);
const bytes = z.pipe(
  z.string().check(z.maxLength(MAX_BYTES * 2), z.regex(/^(?:[\w+/]{4})*(?:[\w+/]{2}==|[\w+/]{3}=)?$/)),
  z.transform((text: string) => new Uint8Array(Buffer.from(text, 'base64'))),
);
const listOf = <T extends z.ZodMiniType>(item: T, most = MAX_LIST) => z.array(item).check(z.maxLength(most));

const msr = z.strictObject({ index: u32, value: u64 });
const cpuidEntry = z.strictObject({
  ...{ function: u32, index: u32, significantIndex: z.boolean() },
  ...{ eax: u32, ebx: u32, ecx: u32, edx: u32 },
});

const general = z.strictObject({
  ...{ rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64 },
  ...{ r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64, rip: u64, rflags: u64 },
});
const segment = z.strictObject({
  ...{ base: u64, limit: u32, selector: u16, type: u8 },
  ...{ present: bit, dpl: u8, db: bit, s: bit, l: bit, g: bit, avl: bit, unusable: bit },
});
const table = z.strictObject({ base: u64, limit: u16 });
const special = z.strictObject({
  ...{ cs: segment, ds: segment, es: segment, fs: segment, gs: segment, ss: segment, tr: segment, ldt: segment },
  ...{ gdt: table, idt: table },
  ...{ cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apicBase: u64 },
});
const events = z.strictObject({
  exception: z.strictObject({
    ...{ pending: z.boolean(), injected: z.boolean(), vector: u8, hasErrorCode: z.boolean(), errorCode: u32 },
    payload: z.optional(u64),
  }),
  interrupt: z.strictObject({ injected: z.boolean(), vector: u8, soft: z.boolean(), shadow: u8 }),
  nmi: z.strictObject({ injected: z.boolean(), pending: z.boolean(), masked: z.boolean() }),
  sipiVector: u32,
  smi: z.strictObject({ active: z.boolean(), pending: z.boolean(), insideNmi: z.boolean(), latchedInit: z.boolean() }),
  tripleFault: z.boolean(),
});

const x86Vcpu = z.strictObject({
  registers: general,
  special,
  pdptrs: z.optional(listOf(u64, 4)),
  xcr0: u64,
  ssp: z.optional(u64),
  xsave: bytes,
  localApic: bytes,
  activity: z.enum(['running', 'halted', 'wait-for-init', 'init-received', 'sipi-received']),
  events,
  debug: z.strictObject({ addresses: listOf(u64, 4), dr6: u64, dr7: u64 }),
  msrs: listOf(msr),
  tsc: u64,
  tscKhz: z.optional(u32),
  nested: z.optional(bytes),
  synthetic: z.optional(bytes),
});

const x86Vm = z.strictObject({
  clock: u64,
  controllers: z.record(name, bytes),
  synthetic: z.optional(bytes),
});

const armRegister = z.strictObject({ id: u64, value: bytes });
const armVcpu = z.strictObject({
  registers: listOf(armRegister),
  poweredOff: z.boolean(),
  serror: z.strictObject({ pending: z.boolean(), syndrome: z.optional(u64) }),
});

const common = { addressBits: z.int().check(z.gte(32), z.lte(52)), generation: z.optional(address) };
const board = z.discriminatedUnion('architecture', [
  z.strictObject({
    architecture: z.literal('x86_64'),
    ...common,
    cpuid: listOf(listOf(cpuidEntry, 256), MAX_VCPUS),
    vcpus: listOf(x86Vcpu, MAX_VCPUS),
    vm: x86Vm,
  }),
  z.strictObject({
    architecture: z.literal('aarch64'),
    ...common,
    vcpus: listOf(armVcpu, MAX_VCPUS),
    vm: z.strictObject({
      counter: u64,
      counterFrequency: u32,
      gic: z.record(name, listOf(armRegister)),
    }),
  }),
]);

const unit = z.strictObject({ name, version: u32, fields: z.record(name, listOf(u32)) });
const range = { address, size: z.int().check(z.gte(1), z.lt(MAX_ADDRESS)) };

const life = z.strictObject({
  // Checked with the rest of the configuration.
  built: z.strictObject({ cpus: z.unknown(), memory: z.unknown() }),
  board,
  present: listOf(vcpu, MAX_VCPUS),
  units: z.record(name, unit),
  places: listOf(
    z.strictObject({
      ...{ id: name, segment: z.int().check(z.gte(0), z.lt(16)), slot: z.int().check(z.gte(0), z.lt(32)) },
      ...{ bar: address, memory: z.optional(address) },
    }),
    MAX_DEVICES,
  ),
  dimms: listOf(z.strictObject({ slot: z.int().check(z.gte(0), z.lt(256)), ...range }), 256),
  memory: listOf(z.strictObject(range), 1024),
});

/** Who wrote it, and who can read it: what comes first, so that a newer form is refused by its name. */
const headSchema = z.looseObject({
  version: u32,
  /** The oldest version of this form whose readers understand it. */
  oldest: u32,
});

const stateSchema = z.strictObject({
  version: u32,
  oldest: u32,
  hypervisor: z.enum(['kvm', 'mshv']),
  life,
});

/** What a machine is made of, known before it stands still. */
export interface MadeOf {
  readonly hypervisor: HypervisorName;
  readonly architecture: Hypervisor['architecture'];
  readonly config: SavedMachine['config'];
  readonly built: SavedLife['built'];
  readonly memory: readonly MemoryRange[];
}

const madeSchema = z.strictObject({
  hypervisor: z.enum(['kvm', 'mshv']),
  architecture: z.enum(['x86_64', 'aarch64']),
  config: z.unknown(),
  built: life.shape.built,
  memory: life.shape.memory,
});

export const encodeMadeOf = (made: MadeOf): string => JSON.stringify(made);

/** @param text from whoever wants to have it taken for that @throws SnapshotError in one line */
export function decodeMadeOf(text: string): MadeOf {
  const made = check(madeSchema, parse(text, 'machine'), 'machine');
  const config = checkConfig(made.config);
  const { cpus, memory } = checkConfig({ ...config, ...made.built });
  if (overlap(made.memory)) throw new SnapshotError('machine: memory: accepted are stretches that do not overlap');
  return { ...made, config, built: { cpus, memory } };
}

/** @returns two texts in JSON: the configuration, and the rest */
export function encodeMachine({ config, ...rest }: SavedMachine): { readonly config: string; readonly state: string } {
  const plain = (_key: string, value: unknown): unknown => {
    if (typeof value === 'bigint') return `0x${value.toString(16)}`;
    if (value instanceof Uint8Array) return Buffer.from(value).toString('base64');
    return value;
  };
  const head = { version: MACHINE_STATE_VERSION, oldest: MACHINE_STATE_VERSION };
  return { config: JSON.stringify(config, undefined, 1), state: JSON.stringify({ ...head, ...rest }, plain) };
}

/** @param texts from `encodeMachine`, or from whoever wants to have them taken for that @throws SnapshotError in one line */
export function decodeMachine(texts: { readonly config: string; readonly state: string }): SavedMachine {
  return decodeState(texts.state, () => checkConfig(parse(texts.config, 'config')));
}

/** @param checkedConfig asked when the state is of a form that is known @throws SnapshotError in one line */
export function decodeState(text: string, checkedConfig: () => SavedMachine['config']): SavedMachine {
  const raw = parse(text, 'state');
  const { version, oldest } = check(headSchema, raw, 'state');
  if (oldest > MACHINE_STATE_VERSION) {
    throw new SnapshotError(`state: form ${version}; accepted are those up to ${MACHINE_STATE_VERSION}`);
  }
  const { hypervisor, life: found } = check(stateSchema, raw, 'state');
  const config = checkedConfig();
  const { cpus, memory } = checkConfig({ ...config, ...found.built });
  if (!present(found.present, found.board.vcpus.length)) {
    throw new SnapshotError('state: life.present: accepted are vCPUs whose state is there');
  }
  if (found.board.vcpus.length > cpus.max_vcpus) {
    throw new SnapshotError(`state: life.board.vcpus: accepted are up to ${cpus.max_vcpus} vCPUs`);
  }
  if (overlap(found.memory)) {
    throw new SnapshotError('state: life.memory: accepted are stretches that do not overlap');
  }
  const { generation } = found.board;
  if (generation !== undefined && !holds(found.memory, { address: generation, size: GENERATION_SIZE })) {
    throw new SnapshotError('state: life.board.generation: accepted is an address of its memory');
  }
  return { hypervisor, config, life: { ...found, built: { cpus, memory } } };
}

function present(vcpus: readonly number[], made: number): boolean {
  return vcpus.length > 0 && new Set(vcpus).size === vcpus.length && vcpus.every((id) => id < made);
}

function overlap(ranges: readonly MemoryRange[]): boolean {
  const sorted = [...ranges].sort((a, b) => a.address - b.address);
  return sorted.some(({ address }, index) => index > 0 && address < sorted[index - 1].address + sorted[index - 1].size);
}

function holds(ranges: readonly MemoryRange[], { address, size }: MemoryRange): boolean {
  return ranges.some((range) => range.address <= address && address + size <= range.address + range.size);
}

/** As a machine's configuration is, which may have more queues than vCPUs by now. @throws SnapshotError */
function checkConfig(input: unknown): SavedMachine['config'] {
  const { cpus } = (input ?? {}) as { cpus?: { boot_vcpus?: unknown; max_vcpus?: unknown } };
  const wide = { ...(input as object), cpus: { ...cpus, boot_vcpus: cpus?.max_vcpus } };
  const config = check(vmConfigSchema, wide, 'config');
  const boot = check(vcpu, cpus?.boot_vcpus, 'config: cpus.boot_vcpus');
  return { ...config, cpus: { ...config.cpus, boot_vcpus: boot } };
}

function parse(text: string, what: string): unknown {
  if (isDeep(text)) throw new SnapshotError(`${what}: accepted are up to ${MAX_DEPTH} levels of objects and lists`);
  try {
    return JSON.parse(text);
  } catch {
    throw new SnapshotError(`${what}: accepted is JSON, and whole`);
  }
}

function check<T>(schema: z.ZodMiniType<T>, input: unknown, what: string): T {
  const checked = schema.safeParse(input);
  if (checked.success) return checked.data;
  const { path, message } = checked.error.issues[0];
  const field = path.map(String).join('.');
  throw new SnapshotError(foreignText(`${what}: ${field === '' ? '' : `${field}: `}${message}`));
}
