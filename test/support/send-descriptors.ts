/** Sends bytes and descriptors as clients of the API do: by sendmsg(2) with SCM_RIGHTS. */
import koffi from 'koffi';

const libc = koffi.load('libc.so.6');
koffi.struct('iovec', { base: 'void *', length: 'size_t' });
koffi.struct('msghdr', {
  name: 'void *',
  nameLength: 'uint32',
  iovecs: 'iovec *',
  count: 'size_t',
  control: 'void *',
  controlLength: 'size_t',
  flags: 'int',
});
const sendmsg = libc.func('long sendmsg(int fd, const msghdr *message, int flags)');

/** @throws Error when the kernel does not take all of it at once */
export function sendDescriptors(fd: number, bytes: Uint8Array | string, descriptors: readonly number[]): void {
  const data = Buffer.from(bytes);
  const length = 16 + 4 * descriptors.length;
  const control = Buffer.alloc(Math.ceil(length / 8) * 8);
  control.writeBigUInt64LE(BigInt(length), 0);
  // SOL_SOCKET, SCM_RIGHTS
  control.writeInt32LE(1, 8);
  control.writeInt32LE(1, 12);
  descriptors.forEach((each, index) => control.writeInt32LE(each, 16 + 4 * index));
  const sent = sendmsg(
    fd,
    {
      name: null,
      nameLength: 0,
      iovecs: [{ base: data, length: data.length }],
      count: 1,
      control: descriptors.length === 0 ? null : control,
      controlLength: descriptors.length === 0 ? 0 : control.length,
      flags: 0,
    },
    0x4000, // MSG_NOSIGNAL
  ) as number;
  if (sent !== data.length) throw new Error(`sendmsg: ${sent} of ${data.length} bytes, errno ${koffi.errno()}`);
}
