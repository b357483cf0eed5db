/**
 * What goes over the wire, by the names that it has in the OpenAPI document: Cloud Hypervisor's. Only the document and types are made
 * from it; what is read is checked by the schemas that these are made of.
 */
import * as z from 'zod/mini';
import {
  balloonSchema,
  characterSchema,
  deviceModuleSchema,
  diskSchema,
  netSchema,
  platformSchema,
  pmemSchema,
  rateLimitGroupSchema,
  rngSchema,
  vsockSchema,
} from '../config/device-config.js';
import { defaulted, optional, required } from '../config/fields.js';
import { memorySchema, memoryZoneSchema } from '../config/memory-config.js';
import { numaSchema, pciSegmentSchema } from '../config/numa-config.js';
import { cpusSchema, vmConfigSchema } from '../config/vm-config.js';
import { receiveMigrationSchema, sendMigrationSchema } from '../config/migration-config.js';
import { forkSchema, restoreSchema, snapshotSchema } from '../config/restore-config.js';
import { coredumpSchema, removeDeviceSchema, resizeDiskSchema, resizeSchema, resizeZoneSchema } from './requests.js';

const { _disable_io_uring: noUring, _disable_aio: noAio, ...disk } = diskSchema.shape;
const diskConfig = z.strictObject({
  ...disk,
  image_type: defaulted('Format; Unknown: what the file looks like', z.enum(['Raw', 'Qcow2', 'Unknown']), 'Unknown'),
  disable_io_uring: noUring,
  disable_aio: noAio,
});

const vmConfig = z.strictObject({
  ...vmConfigSchema.shape,
  console: optional('Paravirtual console, default the terminal, unless the serial port has it', characterSchema),
  rate_limit_groups: defaulted('Limits that disks share', z.array(rateLimitGroupSchema), []),
  disks: defaulted('Disks', z.array(diskConfig), []),
  net: defaulted('Network interfaces', z.array(netSchema), []),
  pmem: defaulted('Persistent memory', z.array(pmemSchema), []),
  device_modules: defaulted("Users' own devices", z.array(deviceModuleSchema), []),
});

const deviceNode = z.strictObject({
  id: z.string(),
  resources: z.array(z.record(z.string(), z.unknown())),
  parent: optional('Name of the one above it', z.string()),
  children: required('Names of the devices below it', z.array(z.string())),
  pci_bdf: optional('Its place on PCI', z.string()),
  leaving: optional('The guest has been asked to let it go, and has not', z.boolean()),
});

const migrationProgress = z.strictObject({
  round: required('Memory is being sent for the so manieth time, from 0 on', z.int()),
  sent: required('Bytes in all', z.int()),
  remaining: required('Bytes of memory that have been written since they were sent', z.int()),
  throttled: required('Percent of the time for which vCPUs are held back', z.int()),
});

export const WIRE = {
  Document: z.record(z.string(), z.unknown()),
  VmmPingResponse: z.strictObject({
    build_version: z.string(),
    version: z.string(),
    pid: z.int(),
    features: z.array(z.string()),
  }),
  VmConfig: vmConfig,
  PayloadConfig: vmConfig.shape.payload,
  CpusConfig: cpusSchema,
  MemoryConfig: memorySchema,
  MemoryZoneConfig: memoryZoneSchema,
  NumaConfig: numaSchema,
  PciSegmentConfig: pciSegmentSchema,
  ConsoleConfig: characterSchema,
  PlatformConfig: platformSchema,
  RateLimitGroupConfig: rateLimitGroupSchema,
  DiskConfig: diskConfig,
  NetConfig: netSchema,
  RngConfig: rngSchema,
  BalloonConfig: balloonSchema,
  PmemConfig: pmemSchema,
  VsockConfig: vsockSchema,
  DeviceModuleConfig: deviceModuleSchema,
  VmInfo: z.strictObject({
    config: required('With all defaults, and with what the host has named', vmConfig),
    state: required('Created: it never ran; Shutdown: it ran', z.enum(['Created', 'Running', 'Paused', 'Shutdown'])),
    memory_actual_size: required('Bytes, with what the guest has plugged, without what its balloon holds', z.int()),
    device_tree: optional('Devices of a machine that runs, by name', z.record(z.string(), deviceNode)),
    migration: optional('Of a machine that is sent to another process', migrationProgress),
  }),
  DeviceNode: deviceNode,
  VmCounters: z.record(z.string(), z.record(z.string(), z.number())),
  VmResize: resizeSchema,
  VmResizeZone: resizeZoneSchema,
  VmResizeDisk: resizeDiskSchema,
  VmRemoveDevice: removeDeviceSchema,
  VmCoredumpData: coredumpSchema,
  VmSnapshotConfig: snapshotSchema,
  RestoreConfig: restoreSchema,
  VmForkConfig: forkSchema,
  SendMigrationData: sendMigrationSchema,
  ReceiveMigrationData: receiveMigrationSchema,
  PciDeviceInfo: z.strictObject({ id: z.string(), bdf: required('Segment, bus, slot and function', z.string()) }),
} as const;

export type WireName = keyof typeof WIRE;
