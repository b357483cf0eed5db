/** The calls of the API, under /api/v1/: what each takes and answers, and which method of the process's object it is. */
import type { Logger } from '../vmm/log/logger.js';
import type { Vmm } from '../vmm/machine/vmm.js';
import { receiveMigrationSchema, sendMigrationSchema } from '../config/migration-config.js';
import { folderPath, forkSchema, restoreSchema, snapshotSchema } from '../config/restore-config.js';
import { BodyReader, refusal } from './bodies.js';
import {
  coredumpSchema,
  coreFile,
  removeDeviceSchema,
  resizeDiskSchema,
  resizeSchema,
  resizeZoneSchema,
} from './requests.js';
import type { Route } from './route.js';
import { netDescriptors } from './net-descriptors.js';
import { readDevice, readVmConfig, writeVmConfig } from './vm-config.js';
import type { WireName } from './wire.js';

/** What the API uses of the process's object. */
export type ApiVmm = Pick<Vmm, Exclude<keyof Vmm, 'prepare'>>;

type Refusals = Route['refuses'];

/** Asks for something. */
const ask = (summary: string, answer: WireName, refuses: Refusals, call: () => unknown): Route => ({
  ...{ method: 'GET', summary, answer, refuses, call },
});

const DONE = 'Done';

/** Tells something. */
const tell = (summary: string, body: WireName, refuses: Refusals, call: Route['call']): Route => ({
  ...{ method: 'PUT', summary, body, quiet: DONE, refuses, call },
});

/** Has something done that needs no more words. */
const act = (summary: string, refuses: Refusals, call: () => unknown): Route => ({
  ...{ method: 'PUT', summary, quiet: DONE, refuses },
  call: (body) => {
    if (body !== undefined) throw refusal([], 'no body');
    return call();
  },
});

/** @param version of the product */
export function routes(vmm: ApiVmm, version: string, logger: Logger): ReadonlyMap<string, Route> {
  const reader = new BodyReader((line) => logger.warn(line));
  const add = (kind: Parameters<typeof readDevice>[1], what: string, body: WireName): Route => ({
    ...tell(`Gives the machine one more ${what}`, body, ['unknown', 'conflict', 'busy'], (device, fds) => {
      const read = readDevice(reader, kind, device);
      return vmm.addDevice(kind, fds.length === 0 ? read : { ...read, fds });
    }),
    takesDescriptors: kind === 'net',
    answer: 'PciDeviceInfo',
    quiet: 'The machine does not run, and gets it when it does',
  });
  const ping = () => ({ build_version: `v${version}`, version, pid: process.pid, features: [] });
  const info = () => {
    const now = vmm.info();
    return { ...now, config: writeVmConfig(now.config) };
  };
  const resizeZone = (body: unknown) => {
    const { id, desired_ram: size } = reader.read(resizeZoneSchema, body);
    return vmm.resizeZone(id, size);
  };
  const resizeDisk = (body: unknown) => {
    const { id, desired_size: size, shrink } = reader.read(resizeDiskSchema, body);
    return vmm.resizeDisk(id, size, shrink ?? false);
  };
  const document = async (): Promise<object> => {
    const { openApiDocument } = await import('./openapi.js');
    return openApiDocument(table, version);
  };
  const table: ReadonlyMap<string, Route> = new Map<string, Route>([
    ['openapi.json', ask('This document', 'Document', [], document)],
    ['vmm.ping', ask('Version and process', 'VmmPingResponse', [], ping)],
    [
      'vmm.shutdown',
      act('Deletes the machine, if there is one, and ends the process', [], () => vmm.shutdownVmm('vmm.shutdown')),
    ],
    [
      'vm.create',
      tell("Takes a machine's configuration, and boots nothing yet", 'VmConfig', ['conflict'], (body) =>
        vmm.create(readVmConfig(reader, body)),
      ),
    ],
    ['vm.delete', act('Forgets the machine; one that runs is shut down first', [], () => vmm.delete())],
    ['vm.boot', act('Builds the machine, and lets it run', ['unknown'], () => vmm.boot())],
    ['vm.shutdown', act('Ends the machine as if its plug were pulled', [], () => vmm.shutdown())],
    ['vm.reboot', act('Resets the machine; answered when it runs anew', ['unknown'], () => vmm.reboot())],
    ['vm.pause', act('Stops the machine where it is', [], () => vmm.pause())],
    ['vm.resume', act('Lets a paused machine go on', [], () => vmm.resume())],
    ['vm.power-button', act('Presses the ACPI power button', [], () => vmm.powerButton())],
    ['vm.nmi', act('Sends every vCPU a non-maskable interrupt', [], () => vmm.nmi())],
    [
      'vm.coredump',
      tell('Writes memory and registers to an ELF core file', 'VmCoredumpData', [], (body) =>
        vmm.coredump(coreFile(reader.read(coredumpSchema, body))),
      ),
    ],
    [
      'vm.snapshot',
      tell('Writes all of a paused machine to a folder', 'VmSnapshotConfig', [], (body) => {
        const { destination_url: url, resume } = reader.read(snapshotSchema, body);
        return vmm.snapshot(folderPath(url)!, resume);
      }),
    ],
    [
      'vm.restore',
      {
        ...tell('Makes a machine of a snapshot', 'RestoreConfig', ['conflict'], (body, fds) => {
          const wanted = reader.read(restoreSchema, body);
          return vmm.restore(wanted, netDescriptors(wanted, fds));
        }),
        takesDescriptors: true,
      },
    ],
    [
      'vm.send-migration',
      tell(
        'Sends the machine to another process; events and vm.info tell how it goes',
        'SendMigrationData',
        ['busy'],
        (body) => vmm.sendMigration(reader.read(sendMigrationSchema, body)),
      ),
    ],
    ['vm.cancel-migration', act('The machine goes on here', [], () => vmm.cancelMigration())],
    [
      'vm.receive-migration',
      {
        ...tell(
          'Waits for a machine that is sent; answered when it is here',
          'ReceiveMigrationData',
          ['busy'],
          (body, fds) => {
            const wanted = reader.read(receiveMigrationSchema, body);
            return vmm.receiveMigration(wanted, netDescriptors(wanted, fds));
          },
        ),
        takesDescriptors: true,
      },
    ],
    [
      'vm.fork',
      tell('Makes further machines of this one, in processes that wait for one', 'VmForkConfig', ['busy'], (body) =>
        vmm.fork(reader.read(forkSchema, body)),
      ),
    ],
    ['vm.info', ask('Configuration, state, memory and devices', 'VmInfo', ['unknown'], info)],
    ['vm.add-disk', add('disk', 'disk', 'DiskConfig')],
    ['vm.add-net', add('net', 'network interface', 'NetConfig')],
    ['vm.add-pmem', add('pmem', 'persistent memory', 'PmemConfig')],
    ['vm.add-vsock', add('vsock', 'vsock device, of which it takes one', 'VsockConfig')],
    ['vm.add-device-module', add('module', "device of a user's own", 'DeviceModuleConfig')],
    [
      'vm.remove-device',
      tell('Asks the guest to let a device go', 'VmRemoveDevice', ['unknown', 'busy'], (body) =>
        vmm.removeDevice(reader.read(removeDeviceSchema, body).id),
      ),
    ],
    ['vm.counters', ask('What each device has done', 'VmCounters', [], () => vmm.counters())],
    [
      'vm.resize',
      tell('What the guest is to have, which takes its time', 'VmResize', ['unknown', 'busy'], (body) =>
        vmm.resize(reader.read(resizeSchema, body)),
      ),
    ],
    ['vm.resize-zone', tell('The same for one memory zone', 'VmResizeZone', ['unknown'], resizeZone)],
    ['vm.resize-disk', tell('Gives a disk another size, and tells the guest', 'VmResizeDisk', ['unknown'], resizeDisk)],
  ]);
  return table;
}
