/**
 * What goes over the API, as TypeScript has it. In the package these types stand written out, made from the same schemas
 * (tools/sdk-types.ts): who installs it has no zod.
 */
import type * as z from 'zod/mini';
import type { WIRE } from '../api/wire.js';

type Wire<Name extends keyof typeof WIRE> = z.input<(typeof WIRE)[Name]>;

export type VmConfig = Wire<'VmConfig'>;
export type DiskConfig = Wire<'DiskConfig'>;
export type NetConfig = Wire<'NetConfig'>;
export type PmemConfig = Wire<'PmemConfig'>;
export type VsockConfig = Wire<'VsockConfig'>;
export type DeviceModuleConfig = Wire<'DeviceModuleConfig'>;
export type VmForkConfig = Wire<'VmForkConfig'>;
export type RestoreConfig = Wire<'RestoreConfig'>;
export type SendMigrationData = Wire<'SendMigrationData'>;
export type ReceiveMigrationData = Wire<'ReceiveMigrationData'>;
export type VmResize = Wire<'VmResize'>;
export type VmInfo = Wire<'VmInfo'>;
export type VmCounters = Wire<'VmCounters'>;
export type PciDeviceInfo = Wire<'PciDeviceInfo'>;
export type VmmPingResponse = Wire<'VmmPingResponse'>;
