/** Taps and vhost-net: what the kernel is asked for, and a real tap where this process may make one. */
import { execFileSync } from 'node:child_process';
import dgram from 'node:dgram';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { describe, expect, test } from '@jest/globals';
import { adoptTap, NET_HEADER_BYTES, NETDEVICE, openTap, tapControl, TapError, TUN } from '../../../src/net/tap.js';
import { VhostNetDevice } from '../../../src/net/vhost-device.js';
import { VHOST, VHOST_DEVICE, VHOST_LOG, vhostFeatures, VhostPair, type VhostQueue } from '../../../src/net/vhost.js';
import { WrittenPages } from '../../../src/memory/written-pages.js';
import { type OpenOptions, SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { IovecArray } from '../../../src/virtio/queue/iovec.js';
import { NetFeature } from '../../../src/virtio/devices/net/description.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

/** Values of C expressions, as the kernel's own headers have them. */
function probe(expressions: readonly string[]): number[] {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-probe-'));
  try {
    const files = ['stddef.h', 'stdio.h', 'sys/ioctl.h', 'sys/socket.h', 'net/if.h', 'net/if_arp.h', 'netinet/in.h'];
    const includes = [...files, 'linux/if_tun.h', 'linux/vhost.h', 'linux/virtio_net.h'].map((f) => `#include <${f}>`);
    const lines = expressions.map((each) => `printf("%llu\\n", (unsigned long long)(${each}));`);
    const source = path.join(folder, 'probe.c');
    fs.writeFileSync(source, `${includes.join('\n')}\nint main(void) {\n${lines.join('\n')}\nreturn 0; }\n`);
    execFileSync('gcc', ['-o', path.join(folder, 'probe'), source]);
    return execFileSync(path.join(folder, 'probe'), { encoding: 'utf8' }).trim().split('\n').map(Number);
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

test("every constant agrees with the kernel's own headers", () => {
  const ours: [string, number][] = [
    ...Object.entries(TUN),
    ...Object.entries(NETDEVICE).map(([name, value]): [string, number] => [
      name === 'IFREQ_BYTES' ? 'sizeof(struct ifreq)' : name,
      value,
    ]),
    ...Object.entries({ ...VHOST, ...VHOST_LOG }).map(([name, value]): [string, number] => [`VHOST_${name}`, value]),
    ['sizeof(struct virtio_net_hdr_v1)', NET_HEADER_BYTES],
  ];
  const theirs = probe(ours.map(([name]) => name));
  expect(ours).toEqual(ours.map(([name], index) => [name, theirs[index]]));
});

interface Call {
  readonly fd: number;
  readonly request: number;
  readonly bytes: Buffer;
}

/** Descriptors and ioctls of a kernel that has tap devices and vhost-net. */
class RecordingKernel extends LinuxKernel {
  readonly calls: Call[] = [];
  readonly opened: string[] = [];
  readonly live = new Set<number>();
  /** The request that is refused, and how many of them go through before. */
  refused?: { readonly request: number; readonly after: number };
  flags = 0;
  /** Of a tap that others made; a macvtap takes others. */
  tapFlags: number = TUN.IFF_TAP | TUN.IFF_NO_PI | TUN.IFF_VNET_HDR;
  macvtap = false;
  /** Of a tap that is there: TUNSETIFF has to say the same. */
  multiQueue?: boolean;
  features: [number, number] = [0xffff_ffff, 0xffff_ffff];
  #next = 1000;

  #make(): number {
    this.live.add(this.#next);
    return this.#next++;
  }

  override open(file: string, options: OpenOptions = {}): number {
    if (!file.startsWith('/dev/')) return super.open(file, options);
    this.opened.push(options.nonblocking === true ? `${file} nonblocking` : file);
    return this.#make();
  }

  override controlSocket(): number {
    return this.#make();
  }

  override close(fd: number): void {
    if (fd < 1000) super.close(fd);
    else if (!this.live.delete(fd)) throw new Error(`${fd} is closed twice`);
  }

  #record(fd: number, request: number, argument: Uint8Array): number {
    if (!this.live.has(fd)) throw new Error(`${fd} is not open`);
    const before = this.calls.filter((call) => call.request === request).length;
    if (request === this.refused?.request && before >= this.refused.after)
      throw new SystemError('EPERM', 1, 'ioctl', 'operation not permitted');
    this.calls.push({ fd, request, bytes: Buffer.from(argument) });
    return 0;
  }

  override ioctl(fd: number, request: number, value = 0): number {
    return this.#record(fd, request, new Uint8Array(Uint32Array.of(value).buffer));
  }

  override ioctlRaw(fd: number, request: number, value: number): number {
    return this.#record(fd, request, new Uint8Array(Uint32Array.of(value).buffer));
  }

  override ioctlBufferRaw(fd: number, request: number, argument: Uint8Array): number {
    try {
      return this.ioctlBuffer(fd, request, argument);
    } catch (error) {
      if (error instanceof SystemError) return -error.errno;
      throw error;
    }
  }

  override ioctlBuffer(fd: number, request: number, argument: Uint8Array): number {
    const words = new DataView(argument.buffer);
    const result = this.#record(fd, request, argument);
    if (request === TUN.TUNGETIFF) words.setUint16(16, this.tapFlags, true);
    if (request === TUN.TUNSETIFF && this.multiQueue !== undefined) {
      const several = (words.getUint16(16, true) & TUN.IFF_MULTI_QUEUE) !== 0;
      if (several !== this.multiQueue) throw new SystemError('EINVAL', 22, 'ioctl', 'invalid argument');
    }
    if (request === TUN.TUNSETIFF && this.macvtap) this.tapFlags = words.getUint16(16, true);
    if (request === TUN.TUNSETIFF && argument[0] === 0) argument.set(Buffer.from('tap7'));
    if (request === NETDEVICE.SIOCGIFFLAGS) argument[16] = this.flags;
    if (request === VHOST.GET_FEATURES) argument.set(new Uint8Array(Uint32Array.from(this.features).buffer));
    return result;
  }

  of(request: number): Buffer[] {
    return this.calls.filter((call) => call.request === request).map(({ bytes }) => bytes);
  }
}

const nameOf = (bytes: Buffer) => bytes.toString('latin1', 0, bytes.indexOf(0));

describe('a tap', () => {
  test('with one pair of queues, named by the kernel', () => {
    const kernel = new RecordingKernel();
    const fds = openTap(kernel, { queuePairs: 1 });
    expect(fds).toEqual([...kernel.live]);
    expect(kernel.opened).toEqual(['/dev/net/tun nonblocking']);
    const [request] = kernel.of(TUN.TUNSETIFF);
    expect(request).toHaveLength(NETDEVICE.IFREQ_BYTES);
    expect(nameOf(request)).toBe('');
    expect(request.readUInt16LE(16)).toBe(TUN.IFF_TAP | TUN.IFF_NO_PI | TUN.IFF_VNET_HDR);
    expect(kernel.of(TUN.TUNSETVNETHDRSZ).map((bytes) => bytes.readInt32LE())).toEqual([12]);
    const [up] = kernel.of(NETDEVICE.SIOCSIFFLAGS);
    expect([nameOf(up), up.readUInt16LE(16)]).toEqual(['tap7', NETDEVICE.IFF_UP]);
    // Nothing that was not asked for.
    const { SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFHWADDR } = NETDEVICE;
    for (const other of [SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFHWADDR]) expect(kernel.of(other)).toEqual([]);
  });

  test('with several pairs: each descriptor is one more queue of the same interface', () => {
    const kernel = new RecordingKernel();
    const fds = openTap(kernel, { queuePairs: 3 });
    expect(fds).toHaveLength(3);
    const requests = kernel.of(TUN.TUNSETIFF);
    expect(requests.map(nameOf)).toEqual(['', 'tap7', 'tap7']);
    for (const request of requests) expect(request.readUInt16LE(16) & TUN.IFF_MULTI_QUEUE).not.toBe(0);
    expect(kernel.calls.filter(({ request }) => request === TUN.TUNSETVNETHDRSZ).map(({ fd }) => fd)).toEqual(fds);
    // But for the first they wait until the driver uses them.
    const queues = kernel.calls.filter(({ request }) => request === TUN.TUNSETQUEUE);
    expect(queues.map(({ fd, bytes }) => [fd, bytes.readUInt16LE(16)])).toEqual(
      fds.map((fd, pair) => [fd, pair === 0 ? TUN.IFF_ATTACH_QUEUE : TUN.IFF_DETACH_QUEUE]),
    );
  });

  test('that was made for several queues is taken for one, but none for one is taken for several', () => {
    const kernel = new RecordingKernel();
    kernel.multiQueue = true;
    expect(openTap(kernel, { name: 'vm0', queuePairs: 1 })).toHaveLength(1);
    kernel.multiQueue = false;
    expect(openTap(kernel, { name: 'vm0', queuePairs: 1 })).toHaveLength(1);
    const { live } = kernel;
    const before = live.size;
    expect(() => openTap(kernel, { name: 'vm0', queuePairs: 2 })).toThrow(
      'Cannot attach to vm0: invalid argument; several queues take a tap that was made with `multi_queue`, or one that is not there yet',
    );
    expect(live.size).toBe(before);
  });

  describe('that another program opened', () => {
    const { IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE } = TUN;
    const good = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    const adopt = (kernel: RecordingKernel, pairs = 1) => {
      for (let pair = 0; pair < pairs; pair++) adoptTap(kernel, kernel.controlSocket(), pair, pairs);
    };

    test.each([
      [
        'no header',
        good & ~IFF_VNET_HDR,
        1,
        'Attached without IFF_VNET_HDR; accepted is a tap whose packets have that header',
      ],
      ['something before it', good & ~IFF_NO_PI, 1, 'Attached without IFF_NO_PI; accepted is a tap with that flag'],
      ['packets of IP', 1 | IFF_NO_PI | IFF_VNET_HDR, 1, 'Attached to a tun device; accepted is a tap'],
      ['one queue', good, 2, 'Attached without IFF_MULTI_QUEUE; accepted is a tap for several queues'],
    ])('with %s is refused', (_name, flags, pairs, message) => {
      const kernel = new RecordingKernel();
      kernel.tapFlags = flags;
      // The kernel says that the descriptor has its interface already.
      kernel.refused = { request: TUN.TUNSETIFF, after: 0 };
      expect(() => adopt(kernel, pairs)).toThrow(new TapError(message));
    });

    test('and is none is refused', () => {
      const kernel = new RecordingKernel();
      kernel.refused = { request: TUN.TUNGETIFF, after: 0 };
      expect(() => adopt(kernel)).toThrow('Not attached to a tap: operation not permitted');
    });

    test('is set up, and all queues but the first wait', () => {
      const kernel = new RecordingKernel();
      kernel.tapFlags = good | IFF_MULTI_QUEUE;
      adopt(kernel, 3);
      expect(kernel.of(TUN.TUNSETIFF)).toEqual([]);
      expect(kernel.of(TUN.TUNSETVNETHDRSZ)).toHaveLength(3);
      expect(kernel.of(NETDEVICE.FIONBIO)).toHaveLength(3);
      expect(kernel.of(TUN.TUNSETQUEUE).map((bytes) => bytes.readUInt16LE(16))).toEqual([
        TUN.IFF_ATTACH_QUEUE,
        TUN.IFF_DETACH_QUEUE,
        TUN.IFF_DETACH_QUEUE,
      ]);
    });

    test('and is a macvtap gets the flags that it lacks', () => {
      const kernel = new RecordingKernel();
      kernel.tapFlags = IFF_TAP | IFF_NO_PI;
      kernel.macvtap = true;
      adopt(kernel, 2);
      expect(kernel.tapFlags).toBe(good | IFF_MULTI_QUEUE);
    });
  });

  test('with addresses, and up already', () => {
    const kernel = new RecordingKernel();
    kernel.flags = NETDEVICE.IFF_UP | 2;
    const hostMac = Uint8Array.of(2, 3, 4, 5, 6, 7);
    openTap(kernel, { name: 'vm0', queuePairs: 1, ip: '192.0.2.1', mask: '255.255.255.128', hostMac, mtu: 9000 });
    const value = (request: number) => kernel.of(request)[0];
    const [family, address] = probe([
      'offsetof(struct sockaddr_in, sin_family)',
      'offsetof(struct sockaddr_in, sin_addr)',
    ]);
    for (const [request, bytes] of [
      [NETDEVICE.SIOCSIFADDR, [192, 0, 2, 1]],
      [NETDEVICE.SIOCSIFNETMASK, [255, 255, 255, 128]],
    ] as const) {
      expect(nameOf(value(request))).toBe('vm0');
      expect(value(request).readUInt16LE(16 + family)).toBe(NETDEVICE.AF_INET);
      expect([...value(request).subarray(16 + address, 20 + address)]).toEqual(bytes);
    }
    expect(value(NETDEVICE.SIOCSIFMTU).readInt32LE(16)).toBe(9000);
    const hardware = value(NETDEVICE.SIOCSIFHWADDR);
    expect(hardware.readUInt16LE(16)).toBe(NETDEVICE.ARPHRD_ETHER);
    expect([...hardware.subarray(18, 24)]).toEqual([...hostMac]);
    expect(kernel.of(NETDEVICE.SIOCSIFFLAGS)).toEqual([]);
  });

  test.each([
    ['attach to vm0', TUN.TUNSETIFF, 0],
    ['attach to vm0', TUN.TUNSETIFF, 1],
    ['set the header size', TUN.TUNSETVNETHDRSZ, 1],
    ['make it non-blocking', NETDEVICE.FIONBIO, 1],
    ['attach and detach queues', TUN.TUNSETQUEUE, 1],
    ['set the address of vm0', NETDEVICE.SIOCSIFADDR, 0],
    ['set the mask of vm0', NETDEVICE.SIOCSIFNETMASK, 0],
    ['set the MTU of vm0', NETDEVICE.SIOCSIFMTU, 0],
    ['set the hardware address of vm0', NETDEVICE.SIOCSIFHWADDR, 0],
    ['read the flags of vm0', NETDEVICE.SIOCGIFFLAGS, 0],
    ['bring up of vm0', NETDEVICE.SIOCSIFFLAGS, 0],
  ])('that the kernel refuses to %s leaves no descriptor', (step, request, after) => {
    const kernel = new RecordingKernel();
    kernel.refused = { request, after };
    const options = { ip: '192.0.2.1', mask: '255.255.255.0', hostMac: new Uint8Array(6), mtu: 1500 };
    const make = () => openTap(kernel, { name: 'vm0', queuePairs: 2, ...options });
    expect(make).toThrow(TapError);
    expect(kernel.live.size).toBe(0);
    kernel.calls.length = 0;
    expect(make).toThrow(new RegExp(`Cannot ${step}(: operation not permitted)?$`));
    expect(kernel.live.size).toBe(0);
  });

  test('its offloads are the number itself', () => {
    const kernel = new RecordingKernel();
    const [fd] = openTap(kernel, { queuePairs: 1 });
    expect(tapControl(kernel).setOffload(fd, TUN.TUN_F_CSUM | TUN.TUN_F_TSO4)).toBe(true);
    expect(kernel.of(TUN.TUNSETOFFLOAD).map((bytes) => bytes.readUInt32LE())).toEqual([3]);
  });
});

const linux = new LinuxKernel();
const NAME = `vmmt${process.pid}`;
const OPTIONS = { name: NAME, queuePairs: 2, ip: '192.0.2.1', mask: '255.255.255.252', mtu: 1400 };

/** Whether this process may make taps here. Making one is the only sure sign. */
function tapsCanBeMade(): boolean {
  try {
    for (const fd of openTap(linux, { name: NAME, queuePairs: 1 })) linux.close(fd);
    return true;
  } catch (error) {
    if (error instanceof TapError) return false;
    throw error;
  }
}

(tapsCanBeMade() ? describe : describe.skip)('a real tap', () => {
  const file = (name: string) => fs.readFileSync(`/sys/class/net/${NAME}/${name}`, 'utf8').trim();

  function withTap(run: (fds: readonly number[]) => void | Promise<void>): Promise<void> {
    const fds = openTap(linux, { ...OPTIONS, hostMac: Uint8Array.of(2, 0, 0, 0, 0, 9) });
    return Promise.resolve(run(fds)).finally(() => {
      for (const fd of fds) linux.close(fd);
    });
  }

  test('is as it was asked for, and goes with its last descriptor', async () => {
    await withTap((fds) => {
      expect(fds).toHaveLength(2);
      expect([file('mtu'), file('address'), Number(file('flags')) & 1]).toEqual(['1400', '02:00:00:00:00:09', 1]);
      const addresses = os.networkInterfaces()[NAME]?.filter(({ family }) => family === 'IPv4');
      expect(addresses).toMatchObject([{ address: '192.0.2.1', netmask: '255.255.255.252' }]);
    });
    expect(fs.existsSync(`/sys/class/net/${NAME}`)).toBe(false);
  });

  test('takes every offload that a guest can negotiate', () =>
    withTap(([fd]) => {
      const { TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO } = TUN;
      const all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO;
      expect(linux.ioctlRaw(fd, TUN.TUNSETOFFLOAD, all)).toBe(0);
      expect(linux.ioctlRaw(fd, TUN.TUNSETOFFLOAD, 0)).toBe(0);
      expect(tapControl(linux).setOffload(fd, TUN_F_CSUM)).toBe(true);
      expect(tapControl(linux).setOffload(fd, 0xffff_ffff)).toBe(false); // no such offloads
    }));

  test('has the queues that take part, and can be told so over and over', () =>
    withTap((fds) => {
      const control = tapControl(linux);
      const queues = () =>
        fs.readdirSync(`/sys/class/net/${NAME}/queues`).filter((each) => each.startsWith('tx')).length;
      expect(queues()).toBe(1);
      for (const attached of [false, true, true, false, false, true]) {
        expect(control.setAttached(fds[1], attached)).toBe(true);
        expect(queues()).toBe(attached ? 2 : 1);
      }
      expect(control.setAttached(0, true)).toBe(false);
    }));

  test('of another program is looked at', () =>
    withTap((fds) => {
      expect(() => adoptTap(linux, fds[0], 0, 1)).not.toThrow();
      expect(() => adoptTap(linux, fds[1], 1, 2)).not.toThrow();
      // One that a machine before has left detached is the only one of this.
      expect(fs.readdirSync(`/sys/class/net/${NAME}/queues`)).toHaveLength(2);
      adoptTap(linux, fds[1], 0, 1);
      expect(fs.readdirSync(`/sys/class/net/${NAME}/queues`)).toHaveLength(4);
      const bare = linux.open('/dev/net/tun');
      expect(() => adoptTap(linux, bare, 0, 1)).toThrow(/^Not attached to a tap: /);
      const request = new Uint8Array(NETDEVICE.IFREQ_BYTES);
      new DataView(request.buffer).setUint16(16, TUN.IFF_TAP | TUN.IFF_NO_PI, true);
      linux.ioctlBuffer(bare, TUN.TUNSETIFF, request);
      expect(() => adoptTap(linux, bare, 0, 1)).toThrow(/^Attached without IFF_VNET_HDR; /);
      linux.close(bare);
      const folder = linux.open('/proc', { readonly: true });
      expect(() => adoptTap(linux, folder, 0, 1)).toThrow(/^Not attached to a tap: /);
      linux.close(folder);
    }));

  test('carries packets behind a header of 12 bytes, both ways, and never blocks', () =>
    withTap(async (fds) => {
      expect(tapControl(linux).setAttached(fds[1], true)).toBe(true);
      const memory = linux.map({ length: 4096, shared: false });
      const vector = new IovecArray(linux, 1);
      vector.set(0, Number(memory.handle.address), 4096);
      const bytes = Buffer.from(memory.view(0, 4096));
      // An Ethernet frame of a protocol that nobody listens for.
      bytes.fill(0xff, NET_HEADER_BYTES, NET_HEADER_BYTES + 6);
      bytes.writeUInt16BE(0x88b5, NET_HEADER_BYTES + 12);
      vector.set(0, Number(memory.handle.address), NET_HEADER_BYTES + 60);
      expect(linux.writevRaw(fds[1], vector.address(0), 1)).toBe(NET_HEADER_BYTES + 60);
      expect(file('statistics/rx_bytes')).toBe('60');

      vector.set(0, Number(memory.handle.address), 4096);
      const socket = dgram.createSocket('udp4');
      await new Promise<void>((resolve) => socket.bind(0, '192.0.2.1', resolve));
      socket.setBroadcast(true);
      await new Promise<void>((resolve) => socket.send('a word for the guest', 9, '192.0.2.3', () => resolve()));
      socket.close();
      const found: string[] = [];
      for (const fd of fds) {
        // The host says other things too, such as that it looks for IPv6 neighbours.
        let count = linux.readvRaw(fd, vector.address(0), 1);
        while (count > 0) {
          if (bytes.readUInt16BE(NET_HEADER_BYTES + 12) === 0x0800)
            found.push(bytes.toString('latin1', NET_HEADER_BYTES + 42, count));
          count = linux.readvRaw(fd, vector.address(0), 1);
        }
        expect(count).toBe(-os.constants.errno.EAGAIN);
      }
      expect(found).toEqual(['a word for the guest']);
      vector.close();
      memory.unmap();
    }));

  test('spreads flows over the queues that take part alone', () =>
    withTap(async (fds) => {
      const FLOWS = 100;
      const memory = linux.map({ length: 4096, shared: false });
      const bytes = Buffer.from(memory.view(0, 4096));
      /** Flows that each queue gets. */
      const spread = async () => {
        for (let flow = 0; flow < FLOWS; flow++) {
          const socket = dgram.createSocket('udp4');
          await new Promise<void>((resolve) => socket.bind(0, '192.0.2.1', resolve));
          socket.setBroadcast(true);
          await new Promise<void>((resolve) => socket.send('a flow', 9, '192.0.2.3', () => resolve()));
          socket.close();
        }
        return fds.map((fd) => {
          let flows = 0;
          for (let count = 1; count > 0;) {
            count = linux.readRaw(fd, Number(memory.handle.address), 4096);
            if (count > 0 && bytes.toString('latin1', 0, count).endsWith('a flow')) flows++;
          }
          return flows;
        });
      };
      expect(await spread()).toEqual([FLOWS, 0]);
      const control = tapControl(linux);
      expect(control.setAttached(fds[1], true)).toBe(true);
      const [first, second] = await spread();
      expect([first + second, first > 0, second > 0]).toEqual([FLOWS, true, true]);
      expect(control.setAttached(fds[1], false)).toBe(true);
      expect(await spread()).toEqual([FLOWS, 0]);
      memory.unmap();
    }));

  test('of one queue cannot be had twice', () => {
    const [fd] = openTap(linux, { name: NAME, queuePairs: 1 });
    expect(() => openTap(linux, { name: NAME, queuePairs: 1 })).toThrow(`Cannot attach to ${NAME}: busy`);
    linux.close(fd);
  });
});

describe('vhost-net', () => {
  const REGIONS = [
    { address: 0, size: 0xc000_0000, hostAddress: 0x7f12_3456_7000 },
    { address: 0x1_0000_0000, size: 0x4000_0000, hostAddress: 0x7f11_0000_0000 },
  ];
  const queue = (base: number): VhostQueue => ({
    size: 256,
    descriptors: 0x7f00_0000_0000 + base,
    available: 0x7f00_0000_1000 + base,
    used: 0x7f00_0000_2000 + base,
    usedAt: 0x2_0000_0000 + base,
    kick: base + 1,
    call: base + 2,
    base: base * 2,
    error: 99,
  });

  test('gets what it needs, in an order that it accepts', () => {
    const kernel = new RecordingKernel();
    kernel.features = [0x3000_8000, 0x1];
    // VIRTIO_F_ACCESS_PLATFORM, which vhost knows, is not passed on: it would ask for a translation of each address.
    kernel.features[1] |= 2;
    const pair = new VhostPair(kernel, 77, [0x1000_8023, 0x7], REGIONS, [queue(0x10), queue(0x20)]);
    expect(kernel.opened).toEqual([VHOST_DEVICE]);
    const order = kernel.calls.map(({ request }) => Object.entries(VHOST).find(([, value]) => value === request)![0]);
    const each = ['VRING_NUM', 'VRING_BASE', 'VRING_ADDR', 'VRING_KICK', 'VRING_CALL', 'VRING_ERR'].map(
      (name) => `SET_${name}`,
    );
    const queues = [...each, 'NET_SET_BACKEND'];
    expect(order).toEqual(['SET_OWNER', 'GET_FEATURES', 'SET_FEATURES', 'SET_MEM_TABLE', ...queues, ...queues]);
    const [features] = kernel.of(VHOST.SET_FEATURES);
    expect([features.readUInt32LE(0), features.readUInt32LE(4)]).toEqual([0x1000_8000, 1]);
    const words = (request: number) => kernel.of(request).map((b) => [b.readUInt32LE(0), b.readUInt32LE(4)]);
    expect(words(VHOST.SET_VRING_NUM)).toEqual([
      [0, 256],
      [1, 256],
    ]);
    expect(words(VHOST.SET_VRING_BASE)).toEqual([
      [0, 0x20],
      [1, 0x40],
    ]);
    expect(words(VHOST.SET_VRING_KICK)).toEqual([
      [0, 0x11],
      [1, 0x21],
    ]);
    expect(words(VHOST.SET_VRING_CALL)).toEqual([
      [0, 0x12],
      [1, 0x22],
    ]);
    expect(words(VHOST.NET_SET_BACKEND)).toEqual([
      [0, 77],
      [1, 77],
    ]);
    pair.close();
    expect(kernel.live.size).toBe(0);
  });

  test('that logs what it writes hears so before the rings have a backend', () => {
    const [flags, log] = probe(['flags', 'log_guest_addr'].map((f) => `offsetof(struct vhost_vring_addr, ${f})`));
    const logged = (at: number | undefined) => {
      const kernel = new RecordingKernel();
      const pair = new VhostPair(kernel, 77, [0x1000_8023, 1], REGIONS, [queue(0x10), queue(0x20)], at);
      pair.close();
      const rings = kernel.of(VHOST.SET_VRING_ADDR);
      return {
        features: kernel.of(VHOST.SET_FEATURES).map((bytes) => [bytes.readUInt32LE(0), bytes.readUInt32LE(4)]),
        base: kernel.of(VHOST.SET_LOG_BASE).map((bytes) => bytes.readBigUInt64LE(0)),
        rings: rings.map((bytes) => [bytes.readUInt32LE(flags), Number(bytes.readBigUInt64LE(log))]),
        order: kernel.calls
          .map(({ request }) => Object.entries(VHOST).find(([, value]) => value === request)![0])
          .filter((name) => ['SET_FEATURES', 'SET_LOG_BASE', 'SET_VRING_ADDR', 'NET_SET_BACKEND'].includes(name)),
      };
    };
    const used = [0x10, 0x20].map((base) => queue(base).usedAt);
    const ring = ['SET_VRING_ADDR', 'NET_SET_BACKEND'];
    expect(logged(0x7fff_1234_5000)).toEqual({
      features: [[0x1400_8023, 1]],
      base: [0x7fff_1234_5000n],
      rings: used.map((address) => [1, address]),
      order: ['SET_FEATURES', 'SET_LOG_BASE', ...ring, ...ring],
    });
    expect(logged(undefined)).toEqual({
      features: [[0x1000_8023, 1]],
      base: [],
      rings: used.map((address) => [0, address]),
      order: ['SET_FEATURES', ...ring, ...ring],
    });
  });

  test("memory and rings are in the kernel's structures", () => {
    const kernel = new RecordingKernel();
    const pair = new VhostPair(kernel, 77, [0, 1], REGIONS, [queue(0x10), queue(0x20)]);
    const [header, region, guest, bytes, host] = probe([
      'offsetof(struct vhost_memory, regions)',
      'sizeof(struct vhost_memory_region)',
      ...['guest_phys_addr', 'memory_size', 'userspace_addr'].map((f) => `offsetof(struct vhost_memory_region, ${f})`),
    ]);
    const [table] = kernel.of(VHOST.SET_MEM_TABLE);
    expect(table).toHaveLength(header + region * REGIONS.length);
    expect(table.readUInt32LE(0)).toBe(REGIONS.length);
    const found = REGIONS.map((_, index) => {
      const value = (offset: number) => Number(table.readBigUInt64LE(header + index * region + offset));
      return { address: value(guest), size: value(bytes), hostAddress: value(host) };
    });
    expect(found).toEqual(REGIONS);
    const [size, ...offsets] = probe([
      'sizeof(struct vhost_vring_addr)',
      ...['index', 'desc_user_addr', 'avail_user_addr', 'used_user_addr'].map(
        (field) => `offsetof(struct vhost_vring_addr, ${field})`,
      ),
    ]);
    kernel.of(VHOST.SET_VRING_ADDR).forEach((address, index) => {
      expect(address).toHaveLength(size);
      expect(address.readUInt32LE(offsets[0])).toBe(index);
      const { descriptors, available, used } = queue(0x10 * (index + 1));
      const places = offsets.slice(1).map((offset) => Number(address.readBigUInt64LE(offset)));
      expect(places).toEqual([descriptors, available, used]);
    });
    pair.close();
  });

  const requests = Object.entries(VHOST);
  test.each(requests)('that refuses %s leaves no descriptor', (_name, request) => {
    const kernel = new RecordingKernel();
    kernel.refused = { request, after: 0 };
    expect(() => new VhostPair(kernel, 77, [0, 1], REGIONS, [queue(0), queue(8)], 0x1000)).toThrow(SystemError);
    expect(kernel.live.size).toBe(0);
  });

  test('says which features it knows', () => {
    const kernel = new RecordingKernel();
    kernel.features = [0x8000_0000, 3];
    expect(vhostFeatures(kernel)).toEqual([0x8000_0000, 3]);
    expect(kernel.live.size).toBe(0);
  });

  describe('as a device', () => {
    const MQ = [0, NetFeature.ctrlVq, NetFeature.multiQueue];

    function device(kernel: RecordingKernel, indices: readonly number[], features: readonly number[] = MQ) {
      const guest = new TestGuest();
      const context = testContext(kernel);
      const queues = indices.map((index) => new TestQueue(guest, index));
      const taps = [kernel.controlSocket(), kernel.controlSocket()];
      const control = tapControl(kernel);
      const net = new VhostNetDevice(context, { taps, control, calls: [10, 11, 12, 13] });
      net.activate(testDriver(guest, queues, features));
      const close = () => {
        net.close();
        context.loop.close();
        guest.close();
      };
      const [error] = kernel.of(VHOST.SET_VRING_ERR).map((bytes) => bytes.readUInt32LE(4));
      return { net, context, taps, queues, guest, close, error };
    }

    test('tells the kernel of memory that has come, and no more of what has gone', () => {
      const kernel = new RecordingKernel();
      const { net, guest, queues, close } = device(kernel, [0, 1]);
      const more = { address: 2 ** 40, buffer: new SharedArrayBuffer(2 ** 16), hostAddress: 0x7f00_0000_0000 };
      const driver = testDriver(guest, queues, MQ);
      // As the worker has it: nothing is under way while memory comes and goes.
      const change = (what: () => void) => {
        net.deactivate();
        what();
        net.activate(driver);
      };
      change(() => guest.memory.add(more));
      change(() => guest.memory.remove(more.address));
      // struct vhost_memory: a count, then regions of 32 bytes that begin with the guest's address.
      const known = kernel.of(VHOST.SET_MEM_TABLE).map((table) => {
        const addresses = Array.from({ length: table.readUInt32LE(0) }, (_, index) =>
          Number(table.readBigUInt64LE(8 + index * 32)),
        );
        return [addresses.includes(0), addresses.includes(more.address)];
      });
      expect(known).toEqual([
        [true, false],
        [true, true],
        [true, false],
      ]);
      close();
    });

    test('has the kernel mark what it writes while that is asked for, where the kernel can', () => {
      const kernel = new RecordingKernel();
      const { net, guest, queues, context, close } = device(kernel, [0, 1]);
      const pages = WrittenPages.create(kernel, guest.memory.mappings());
      // As the worker has it: the device stands still meanwhile.
      const change = (to: WrittenPages | undefined) => {
        net.deactivate();
        try {
          net.trackWrites(to);
        } finally {
          net.activate(testDriver(guest, queues, MQ));
        }
      };
      const bases = () => kernel.of(VHOST.SET_LOG_BASE).map((bytes) => bytes.readBigUInt64LE(0));
      change(pages);
      expect(bases()).toEqual([pages.handle.mapping.address]);
      change(undefined);
      expect(bases()).toHaveLength(1);
      kernel.features[0] = 0xfbff_ffff;
      expect(() => change(pages)).toThrow("the host's kernel (vhost-net) keeps no log of what it writes");
      expect([bases().length, context.resets]).toEqual([1, []]);
      // Served all the same.
      expect(kernel.of(VHOST.NET_SET_BACKEND)).toHaveLength(8);
      close();
      pages.close();
    });

    test('serves the pairs whose queues are there, until it is reset', () => {
      const kernel = new RecordingKernel();
      const { net, taps, context, close } = device(kernel, [2, 3, 4]);
      expect(kernel.opened).toEqual([VHOST_DEVICE]);
      expect(kernel.of(VHOST.NET_SET_BACKEND).map((bytes) => bytes.readUInt32LE(4))).toEqual([taps[1], taps[1]]);
      expect(kernel.of(VHOST.SET_VRING_CALL).map((bytes) => bytes.readUInt32LE(4))).toEqual([12, 13]);
      net.deactivate();
      expect([...kernel.live]).toEqual(taps);
      expect(context.resets).toEqual([]);
      close();
    });

    test('asks for a reset when the kernel refuses its queues', () => {
      const kernel = new RecordingKernel();
      kernel.refused = { request: VHOST.NET_SET_BACKEND, after: 2 };
      const { context, taps, close } = device(kernel, [0, 1, 2, 3, 4]);
      expect(context.resets).toHaveLength(1);
      close();
      expect([...kernel.live]).toEqual(taps);
    });

    test('has a ring that the kernel cannot follow: the driver is asked for a reset', () => {
      const kernel = new RecordingKernel();
      const { net, context, taps, queues, guest, error, close } = device(kernel, [0, 1, 2, 3, 4]);
      expect(kernel.live.size).toBe(4);
      kernel.signal(error);
      context.loop.turn(0);
      expect(context.resets).toEqual(["the host's kernel (vhost-net) cannot follow a ring"]);
      expect([...kernel.live]).toEqual(taps);
      expect(context.loop.turn(0)).toBe(false);
      // And goes on after it.
      net.deactivate();
      net.activate(testDriver(guest, queues, MQ));
      expect(kernel.live.size).toBe(4);
      close();
    });

    const command = (n: ReturnType<typeof device>, index: number, bytes: readonly number[]) => {
      const at = n.guest.alloc(16);
      n.guest.memory.write(at, Uint8Array.from([...bytes, 0xff]));
      const queue = n.queues.find((each) => each.queue.index === index)!;
      queue.add([
        { address: at, length: bytes.length, write: false },
        { address: at + bytes.length, length: 1, write: true },
      ]);
      return () => {
        expect(queue.used()).toMatchObject({ length: 1 });
        return n.guest.memory.u8(at + bytes.length);
      };
    };

    test('serves its control queue itself, and attaches what the driver uses', () => {
      const kernel = new RecordingKernel();
      const n = device(kernel, [0, 1, 2, 3, 4]);
      const answer = command(n, 4, [4, 0, 2, 0]);
      for (const each of n.queues) n.net.kick(each.queue);
      expect(answer()).toBe(0);
      const queues = () => {
        const calls = kernel.calls.filter(({ request }) => request === TUN.TUNSETQUEUE);
        return calls.map(({ fd, bytes }) => [fd, bytes.readUInt16LE(16)]);
      };
      expect(queues()).toEqual([[n.taps[1], TUN.IFF_ATTACH_QUEUE]]);
      n.net.deactivate();
      expect(queues().slice(1)).toEqual([[n.taps[1], TUN.IFF_DETACH_QUEUE]]);
      n.close();
    });

    test('without VIRTIO_NET_F_MQ has its control queue behind the first pair, and hears its doorbell', () => {
      const kernel = new RecordingKernel();
      const doorbell = kernel.eventfd();
      const guest = new TestGuest();
      const context = testContext(kernel);
      const queues = [0, 1, 2].map((index) => new TestQueue(guest, index));
      const driver = testDriver(guest, queues, [NetFeature.ctrlVq, NetFeature.guestCsum, NetFeature.ctrlGuestOffloads]);
      const control = driver.queues[2]!;
      Object.assign(control.place, { kick: doorbell });
      const taps = [kernel.controlSocket(), kernel.controlSocket()];
      const net = new VhostNetDevice(context, {
        taps,
        control: tapControl(kernel),
        calls: [10, 11, 12, 13],
      });
      net.activate(driver);
      expect(kernel.of(VHOST.NET_SET_BACKEND).map((bytes) => bytes.readUInt32LE(4))).toEqual([taps[0], taps[0]]);
      const answer = command(
        { net, context, taps, queues, guest, error: 0, close: () => undefined },
        2,
        [5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
      );
      kernel.signal(doorbell);
      context.loop.turn(0);
      expect(answer()).toBe(0);
      expect(kernel.of(TUN.TUNSETQUEUE)).toEqual([]);
      net.close();
      kernel.signal(doorbell);
      expect(context.loop.turn(0)).toBe(false);
      context.loop.close();
      guest.close();
    });
  });
});
