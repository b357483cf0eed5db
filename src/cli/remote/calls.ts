/** The calls of `vmm remote`, by the names and with the arguments that Cloud Hypervisor's ch-remote has. */
import fs from 'node:fs';
import { text } from 'node:stream/consumers';
import { KINDS, OptionError, type ValueKind } from '../../config/option-syntax.js';
import type { Client } from '../../sdk/client.js';
import type { CallOptions } from '../../sdk/connection.js';
import type {
  DeviceModuleConfig,
  DiskConfig,
  PciDeviceInfo,
  PmemConfig,
  VmConfig,
  VmForkConfig,
  VsockConfig,
} from '../../sdk/types.js';
import { receiveMigrationSchema, sendMigrationSchema } from '../../config/migration-config.js';
import { DEVICE_OPTIONS, listHelp, RECEIVE_MIGRATION_SUB_OPTIONS, SEND_MIGRATION_SUB_OPTIONS } from '../options.js';
import { readDevice, readFields, readRestore } from '../parse-run.js';
import { countersText, infoText, placeText } from './tables.js';

/** What the command line gave one call. */
export interface Given {
  /** Of the options that it takes, by name. */
  readonly options: Readonly<Record<string, string | undefined>>;
  readonly argument: string | undefined;
  /** Whether to wait until the guest has done it. */
  readonly wait: boolean;
  readonly signal: AbortSignal | undefined;
}

/** What comes of a call: for programs, and for people. */
export interface Outcome {
  readonly value: unknown;
  readonly text: string;
}

/** What can be added, by its option. */
type Added = 'disk' | 'net' | 'pmem' | 'vsock' | 'device-module';

export interface Call {
  readonly name: string;
  /** Behind its name. */
  readonly usage?: string;
  readonly summary: string;
  /** Options with a value that it takes, and what each is. */
  readonly options?: Readonly<Record<string, string>>;
  /** Whether it has to have an argument, or may. */
  readonly argument?: 'required' | 'optional';
  /** Whether it takes its time, so that one can wait for it. */
  readonly waits?: boolean;
  /** Options without a value that it takes, and what each is. */
  readonly switches?: Readonly<Record<string, string>>;
  /** Of whose option the argument has the syntax. */
  readonly option?: Added | 'restore';
  /** What its argument is made of, where no option has it. */
  readonly list?: string;
  /** @returns undefined: there is nothing to say */
  run(client: Client, given: Given): Promise<Outcome | undefined>;
}

const nothing = async (done: Promise<void>): Promise<undefined> => {
  await done;
};

/** A call without arguments whose answer is that it is done. */
const plain = (name: string, summary: string, call: (client: Client, options: CallOptions) => Promise<void>): Call => ({
  ...{ name, summary },
  run: (client, { signal }) => nothing(call(client, { signal })),
});

function valueOf({ options }: Given, name: string, kind: ValueKind): number | undefined {
  const text = options[name];
  if (text === undefined) return undefined;
  const value = kind.parse(text);
  if (typeof value !== 'number') throw new OptionError(`--${name} ${text}`, kind.accepted);
  return value;
}

/** Of an option that is on or off. */
function isOn({ options }: Given, name: string): boolean | undefined {
  const text = options[name];
  if (text === undefined) return undefined;
  const value = KINDS.toggle.parse(text);
  if (typeof value !== 'boolean') throw new OptionError(`--${name} ${text}`, KINDS.toggle.accepted);
  return value;
}

/** @throws OptionError when it is not given */
function needed<T>(call: string, name: string, value: T | undefined): T {
  if (value === undefined) throw new OptionError(call, `it with ${name}`);
  return value;
}

type Adder = (client: Client, device: object, options: CallOptions) => Promise<PciDeviceInfo | undefined>;

/** What the option of the same name says of a machine that is to be made, said of one that is there. */
function adds(kind: Added, what: string, add: Adder): Call {
  const option = DEVICE_OPTIONS.find(({ name }) => name === kind)!;
  return {
    ...{ name: `add-${kind}`, usage: 'KEY=VALUE,..', summary: `Give the machine one more ${what}`, option: kind },
    argument: 'required',
    run: async (client, { argument, signal }) => {
      const { fields } = readDevice(`add-${kind}`, argument!, option.subOptions);
      const place = await add(client, fields, { signal });
      return { value: place, text: placeText(place) };
    },
  };
}

/** @throws OptionError when it cannot be read, or is no JSON */
async function readJson<T>(call: string, file: string): Promise<T> {
  try {
    // A pipe of another program may not block, which readFileSync would fail for.
    return JSON.parse(file === '-' ? await text(process.stdin) : fs.readFileSync(file, 'utf8')) as T;
  } catch (error) {
    const reason = error instanceof Error ? `: ${error.message}` : '';
    throw new OptionError(`${call} ${file}`, `a file in JSON, or - for standard input${reason}`);
  }
}

export const CALLS: readonly Call[] = [
  {
    ...{ name: 'ping', summary: 'Say which version runs, in which process' },
    run: async (client, { signal }) => {
      const value = await client.ping({ signal });
      return { value, text: `vmm ${value.version}, process ${value.pid}\n` };
    },
  },
  {
    ...{ name: 'info', summary: 'Show the state of the machine and its devices' },
    run: async (client, { signal }) => {
      const value = await client.info({ signal });
      return { value, text: infoText(value) };
    },
  },
  {
    ...{ name: 'counters', summary: 'Show what each device has done' },
    run: async (client, { signal }) => {
      const value = await client.counters({ signal });
      return { value, text: countersText(value) };
    },
  },
  {
    ...{ name: 'create', usage: '[FILE|-]', summary: 'Make a machine of a VmConfig in JSON; boots nothing yet' },
    argument: 'optional',
    run: async (client, { argument = '-', signal }) =>
      nothing(client.create(await readJson<VmConfig>('create', argument), { signal })),
  },
  plain('boot', 'Build the machine, and let it run', (client, options) => client.boot(options)),
  plain('shutdown', 'End the machine as if its plug were pulled', (client, options) => client.shutdown(options)),
  plain('delete', 'Forget the machine; one that runs is shut down', (client, options) => client.delete(options)),
  plain('reboot', 'Reset the machine', (client, options) => client.reboot(options)),
  plain('pause', 'Stop the machine where it is', (client, options) => client.pause(options)),
  plain('resume', 'Let a paused machine go on', (client, options) => client.resume(options)),
  {
    ...{ name: 'power-button', summary: 'Press the ACPI power button', waits: true },
    run: (client, given) => nothing(client.powerButton(given)),
  },
  plain('nmi', 'Send every vCPU a non-maskable interrupt', (client, options) => client.nmi(options)),
  {
    ...{ name: 'coredump', usage: 'FILE_URL', summary: 'Write memory and registers to an ELF core file' },
    argument: 'required',
    run: (client, { argument, signal }) => nothing(client.coredump(argument!, { signal })),
  },
  {
    ...{ name: 'snapshot', usage: 'FOLDER_URL', summary: 'Write all of a paused machine to a folder' },
    ...{ argument: 'required', options: { resume: 'on: pause one that runs, and let it go on' } },
    run: (client, given) => {
      const resume = isOn(given, 'resume');
      return nothing(client.snapshot(given.argument!, { resume, signal: given.signal }));
    },
  },
  {
    ...{ name: 'restore', usage: 'source_url=FOLDER_URL[,..]', summary: 'Make a machine of a snapshot' },
    ...{ argument: 'required', option: 'restore' },
    run: (client, { argument, signal }) => nothing(client.restore(readRestore('restore', argument!), { signal })),
  },
  {
    ...{
      name: 'send-migration',
      usage: 'destination_url=unix:PATH[,..]',
      summary: 'Send the machine to another process',
    },
    argument: 'required',
    get list() {
      const { shape } = sendMigrationSchema;
      const defaults = sendMigrationSchema.parse({ destination_url: 'unix:/any' });
      return listHelp('Where to and how', SEND_MIGRATION_SUB_OPTIONS, shape, {
        ...defaults,
        destination_url: undefined,
      });
    },
    run: (client, { argument, signal }) => {
      const wanted = readFields('send-migration', argument!, SEND_MIGRATION_SUB_OPTIONS, sendMigrationSchema);
      return nothing(client.sendMigration(wanted, { signal }));
    },
  },
  plain('cancel-migration', 'Give the sending up', (client, options) => client.cancelMigration(options)),
  {
    ...{ name: 'receive-migration', usage: 'receiver_url=unix:PATH[,..]', summary: 'Wait for a machine that is sent' },
    argument: 'required',
    get list() {
      return listHelp('Where from', RECEIVE_MIGRATION_SUB_OPTIONS, receiveMigrationSchema.shape, {});
    },
    run: (client, { argument, signal }) => {
      const wanted = readFields('receive-migration', argument!, RECEIVE_MIGRATION_SUB_OPTIONS, receiveMigrationSchema);
      return nothing(client.receiveMigration(wanted, { signal }));
    },
  },
  {
    ...{
      name: 'fork',
      usage: '[FILE|-]',
      summary: 'Make further machines of this one, as a VmForkConfig in JSON says',
    },
    argument: 'optional',
    run: async (client, { argument = '-', signal }) =>
      nothing(client.forkInto(await readJson<VmForkConfig>('fork', argument), { signal })),
  },
  adds('disk', 'disk', (client, device, options) => client.addDisk(device as DiskConfig, options)),
  adds('net', 'network interface', (client, device, options) => client.addNet(device, options)),
  adds('pmem', 'persistent memory', (client, device, options) => client.addPmem(device as PmemConfig, options)),
  adds('vsock', 'vsock device', (client, device, options) => client.addVsock(device as VsockConfig, options)),
  adds('device-module', "device of a user's own", (client, device, options) =>
    client.addDeviceModule(device as DeviceModuleConfig, options),
  ),
  {
    ...{ name: 'remove-device', usage: 'ID', summary: 'Ask the guest to let a device go' },
    ...{ argument: 'required', waits: true },
    run: (client, given) => nothing(client.removeDevice(given.argument!, given)),
  },
  {
    ...{ name: 'resize', summary: 'Say what the guest is to have', waits: true },
    options: { cpus: 'N: vCPUs', memory: 'SIZE: in all', balloon: 'SIZE: memory that it is to give back' },
    run: (client, given) => {
      const wanted = {
        desired_vcpus: valueOf(given, 'cpus', KINDS.number),
        desired_ram: valueOf(given, 'memory', KINDS.size),
        desired_balloon: valueOf(given, 'balloon', KINDS.size),
      };
      return nothing(client.resize(wanted, given));
    },
  },
  {
    ...{ name: 'resize-zone', summary: 'Say what a memory zone is to have', waits: true },
    options: { id: 'ID: which', size: 'SIZE: in all' },
    run: (client, given) => {
      const size = needed('resize-zone', '--size SIZE', valueOf(given, 'size', KINDS.size));
      return nothing(client.resizeZone(needed('resize-zone', '--id ID', given.options['id']), size, given));
    },
  },
  {
    ...{ name: 'resize-disk', summary: 'Give a disk another size, and tell the guest' },
    switches: { shrink: 'What is behind a smaller size may be lost' },
    options: { disk: 'ID: which', size: 'SIZE: a multiple of 512; smaller only with --shrink' },
    run: (client, given) => {
      const { disk, shrink } = given.options;
      const size = needed('resize-disk', '--size SIZE', valueOf(given, 'size', KINDS.size));
      const options = { shrink: shrink !== undefined, signal: given.signal };
      return nothing(client.resizeDisk(needed('resize-disk', '--disk ID', disk), size, options));
    },
  },
  plain('shutdown-vmm', 'Delete the machine, and end the process', (client, options) => client.shutdownVmm(options)),
];
