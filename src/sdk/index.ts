/** The package's TypeScript API: docs/sdk.md. */
export { Client, type WaitOptions } from './client.js';
export { ApiError, type CallOptions, ConnectionError } from './connection.js';
export type { Console } from './console.js';
export type { VmmEvent } from './events.js';
export type {
  DeviceModuleConfig,
  DiskConfig,
  NetConfig,
  PciDeviceInfo,
  PmemConfig,
  ReceiveMigrationData,
  RestoreConfig,
  SendMigrationData,
  VmConfig,
  VmForkConfig,
  VmCounters,
  VmInfo,
  VmmPingResponse,
  VmResize,
  VsockConfig,
} from './types.js';
export { type Clone, type ProcessEnd, ProcessError, type StartOptions, VirtualMachine } from './virtual-machine.js';
