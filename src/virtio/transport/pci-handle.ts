/** A virtio function behind PCI as main hands it to the threads that serve it, and the features that it offers. */
import { Feature, featureWords, type VirtioDescription } from '../device.js';

/** What a thread needs to build its view of a device. Structured-cloneable. */
export interface VirtioPciHandle {
  readonly id: string;
  readonly segment: number;
  readonly slot: number;
  readonly description: VirtioDescription;
  /** Feature words offered, those of the transport included. */
  readonly offered: readonly [number, number];
  readonly state: SharedArrayBuffer;
  /** An eventfd for each queue. */
  readonly doorbells: readonly number[];
  /** Wake-up events of the workers that serve its queues. */
  readonly workers: readonly number[];
  readonly wideBar: boolean;
  /** What the interrupt line register says at power-on: the input that pin A is wired to. */
  readonly interruptLine: number;
  /** For queues whose interrupts the host's kernel raises. */
  readonly kernelInterrupts: readonly KernelInterrupt[];
}

/** An event of the host's kernel that raises a queue's vector, through a route of the hypervisor. */
export interface KernelInterrupt {
  readonly queue: number;
  readonly route: number;
  readonly eventfd: number;
}

/**
 * Feature words that the transport offers along with a device's own.
 *
 * @param limit what those who serve the queues elsewhere can do; none: everything
 */
export function offeredFeatures(
  description: VirtioDescription,
  accessPlatform: boolean,
  limit?: readonly [number, number],
): [number, number] {
  const { indirect, eventIndex, version1, packed } = Feature;
  const all = [indirect, eventIndex, version1, packed, ...(accessPlatform ? [Feature.accessPlatform] : [])];
  const [low, high] = featureWords([...description.features, ...all]);
  if (limit === undefined) return [low, high];
  const transport = featureWords([...all]);
  // Of the transport's features only those of the limit; the device's own are not its business.
  return [low & (~transport[0] | limit[0]), high & (~transport[1] | limit[1])];
}

export function requester({ segment, slot }: VirtioPciHandle): number {
  return (segment << 16) | (slot << 3);
}
