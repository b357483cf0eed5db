/** What main tells an I/O worker about the devices that it serves. Everything here can be cloned to another thread. */
import type { EngineName } from '../../block/engines/io-engine.js';
import type { HypervisorName, VmHandle } from '../../hypervisor/hypervisor.js';
import type { WrittenPagesHandle } from '../../memory/written-pages.js';
import type { IntxHandle } from '../../pci/intx.js';
import type { DeviceSetup } from '../../virtio/device-module.js';
import type { VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import type { LimiterOptions } from '../../virtio/rate-limiter.js';
import type { LeftOut } from '../log/guest-log.js';
import type { MemoryHandle, MemoryPart } from '../memory/memory-part.js';

/** A limit that devices share. */
export interface LimitGroup {
  readonly limits: LimiterOptions;
  /** What its members share: `groupState`. */
  readonly state: SharedArrayBuffer;
}

export type BackendSpec =
  | {
      readonly kind: 'block';
      readonly path: string;
      readonly format: 'raw' | 'qcow2';
      /** Nobody gave the format: it is what the file looks like. */
      readonly probed: boolean;
      /** Descriptors that main opened, and holds the locks of, by path. */
      readonly files: ReadonlyMap<string, number>;
      readonly buffered: number | undefined;
      readonly readonly: boolean;
      readonly direct: boolean;
      readonly backingFiles: boolean;
      readonly sparse: boolean;
      readonly serial: string;
      /** The best that this host seems to have. */
      readonly engine: EngineName;
      readonly limits?: LimiterOptions | undefined;
      readonly group?: LimitGroup | undefined;
    }
  | { readonly kind: 'net'; readonly taps: readonly number[]; readonly limits?: LimiterOptions | undefined }
  | { readonly kind: 'vhost-net'; readonly taps: readonly number[]; readonly calls: readonly number[] }
  | { readonly kind: 'console'; readonly pipe: SharedArrayBuffer; readonly wake: number }
  | { readonly kind: 'entropy'; readonly source: number }
  /** A bit for each block; whether its pages are to be there before the guest has it. */
  | { readonly kind: 'mem'; readonly plugged: SharedArrayBuffer; readonly populate: boolean }
  | { readonly kind: 'balloon' }
  | { readonly kind: 'vsock'; readonly cid: number; readonly socket: string; readonly listener: number }
  | { readonly kind: 'pmem'; readonly fd: number | undefined }
  | { readonly kind: 'watchdog' }
  /** A user's own. */
  | { readonly kind: 'module'; readonly file: string; readonly setup: DeviceSetup };

export interface ServedDevice {
  readonly handle: VirtioPciHandle;
  /** Indices of the queues that the worker serves. */
  readonly queues: readonly number[];
  readonly backend: BackendSpec;
}

/** What an I/O worker is started with. */
export interface IoWorkerData {
  /** Of the thread. */
  readonly name: string;
  readonly hypervisor: HypervisorName;
  readonly vm: VmHandle;
  readonly memory: MemoryHandle;
  readonly intx: IntxHandle;
  /** Signalled when there is something to look at. */
  readonly wake: number;
  /** Word 0: {@link IoOrder}. */
  readonly command: SharedArrayBuffer;
  readonly devices: readonly ServedDevice[];
  readonly affinity?: readonly number[] | undefined;
  /** Users' modules, which it loads before it serves anything. */
  readonly modules: readonly string[];
}

/** What IoManager adds. */
export interface IoWorkerStart extends IoWorkerData {
  /** Words of {@link Mail}. */
  readonly mail: SharedArrayBuffer;
  /** Where it marks what it writes to guest memory. */
  readonly written: WrittenPagesHandle | undefined;
}

/** Words that count a worker's messages of devices to main: those that main has not read; whether the worker waits for room. */
export const Mail = { inFlight: 0, waiting: 1, words: 2 } as const;
/** Messages on their way at most. */
export const IN_FLIGHT_LIMIT = 64;

/** From main to a worker, beside `wake`. All but `control` are answered, in their order. */
export type IoCommand =
  | { readonly kind: 'control'; readonly device: string; readonly message: unknown }
  | { readonly kind: 'serve'; readonly device: ServedDevice }
  /** What is in flight is finished first. */
  | { readonly kind: 'drop'; readonly device: string }
  /** Files behind its devices are to hold all that their drivers have written; while it is held. */
  | { readonly kind: 'sync' }
  | { readonly kind: 'add-memory'; readonly part: MemoryPart }
  | { readonly kind: 'remove-memory'; readonly part: MemoryPart }
  /** What the host has behind it is another thing now. */
  | { readonly kind: 'memory-kind'; readonly part: MemoryPart }
  /** What it writes to guest memory from now on is to be marked there; undefined: nowhere. */
  | { readonly kind: 'track-writes'; readonly pages: WrittenPagesHandle | undefined };

/** Bits of the word `command`; those above them count commands, so that a worker that is held sees that one has come. */
export const IoOrder = { stop: 1, hold: 2, count: 4 } as const;

/** From a worker to main. */
export type IoMessage =
  | {
      readonly kind: 'log';
      readonly level: 'info' | 'warn';
      readonly line: string;
      readonly leftOut?: LeftOut | undefined;
    }
  | { readonly kind: 'device'; readonly device: string; readonly message: unknown }
  /** The oldest command that has none has been carried out, or why not. */
  | { readonly kind: 'answer'; readonly failure: string | undefined }
  /** It serves nothing until it is let go. @param word the command word that says so */
  | { readonly kind: 'held'; readonly word: number }
  /** What the guest has written may not be where it belongs. */
  | { readonly kind: 'close-failed'; readonly device: string; readonly reason: string };
