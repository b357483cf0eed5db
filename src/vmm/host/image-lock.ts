/**
 * Locks of files that hold disks, in QEMU's way (its block/file-posix.c), so that its tools, QEMU and this program see each other's.
 *
 * There is a byte for each permission that somebody has and one for each that nobody else may have; whoever means it holds a
 * read lock on the byte. So nothing excludes anything by itself: each looks at what the others have said.
 */
import type { HostKernel } from '../../sys/host-kernel.js';

/** Offsets of the first of those bytes. The file need not be as long. */
const HAD = 100;
const DENIED = 200;
/** Of QEMU's permissions: consistent read, write, resize. */
const READ = 0;
const WRITE = 1;
const RESIZE = 3;

/**
 * One that reads has other readers beside it and no writer; one that writes has nobody.
 *
 * @param fd the locks last until its open file is closed
 * @returns false when somebody else has what excludes that
 * @throws SystemError where the file system has no locks
 */
export function lockImage(kernel: HostKernel, fd: number, writes: boolean): boolean {
  const had = writes ? [READ, WRITE, RESIZE] : [READ];
  const denied = writes ? had : [WRITE, RESIZE];
  const own = [...had.map((permission) => HAD + permission), ...denied.map((permission) => DENIED + permission)];
  const others = [...had.map((permission) => DENIED + permission), ...denied.map((permission) => HAD + permission)];
  // In this order: of two that come at once one may be refused for the other, or both, but never none.
  return (
    own.every((byte) => kernel.lockFile(fd, false, byte, 1)) && !others.some((byte) => kernel.isLocked(fd, byte, 1))
  );
}

/** Others may do as they like with the file from now on. */
export function unlockImage(kernel: HostKernel, fd: number): void {
  for (const first of [HAD, DENIED]) kernel.unlockFile(fd, first, RESIZE + 1);
}
