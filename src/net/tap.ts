/** Tap devices: made or adopted, and set up as the host's end of a guest's network (linux/if_tun.h, netdevice(7)). */
import { type HostKernel, SystemError } from '../sys/host-kernel.js';

export const TUN = {
  TUNSETIFF: 0x400454ca,
  TUNSETOFFLOAD: 0x400454d0,
  TUNSETVNETHDRSZ: 0x400454d8,
  IFF_TAP: 0x0002,
  IFF_MULTI_QUEUE: 0x0100,
  IFF_NO_PI: 0x1000,
  IFF_VNET_HDR: 0x4000,
  TUN_F_CSUM: 0x01,
  TUN_F_TSO4: 0x02,
  TUN_F_TSO6: 0x04,
  TUN_F_TSO_ECN: 0x08,
  TUN_F_UFO: 0x10,
} as const;

export const NETDEVICE = {
  FIONBIO: 0x5421,
  SIOCGIFFLAGS: 0x8913,
  SIOCSIFFLAGS: 0x8914,
  SIOCSIFADDR: 0x8916,
  SIOCSIFNETMASK: 0x891c,
  SIOCSIFMTU: 0x8922,
  SIOCSIFHWADDR: 0x8924,
  IFF_UP: 1,
  ARPHRD_ETHER: 1,
  AF_INET: 2,
  IFREQ_BYTES: 40,
} as const;

const NAME_BYTES = 16;
/** struct virtio_net_hdr_v1, which stands before each packet. */
export const NET_HEADER_BYTES = 12;

export interface TapOptions {
  /** None: the host names it. */
  readonly name?: string | undefined;
  readonly queuePairs: number;
  readonly ip?: string | undefined;
  readonly mask?: string | undefined;
  readonly hostMac?: Uint8Array | undefined;
  readonly mtu?: number | undefined;
}

/** The tap cannot be had. The message names the step that failed. */
export class TapError extends Error {
  readonly code = 'TAP';
}

/**
 * Opens a tap, making it when it is not there, and brings it up. What was made goes away with its last descriptor.
 *
 * @returns a non-blocking descriptor for each pair of queues
 * @throws TapError
 */
export function openTap(kernel: HostKernel, options: TapOptions): number[] {
  const fds: number[] = [];
  try {
    let name = options.name ?? '';
    for (let pair = 0; pair < options.queuePairs; pair++) {
      const fd = attempt('open /dev/net/tun', () => kernel.open('/dev/net/tun', { nonblocking: true }));
      fds.push(fd);
      const request = interfaceRequest(name);
      const several = options.queuePairs > 1 ? TUN.IFF_MULTI_QUEUE : 0;
      request.setUint16(NAME_BYTES, TUN.IFF_TAP | TUN.IFF_NO_PI | TUN.IFF_VNET_HDR | several, true);
      attempt(`attach to ${name === '' ? 'a new tap' : name}`, () => control(kernel, fd, TUN.TUNSETIFF, request));
      name = requestName(request);
      prepareTap(kernel, fd);
    }
    configure(kernel, name, options);
    return fds;
  } catch (error) {
    for (const fd of fds) kernel.close(fd);
    throw error;
  }
}

/** The header that each packet has, and no waiting, on an opened or adopted descriptor. @throws TapError */
export function prepareTap(kernel: HostKernel, fd: number): void {
  const size = new DataView(new ArrayBuffer(4));
  size.setInt32(0, NET_HEADER_BYTES, true);
  attempt('set the header size', () => control(kernel, fd, TUN.TUNSETVNETHDRSZ, size));
  // Whoever hands a descriptor down may have opened it to block, as shells do: a worker would hang in its first read.
  const yes = new DataView(Int32Array.of(1).buffer);
  attempt('make it non-blocking', () => control(kernel, fd, NETDEVICE.FIONBIO, yes));
}

/** Which offloads the reader of a tap can take, as TUN_F_ bits. Never throws: a tap without them does the work itself. */
export function setOffload(kernel: HostKernel, fd: number, bits: number): void {
  kernel.ioctlRaw(fd, TUN.TUNSETOFFLOAD, bits);
}

function configure(kernel: HostKernel, name: string, { ip, mask, hostMac, mtu }: TapOptions): void {
  const socket = kernel.controlSocket();
  const set = (step: string, code: number, fill: (request: DataView) => void) => {
    const request = interfaceRequest(name);
    fill(request);
    attempt(`${step} of ${name}`, () => control(kernel, socket, code, request));
    return request;
  };
  try {
    if (hostMac !== undefined) {
      set('set the hardware address', NETDEVICE.SIOCSIFHWADDR, (request) => {
        request.setUint16(NAME_BYTES, NETDEVICE.ARPHRD_ETHER, true);
        hostMac.forEach((byte, index) => request.setUint8(NAME_BYTES + 2 + index, byte));
      });
    }
    if (mtu !== undefined)
      set('set the MTU', NETDEVICE.SIOCSIFMTU, (request) => request.setInt32(NAME_BYTES, mtu, true));
    if (ip !== undefined) set('set the address', NETDEVICE.SIOCSIFADDR, (request) => writeAddress(request, ip));
    if (mask !== undefined) set('set the mask', NETDEVICE.SIOCSIFNETMASK, (request) => writeAddress(request, mask));
    const flags = set('read the flags', NETDEVICE.SIOCGIFFLAGS, () => undefined).getUint16(NAME_BYTES, true);
    if ((flags & NETDEVICE.IFF_UP) === 0) {
      set('bring up', NETDEVICE.SIOCSIFFLAGS, (request) =>
        request.setUint16(NAME_BYTES, flags | NETDEVICE.IFF_UP, true),
      );
    }
  } finally {
    kernel.close(socket);
  }
}

/** struct ifreq: a name, and a union of 24 bytes. */
function interfaceRequest(name: string): DataView {
  const request = new Uint8Array(NETDEVICE.IFREQ_BYTES);
  request.set(Buffer.from(name).subarray(0, NAME_BYTES - 1));
  return new DataView(request.buffer);
}

function requestName(request: DataView): string {
  const bytes = new Uint8Array(request.buffer, 0, NAME_BYTES);
  return Buffer.from(bytes.subarray(0, bytes.indexOf(0))).toString();
}

/** struct sockaddr_in: family, port, address. */
function writeAddress(request: DataView, address: string): void {
  request.setUint16(NAME_BYTES, NETDEVICE.AF_INET, true);
  address.split('.').forEach((part, index) => request.setUint8(NAME_BYTES + 4 + index, Number(part)));
}

function control(kernel: HostKernel, fd: number, code: number, argument: DataView): void {
  kernel.ioctlBuffer(fd, code, new Uint8Array(argument.buffer));
}

function attempt<T>(step: string, call: () => T): T {
  try {
    return call();
  } catch (error) {
    if (error instanceof SystemError) throw new TapError(`Cannot ${step}: ${error.reason}`, { cause: error });
    throw error;
  }
}
