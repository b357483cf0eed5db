/** sendmsg(2) on a Unix socket: bytes, and descriptors of this process with them (SCM_RIGHTS). */
import { koffi } from './koffi.js';

/** struct cmsghdr: length, level, type; the data is behind it. */
const CMSG_BYTES = 16;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
/** A peer that is gone is an error of the call, not a signal. */
const MSG_NOSIGNAL = 0x4000;

function load() {
  const iovec = koffi.struct({ base: 'const void *', length: 'size_t' });
  const header = koffi.struct({
    ...{ name: 'void *', nameLength: 'uint32' },
    ...{ iovecs: koffi.pointer(iovec), iovecCount: 'size_t' },
    ...{ control: 'void *', controlLength: 'size_t', flags: 'int' },
  });
  return koffi.load('libc.so.6').func('sendmsg', 'long', ['int', koffi.pointer(header), 'int']);
}

let sendmsg: ReturnType<typeof load> | undefined;

/** @returns how many bytes went; the negated errno: none, and no descriptors */
export function sendMessage(fd: number, bytes: Uint8Array, descriptors: readonly number[]): number {
  sendmsg ??= load();
  const length = CMSG_BYTES + 4 * descriptors.length;
  const control = Buffer.alloc(Math.ceil(length / 8) * 8);
  control.writeBigUInt64LE(BigInt(length), 0);
  control.writeInt32LE(SOL_SOCKET, 8);
  control.writeInt32LE(SCM_RIGHTS, 12);
  descriptors.forEach((each, index) => control.writeInt32LE(each, CMSG_BYTES + 4 * index));
  const rights = descriptors.length > 0;
  const header = {
    ...{ name: null, nameLength: 0, iovecs: [{ base: bytes, length: bytes.length }], iovecCount: 1 },
    ...{ control: rights ? control : null, controlLength: rights ? control.length : 0, flags: 0 },
  };
  // SAFETY: koffi lays out the header and its iovec for the length of the call, and pins the two buffers, whose lengths are given.
  const sent = sendmsg(fd, header, MSG_NOSIGNAL) as number;
  return sent < 0 ? -koffi.errno() : sent;
}
