/** Tap devices: made or adopted, and set up as the host's end of a guest's network (linux/if_tun.h, netdevice(7)). */
import { type HostKernel, SystemError } from '../sys/host-kernel.js';
import type { TapControl } from '../virtio/devices/net/control.js';

export const TUN = {
  TUNSETIFF: 0x400454ca,
  TUNSETOFFLOAD: 0x400454d0,
  TUNGETIFF: 0x800454d2,
  TUNSETVNETHDRSZ: 0x400454d8,
  TUNSETQUEUE: 0x400454d9,
  IFF_TAP: 0x0002,
  IFF_MULTI_QUEUE: 0x0100,
  IFF_ATTACH_QUEUE: 0x0200,
  IFF_DETACH_QUEUE: 0x0400,
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
const EINVAL = 22;
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
      name = attach(kernel, fd, name, options.queuePairs > 1);
      prepareTap(kernel, fd, pair);
    }
    configure(kernel, name, options);
    return fds;
  } catch (error) {
    for (const fd of fds) kernel.close(fd);
    throw error;
  }
}

/** @returns the name of the interface */
function attach(kernel: HostKernel, fd: number, name: string, several: boolean): string {
  const flags = TUN.IFF_TAP | TUN.IFF_NO_PI | TUN.IFF_VNET_HDR;
  const request = interfaceRequest(name);
  const set = (more: number) => {
    request.setUint16(NAME_BYTES, flags | more, true);
    control(kernel, fd, TUN.TUNSETIFF, request);
  };
  const step = `attach to ${name === '' ? 'a new tap' : name}`;
  try {
    set(several ? TUN.IFF_MULTI_QUEUE : 0);
  } catch (error) {
    if (!(error instanceof SystemError)) throw error;
    // A tap that is there has one queue, or is for several: the kernel wants to hear which.
    if (error.code !== 'EINVAL') throw refused(step, error);
    if (several) {
      throw refused(
        step,
        error,
        'several queues take a tap that was made with `multi_queue`, or one that is not there yet',
      );
    }
    attempt(step, () => set(TUN.IFF_MULTI_QUEUE));
  }
  return requestName(request);
}

/**
 * Makes a descriptor that another program opened fit: one queue of a tap whose packets have headers, and nothing before them.
 *
 * @param pair which of the network's pairs it is for
 * @param pairs how many there are
 * @throws TapError
 */
export function adoptTap(kernel: HostKernel, fd: number, pair: number, pairs: number): void {
  const request = interfaceRequest('');
  const read = () => {
    control(kernel, fd, TUN.TUNGETIFF, request);
    return request.getUint16(NAME_BYTES, true);
  };
  const several = pairs > 1 ? TUN.IFF_MULTI_QUEUE : 0;
  const wanted = TUN.IFF_NO_PI | TUN.IFF_VNET_HDR | several;
  let flags: number;
  try {
    flags = read();
    if ((flags & TUN.IFF_TAP) !== 0 && (flags & wanted) !== wanted) {
      // A macvtap takes other flags at any time, a tap never does.
      request.setUint16(NAME_BYTES, TUN.IFF_TAP | wanted, true);
      kernel.ioctlBufferRaw(fd, TUN.TUNSETIFF, new Uint8Array(request.buffer));
      flags = read();
    }
  } catch (error) {
    if (error instanceof SystemError) throw new TapError(`Not attached to a tap: ${error.reason}`, { cause: error });
    throw error;
  }
  const accepted = 'accepted is a tap';
  if ((flags & TUN.IFF_TAP) === 0) throw new TapError(`Attached to a tun device; ${accepted}`);
  if ((flags & TUN.IFF_VNET_HDR) === 0) {
    throw new TapError(`Attached without IFF_VNET_HDR; ${accepted} whose packets have that header`);
  }
  if ((flags & TUN.IFF_NO_PI) === 0) throw new TapError(`Attached without IFF_NO_PI; ${accepted} with that flag`);
  if ((flags & several) !== several) {
    throw new TapError(`Attached without IFF_MULTI_QUEUE; ${accepted} for several queues`);
  }
  prepareTap(kernel, fd, pair);
}

/**
 * The header that each packet has, and no waiting. A queue takes part when the driver uses it: the first always, others when
 * it says so.
 *
 * @throws TapError
 */
function prepareTap(kernel: HostKernel, fd: number, pair: number): void {
  const size = new DataView(new ArrayBuffer(4));
  size.setInt32(0, NET_HEADER_BYTES, true);
  attempt('set the header size', () => control(kernel, fd, TUN.TUNSETVNETHDRSZ, size));
  // Whoever hands a descriptor down may have opened it to block, as shells do: a worker would hang in its first read.
  const yes = new DataView(Int32Array.of(1).buffer);
  attempt('make it non-blocking', () => control(kernel, fd, NETDEVICE.FIONBIO, yes));
  // Whoever used a descriptor before may have left it detached.
  if (!setAttached(kernel, fd, pair === 0)) throw new TapError('Cannot attach and detach queues');
}

/** @returns the name of the interface that a tap's descriptor is attached to; undefined: none any more */
export function tapName(kernel: HostKernel, fd: number): string | undefined {
  const request = interfaceRequest('');
  const result = kernel.ioctlBufferRaw(fd, TUN.TUNGETIFF, new Uint8Array(request.buffer));
  return result < 0 ? undefined : requestName(request);
}

/** What the control queue of a network changes: never throws. */
export function tapControl(kernel: HostKernel): TapControl {
  return {
    // A tap without offloads does the work itself.
    setOffload: (fd, bits) => kernel.ioctlRaw(fd, TUN.TUNSETOFFLOAD, bits) >= 0,
    setAttached: (fd, attached) => setAttached(kernel, fd, attached),
  };
}

function setAttached(kernel: HostKernel, fd: number, attached: boolean): boolean {
  const request = interfaceRequest('');
  request.setUint16(NAME_BYTES, attached ? TUN.IFF_ATTACH_QUEUE : TUN.IFF_DETACH_QUEUE, true);
  const result = kernel.ioctlBufferRaw(fd, TUN.TUNSETQUEUE, new Uint8Array(request.buffer));
  // It is so already.
  return result >= 0 || result === -EINVAL;
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
    throw error instanceof SystemError ? refused(step, error) : error;
  }
}

function refused(step: string, error: SystemError, hint?: string): TapError {
  const message = `Cannot ${step}: ${error.reason}`;
  return new TapError(hint === undefined ? message : `${message}; ${hint}`, { cause: error });
}
