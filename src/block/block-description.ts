/** What a virtio block device is to its driver (virtio 1.3, 5.2). */
import { type VirtioDescription, VirtioType } from '../virtio/device.js';
import { MAX_CHAIN } from '../virtio/queue/queue.js';

export const SECTOR = 512;
/** Ranges in one discard or write-zeroes request. */
export const MAX_RANGES = 32;
/** 256 MiB, so that one request does not keep the host's disk for long. */
export const MAX_RANGE_SECTORS = 0x8_0000;

export const BlockFeature = {
  segMax: 2,
  readOnly: 5,
  blockSize: 6,
  flush: 9,
  topology: 10,
  configWce: 11,
  multiQueue: 12,
  discard: 13,
  writeZeroes: 14,
} as const;

/** Offset of writeback in the configuration space; the capacity in sectors, 64 bits, is at 0. */
export const WRITEBACK = 32;
/** A request's buffers beside its data: a header and a status (5.2.6). */
const OTHER_BUFFERS = 2;

/** Words of `DeviceContext.counters`. */
export const BlockCounter = {
  read_ops: 0,
  write_ops: 1,
  read_bytes: 2,
  write_bytes: 3,
  flushes: 4,
  errors: 5,
  limited: 6,
} as const;

/** Places of `DeviceContext.latencies`. */
export const BlockLatency = { read_latency: 0, write_latency: 1 } as const;

export interface BlockSetup {
  /** Bytes. */
  readonly size: number;
  readonly queues: number;
  readonly queueSize: number;
  readonly readonly: boolean;
  /** Bytes that the host can move at the least, and what it moves without reading first: powers of two from 512 on. */
  readonly logicalBlock: number;
  readonly physicalBlock: number;
}

export function blockDescription(setup: BlockSetup): VirtioDescription {
  const { size, queues, queueSize, readonly, logicalBlock } = setup;
  const physicalBlock = Math.max(setup.physicalBlock, logicalBlock);
  const config = new Uint8Array(60);
  const view = new DataView(config.buffer);
  view.setBigUint64(0, BigInt(size / SECTOR), true);
  // A chain is no longer than its queue (2.7.5.3.1), and no queue takes more than MAX_CHAIN.
  view.setUint32(12, Math.max(Math.min(queueSize, MAX_CHAIN) - OTHER_BUFFERS, 1), true);
  view.setUint32(20, logicalBlock, true);
  // Topology: physical blocks as a power of two of logical ones, and the best size in logical blocks.
  config[24] = Math.log2(physicalBlock / logicalBlock);
  view.setUint16(26, physicalBlock / logicalBlock, true);
  config[WRITEBACK] = 1;
  view.setUint16(34, queues, true);
  view.setUint32(36, MAX_RANGE_SECTORS, true);
  view.setUint32(40, MAX_RANGES, true);
  view.setUint32(44, physicalBlock / SECTOR, true);
  view.setUint32(48, MAX_RANGE_SECTORS, true);
  view.setUint32(52, MAX_RANGES, true);
  config[56] = 1;
  const { segMax, blockSize, flush, topology, configWce, multiQueue, readOnly, discard, writeZeroes } = BlockFeature;
  const common = [segMax, blockSize, flush, topology, configWce, multiQueue];
  return {
    type: VirtioType.Block,
    classCode: 0x018000,
    features: [...common, ...(readonly ? [readOnly] : [discard, writeZeroes])],
    queueSizes: Array.from({ length: queues }, () => queueSize),
    config,
    writable: [[WRITEBACK, WRITEBACK + 1]],
    counters: Object.keys(BlockCounter),
    latencies: Object.keys(BlockLatency),
  };
}
