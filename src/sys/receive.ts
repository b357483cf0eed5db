/** recvmsg(2) of a Unix socket: bytes, and the descriptors that were sent with them, which no stream of Node.js hands on. */
import type { HostMapping, Received } from './host-kernel.js';
import { koffi } from './koffi.js';

/** At a time. Bytes. */
const DATA_BYTES = 64 * 1024;
/** Descriptors of one message (SCM_MAX_FD), and what a listener of another program may have asked for besides. Bytes. */
const CONTROL_BYTES = 2048;
/** struct msghdr: the pointers to iovecs and control messages, the latter's length, and the flags. */
const HEADER = { size: 56, iovecs: 16, iovecCount: 24, control: 32, controlLength: 40, flags: 48 };
const IOVEC_BYTES = 16;
/** struct cmsghdr: length, level, type; the data is behind it. Messages begin at multiples of 8. */
const CMSG = { size: 16, level: 8, type: 12 };
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
/** A descriptor of the sender's process, for a listener with SO_PASSPIDFD. */
const SCM_PIDFD = 4;
const MSG_CTRUNC = 0x8;
const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x4000_0000;
export const RECEIVER_BYTES = DATA_BYTES + CONTROL_BYTES + HEADER.size + IOVEC_BYTES;

export class MessageReceiver {
  readonly #recvmsg = koffi.load('libc.so.6').func('long recvmsg(int fd, uintptr_t message, int flags)');
  readonly #data: Uint8Array;
  readonly #control: DataView;
  readonly #header: DataView;
  readonly #headerAddress: number;

  /** @param memory of RECEIVER_BYTES, for this object alone */
  constructor(memory: HostMapping) {
    const base = Number(memory.handle.address);
    const control = DATA_BYTES;
    const header = control + CONTROL_BYTES;
    const iovec = header + HEADER.size;
    const view = memory.view(0, RECEIVER_BYTES);
    this.#data = new Uint8Array(view, 0, DATA_BYTES);
    this.#control = new DataView(view, control, CONTROL_BYTES);
    this.#header = new DataView(view, header, HEADER.size);
    this.#headerAddress = base + header;
    this.#header.setBigUint64(HEADER.iovecs, BigInt(base + iovec), true);
    this.#header.setBigUint64(HEADER.iovecCount, 1n, true);
    this.#header.setBigUint64(HEADER.control, BigInt(base + control), true);
    const vector = new DataView(view, iovec, IOVEC_BYTES);
    vector.setBigUint64(0, BigInt(base), true);
    vector.setBigUint64(8, BigInt(DATA_BYTES), true);
  }

  /** Never throws. @param close for descriptors that nobody has asked for */
  receive(fd: number, close: (fd: number) => void): Received {
    this.#header.setBigUint64(HEADER.controlLength, BigInt(CONTROL_BYTES), true);
    // SAFETY: the header, and all that it points to, lies in this object's own mapping, which lives as long as the process.
    const length = this.#recvmsg(fd, this.#headerAddress, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) as number;
    if (length < 0) return { bytes: undefined, errno: koffi.errno() };
    const descriptors: number[] = [];
    const end = Number(this.#header.getBigUint64(HEADER.controlLength, true));
    for (let at = 0; at + CMSG.size <= end;) {
      const size = Number(this.#control.getBigUint64(at, true));
      const type = this.#control.getInt32(at + CMSG.type, true);
      const holds = this.#control.getInt32(at + CMSG.level, true) === SOL_SOCKET;
      for (let item = at + CMSG.size; holds && item + 4 <= at + size; item += 4) {
        if (type === SCM_RIGHTS) descriptors.push(this.#control.getInt32(item, true));
        else if (type === SCM_PIDFD) close(this.#control.getInt32(item, true));
      }
      at += Math.max(Math.ceil(size / 8) * 8, CMSG.size);
    }
    const cut = (this.#header.getInt32(HEADER.flags, true) & MSG_CTRUNC) !== 0;
    return { bytes: Buffer.from(this.#data.subarray(0, length)), descriptors, cut };
  }
}
