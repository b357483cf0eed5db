/**
 * Where a virtio function behind PCI has its registers (virtio 1.3, 4.1.4): the regions of BAR 0, the common configuration in
 * them, and the capabilities that lead to both.
 */
import type { BarDescription } from '../../pci/function.js';
import { vectorCount } from './transport-state.js';

/** Regions of BAR 0. A page each, so that one could be mapped apart from the others. */
export const BAR = 0;
export const COMMON_AT = 0x0000;
export const ISR_AT = 0x1000;
export const DEVICE_AT = 0x2000;
export const NOTIFY_AT = 0x3000;
export const MSIX_TABLE_AT = 0x8000;
export const MSIX_PENDING_AT = 0xc000;
export const BAR_SIZE = 0x1_0000;
export const REGION_SIZE = 0x1000;
/** Room for 1024 queues, and for as many vectors: more than the configuration allows. */
export const NOTIFY_BYTES = 4;
export const COMMON_BYTES = 0x40;

/** 4.1.4: cfg_type. */
const CAP_COMMON = 1;
const CAP_NOTIFY = 2;
const CAP_ISR = 3;
const CAP_DEVICE = 4;
const CAP_PCI = 5;
const CAP_VENDOR = 0x09;
export const CAP_MSIX = 0x11;

/** Places in configuration space. */
export const MSIX_CAP_AT = 0x40;
export const PCI_CAP_AT = 0x94;

/** Offsets of common configuration: 4.1.4.3. */
export const Common = {
  deviceFeatureSelect: 0x00,
  deviceFeature: 0x04,
  driverFeatureSelect: 0x08,
  driverFeature: 0x0c,
  configVector: 0x10,
  queueCount: 0x12,
  status: 0x14,
  generation: 0x15,
  queueSelect: 0x16,
  queueSize: 0x18,
  queueVector: 0x1a,
  queueEnable: 0x1c,
  queueNotifyOffset: 0x1e,
  queueDescriptors: 0x20,
  queueDriver: 0x28,
  queueDevice: 0x30,
} as const;

export function virtioBar(wide: boolean): BarDescription {
  return { index: BAR, size: BAR_SIZE, wide };
}

/** The capability list, from its first entry on. */
export function capabilities(queues: number, deviceBytes: number): Uint8Array {
  const list = new Uint8Array(0xc0);
  const view = new DataView(list.buffer);
  const at = (address: number) => address - MSIX_CAP_AT;
  list[at(MSIX_CAP_AT)] = CAP_MSIX;
  list[at(MSIX_CAP_AT) + 1] = 0x4c;
  view.setUint16(at(MSIX_CAP_AT) + 2, vectorCount(queues) - 1, true);
  view.setUint32(at(MSIX_CAP_AT) + 4, MSIX_TABLE_AT | BAR, true);
  view.setUint32(at(MSIX_CAP_AT) + 8, MSIX_PENDING_AT | BAR, true);
  const vendor = (address: number, next: number, length: number, type: number, offset: number, bytes: number) => {
    const start = at(address);
    list.set([CAP_VENDOR, next, length, type, BAR], start);
    view.setUint32(start + 8, offset, true);
    view.setUint32(start + 12, bytes, true);
  };
  vendor(0x4c, 0x5c, 16, CAP_COMMON, COMMON_AT, COMMON_BYTES);
  vendor(0x5c, 0x70, 20, CAP_NOTIFY, NOTIFY_AT, Math.max(queues, 1) * NOTIFY_BYTES);
  view.setUint32(at(0x5c) + 16, NOTIFY_BYTES, true); // notify_off_multiplier
  vendor(0x70, 0x80, 16, CAP_ISR, ISR_AT, 1);
  vendor(0x80, PCI_CAP_AT, 16, CAP_DEVICE, DEVICE_AT, Math.max(deviceBytes, 4));
  vendor(PCI_CAP_AT, 0, 20, CAP_PCI, 0, 0);
  return list;
}
