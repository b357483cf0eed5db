/**
 * Guest memory as main hands it to the threads that use it. Nothing of the configuration is needed here: what a thread imports, it
 * loads at each of its starts.
 */
import { GuestMemory, type MemoryKind, type MemoryRange, type MemorySource } from '../../memory/guest-memory.js';
import type { HostKernel, HostMapping, MappingHandle } from '../../sys/host-kernel.js';

/** A stretch of guest memory as another thread finds it. Structured-cloneable. */
export interface MemoryPart {
  readonly range: MemoryRange;
  readonly mapping: MappingHandle;
  /** Blocks that the guest plugs are RAM to all threads; only memory maps, which main makes, do not list them. */
  kind: MemoryKind;
}
export type MemoryHandle = readonly MemoryPart[];

/** Guest memory on a thread that did not allocate it. */
export function attachMemory(handle: MemoryHandle, kernel: HostKernel): GuestMemory {
  return new GuestMemory(handle.map((part) => attachPart(part, kernel)));
}

/** A stretch of it that came later. */
export function attachPart({ range, mapping, kind }: MemoryPart, kernel: HostKernel): MemorySource {
  return source(range, kernel.attach(mapping), kind);
}

export function source(range: MemoryRange, mapping: HostMapping, kind: MemoryKind): MemorySource {
  const hostAddress = Number(mapping.handle.address);
  return { ...range, hostAddress, kind, view: (offset, length) => mapping.view(offset, length) };
}
