/** Puts a kernel and its initramfs into guest memory, and checks the command line. */
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { BootError } from '../../boot/boot-error.js';
import { mib, type PayloadFile, withPayload } from '../../boot/payload-file.js';
import { CMDLINE_MAX } from '../layout.js';
import { loadImage } from './image.js';

export interface Arm64Payload {
  readonly kernel: string;
  readonly initramfs?: string | undefined;
  readonly cmdline: string;
}

export interface LoadedPayload {
  /** Guest physical address of the kernel's first instruction. */
  readonly entry: number;
  readonly initrd: { readonly address: number; readonly size: number } | undefined;
}

const PAGE = 4096;

/** @throws BootError naming the option that is to blame */
export function loadArm64Payload({ kernel, initramfs, cmdline }: Arm64Payload, memory: GuestMemory): LoadedPayload {
  const length = Buffer.byteLength(cmdline);
  if (length >= CMDLINE_MAX) {
    throw new BootError(`--cmdline of ${length} bytes: accepted are at most ${CMDLINE_MAX - 1}`);
  }
  const { entry, end } = withPayload('--kernel', kernel, (file) => loadImage(file, memory));
  const initrd =
    initramfs === undefined
      ? undefined
      : withPayload('--initramfs', initramfs, (file) => loadInitrd(file, memory, end));
  return { entry, initrd };
}

/** At the end of the RAM that the kernel is in: booting.rst wants both within 32 GiB. */
function loadInitrd(file: PayloadFile, memory: GuestMemory, kernelEnd: number): LoadedPayload['initrd'] {
  const { address: start, size: ram } = memory.ranges()[0];
  const address = Math.floor((start + ram - file.size) / PAGE) * PAGE;
  if (address < kernelEnd) {
    const needed = mib(kernelEnd - start + file.size);
    throw file.error(`a file that fits the memory beside the kernel: about ${needed} MiB are needed, see --memory`);
  }
  file.load(0, file.size, memory, address);
  return { address, size: file.size };
}
