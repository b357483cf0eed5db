/** The guest's NUMA nodes as firmware tables tell them. */
import type { MemoryRange } from '../memory/guest-memory.js';

export interface NumaNode {
  /** ACPI's proximity domain. */
  readonly id: number;
  readonly vcpus: readonly number[];
  /** RAM that is there from the start, ascending. */
  readonly ram: readonly MemoryRange[];
  /** Where memory may be plugged. */
  readonly hotplug: readonly MemoryRange[];
  /** PCI segments. */
  readonly segments: readonly number[];
  /** To other nodes, by their numbers; those left out are as far as they say themselves, or REMOTE_DISTANCE. */
  readonly distances: ReadonlyMap<number, number>;
  /** The PCI function that is the node's instead of vCPUs and memory. */
  readonly device?: { readonly segment: number; readonly slot: number } | undefined;
}

/** ACPI 6.5, 5.2.17: of a node to itself; and what is usual to another one. */
const LOCAL_DISTANCE = 10;
const REMOTE_DISTANCE = 20;

/** @param nodes all that there are, which may have neither of the two */
export function nodeDistance(nodes: readonly NumaNode[], from: number, to: number): number {
  if (from === to) return LOCAL_DISTANCE;
  const told = (a: number, b: number) => nodes.find(({ id }) => id === a)?.distances.get(b);
  return told(from, to) ?? told(to, from) ?? REMOTE_DISTANCE;
}

/** The node that something is of; undefined: the machine has none. What no node names is of the first. */
export function nodeOf(nodes: readonly NumaNode[], what: 'vcpus' | 'segments', number: number): number | undefined {
  if (nodes.length === 0) return undefined;
  return nodes.find((node) => node[what].includes(number))?.id ?? nodes[0].id;
}
