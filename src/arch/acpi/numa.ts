/** NUMA in ACPI: the SRAT, which says what belongs to which node, and the SLIT, which says how far nodes are from each other. */
import { type NumaNode, nodeDistance } from '../numa.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { sealTable } from './tables.js';

const ENABLED = 1 << 0;
const HOT_PLUGGABLE = 1 << 1;

/** A structure of the SRAT: type, length and what `fill` writes. */
export function affinity(type: number, size: number, fill: (view: DataView) => void): Uint8Array {
  const bytes = new Uint8Array(size);
  bytes[0] = type;
  bytes[1] = size;
  fill(new DataView(bytes.buffer));
  return bytes;
}

/** 5.2.16.2. */
function memoryAffinity(node: number, { address, size }: MemoryRange, flags: number): Uint8Array {
  return affinity(1, 40, (view) => {
    view.setUint32(2, node, true);
    view.setBigUint64(8, BigInt(address), true);
    view.setBigUint64(16, BigInt(size), true);
    view.setUint32(28, ENABLED | flags, true);
  });
}

/** 5.2.16.6, with a handle of a PCI function (table 5.66): segment, bus, slot and function. */
function initiatorAffinity(node: number, { segment, slot }: NonNullable<NumaNode['device']>): Uint8Array {
  const PCI_HANDLE = 1;
  return affinity(5, 32, (view) => {
    view.setUint8(3, PCI_HANDLE);
    view.setUint32(4, node, true);
    view.setUint16(8, segment, true);
    view.setUint8(11, slot << 3);
    view.setUint32(24, ENABLED, true);
  });
}

/**
 * 5.2.16.
 *
 * @param processor a vCPU's structure, which is of its architecture
 */
export function buildSrat(
  nodes: readonly NumaNode[],
  processor: (node: number, vcpu: number) => Uint8Array,
): Uint8Array {
  // A number that has to be 1, and eight bytes that are reserved.
  const head = new Uint8Array(12);
  head[0] = 1;
  const structures = nodes.flatMap(({ id, vcpus, ram, hotplug, device }) => [
    ...ram.map((range) => memoryAffinity(id, range, 0)),
    ...hotplug.map((range) => memoryAffinity(id, range, HOT_PLUGGABLE)),
    ...vcpus.map((vcpu) => processor(id, vcpu)),
    ...(device === undefined ? [] : [initiatorAffinity(id, device)]),
  ]);
  return sealTable('SRAT', 3, Buffer.concat([head, ...structures]));
}

/** 5.2.17: a row and a column for each number up to the highest, whether or not there is such a node. */
export function buildSlit(nodes: readonly NumaNode[]): Uint8Array {
  const count = Math.max(...nodes.map(({ id }) => id)) + 1;
  const body = new Uint8Array(8 + count * count);
  new DataView(body.buffer).setBigUint64(0, BigInt(count), true);
  for (let from = 0; from < count; from++) {
    for (let to = 0; to < count; to++) body[8 + from * count + to] = nodeDistance(nodes, from, to);
  }
  return sealTable('SLIT', 1, body);
}
