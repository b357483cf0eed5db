/** vhost-net: the host's kernel moves packets between a tap and a guest's queues by itself (linux/vhost.h). */
import type { MemoryRange } from '../memory/guest-memory.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { Feature, featureWords } from '../virtio/device.js';

export const VHOST = {
  GET_FEATURES: 0x8008af00,
  SET_FEATURES: 0x4008af00,
  SET_OWNER: 0xaf01,
  SET_MEM_TABLE: 0x4008af03,
  SET_LOG_BASE: 0x4008af04,
  SET_VRING_NUM: 0x4008af10,
  SET_VRING_ADDR: 0x4028af11,
  SET_VRING_BASE: 0x4008af12,
  SET_VRING_KICK: 0x4008af20,
  SET_VRING_CALL: 0x4008af21,
  SET_VRING_ERR: 0x4008af22,
  NET_SET_BACKEND: 0x4008af30,
} as const;

/** Bits: of the features, that what is written is marked in the log; of a ring's flags, that its own used ring is. */
export const VHOST_LOG = { F_LOG_ALL: 26, VRING_F_LOG: 0 } as const;

export const VHOST_DEVICE = '/dev/vhost-net';
const REGION_BYTES = 32;

/** A queue that the kernel is to serve. Addresses are the host's. */
export interface VhostQueue {
  readonly size: number;
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  /** The guest's address of `used`. */
  readonly usedAt: number;
  readonly kick: number;
  readonly call: number;
  /** The next entry of the available ring. */
  readonly base: number;
  /** Signalled when the kernel finds the ring beyond repair. */
  readonly error: number;
}

/** A stretch of guest memory that the host has in one piece. */
export interface VhostRegion extends MemoryRange {
  readonly hostAddress: number;
}

/** Feature words that the host's vhost-net knows. @throws SystemError when there is none */
export function vhostFeatures(kernel: HostKernel): [number, number] {
  const fd = kernel.open(VHOST_DEVICE);
  try {
    const words = new Uint32Array(2);
    kernel.ioctlBuffer(fd, VHOST.GET_FEATURES, new Uint8Array(words.buffer));
    return [words[0], words[1]];
  } finally {
    kernel.close(fd);
  }
}

/**
 * The driver's addresses are guest physical, also where it was told to ask the platform for them: were vhost told of
 * VIRTIO_F_ACCESS_PLATFORM, it would ask for a translation of each and move nothing.
 */
const NOT_FOR_VHOST = featureWords([Feature.accessPlatform]);
const LOG_ALL = featureWords([VHOST_LOG.F_LOG_ALL]);

/** One pair of queues on one tap. */
export class VhostPair {
  readonly #fd: number;

  /**
   * @param log where it marks the pages that it writes, in the host; all regions have bits there
   * @throws SystemError
   */
  constructor(
    private readonly kernel: HostKernel,
    tap: number,
    features: readonly [number, number],
    regions: readonly VhostRegion[],
    queues: readonly VhostQueue[],
    log?: number,
  ) {
    this.#fd = kernel.open(VHOST_DEVICE);
    try {
      kernel.ioctl(this.#fd, VHOST.SET_OWNER);
      // Of the device's own features, which are the tap's business, vhost takes only those that concern it.
      const known = new Uint32Array(2);
      this.#call(VHOST.GET_FEATURES, known);
      const wanted = features.map(
        (word, index) => (word & ~NOT_FOR_VHOST[index]) | (log === undefined ? 0 : LOG_ALL[index]),
      );
      this.#call(
        VHOST.SET_FEATURES,
        known.map((word, index) => word & wanted[index]),
      );
      const table = new Uint8Array(8 + regions.length * REGION_BYTES);
      const view = new DataView(table.buffer);
      view.setUint32(0, regions.length, true);
      regions.forEach(({ address, size, hostAddress }, index) => {
        const at = 8 + index * REGION_BYTES;
        view.setBigUint64(at, BigInt(address), true);
        view.setBigUint64(at + 8, BigInt(size), true);
        view.setBigUint64(at + 16, BigInt(hostAddress), true);
      });
      kernel.ioctlBuffer(this.#fd, VHOST.SET_MEM_TABLE, table);
      // Before the rings have a backend, which looks whether they can be logged.
      if (log !== undefined) this.#call(VHOST.SET_LOG_BASE, Uint32Array.of(log % 2 ** 32, log / 2 ** 32));
      queues.forEach(({ size, descriptors, available, used, usedAt, kick, call, error, base }, index) => {
        this.#call(VHOST.SET_VRING_NUM, Uint32Array.of(index, size));
        this.#call(VHOST.SET_VRING_BASE, Uint32Array.of(index, base));
        // struct vhost_vring_addr: index, flags, descriptors, used, available, the used ring's address in the log.
        const address = new DataView(new ArrayBuffer(40));
        address.setUint32(0, index, true);
        address.setUint32(4, log === undefined ? 0 : 1 << VHOST_LOG.VRING_F_LOG, true);
        [descriptors, used, available, usedAt].forEach((place, field) =>
          address.setBigUint64(8 + field * 8, BigInt(place), true),
        );
        kernel.ioctlBuffer(this.#fd, VHOST.SET_VRING_ADDR, new Uint8Array(address.buffer));
        this.#call(VHOST.SET_VRING_KICK, Uint32Array.of(index, kick));
        this.#call(VHOST.SET_VRING_CALL, Uint32Array.of(index, call));
        this.#call(VHOST.SET_VRING_ERR, Uint32Array.of(index, error));
        this.#call(VHOST.NET_SET_BACKEND, Uint32Array.of(index, tap));
      });
    } catch (error) {
      kernel.close(this.#fd);
      throw error;
    }
  }

  #call(request: number, words: Uint32Array): void {
    // The words are the structure, read or written in place.
    this.kernel.ioctlBuffer(this.#fd, request, new Uint8Array(words.buffer));
  }

  /** The kernel lets go of queues and guest memory: closing waits for what is in flight. */
  close(): void {
    this.kernel.close(this.#fd);
  }
}
