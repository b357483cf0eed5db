/**
 * The configuration of the paravirtual devices. Names and defaults are those of the REST API; what crosses devices (the
 * same id twice, a PCI segment that does not exist) is checked with the whole machine in vm-config.ts.
 */
import * as z from 'zod/mini';
import { defaulted, deviceName, flag, optional, required, text, wholeNumber } from './fields.js';

/** Slots of a PCI segment; slot 0 of segment 0 is the host bridge's. */
export const PCI_SLOTS = 32;
export const MAX_PCI_SEGMENTS = 16;
/** Each has 31 devices, as slot 0 stays free in all of them. */
const MAX_QUEUES = 256;
/** Virtio 1.3, 2.6. */
const MAX_QUEUE_SIZE = 32768;
/** 5.2.6.1: the identity string. */
const MAX_SERIAL = 20;
/** The largest context id is any; 0 to 2 are the hypervisor's and the host's (5.10.4). */
const MIN_CID = 3;
const MAX_CID = 0xffff_fffe;
/** RFC 8200: the least that IPv6 works with. */
const MIN_MTU = 1280;
const MAX_MTU = 65535;

const path = text(/^[^\0]+$/, 'a path');

/** struct sockaddr_un, without the NUL. Node cuts off what is longer. */
export const MAX_SOCKET_PATH = 107;
export const socketPath = path.check(
  z.refine((name) => Buffer.byteLength(name) <= MAX_SOCKET_PATH, { error: `a path of up to ${MAX_SOCKET_PATH} bytes` }),
);

/** What every PCI device may be given. */
const pciFields = {
  id: optional('Name of the device', deviceName),
  pci_segment: defaulted('PCI segment', wholeNumber(0, MAX_PCI_SEGMENTS - 1, 'a PCI segment'), 0),
  pci_device_id: optional('Slot on its segment, default the next free', wholeNumber(0, PCI_SLOTS - 1, 'a slot')),
  iommu: defaulted('Offer the guest to translate the addresses of the device', flag, false),
};

const queueSize = (fallback: number) =>
  defaulted(
    'Descriptors of each queue',
    wholeNumber(4, MAX_QUEUE_SIZE, 'a power of two').check(
      z.refine((value) => (value & (value - 1)) === 0, { error: `a power of two from 4 to ${MAX_QUEUE_SIZE}` }),
    ),
    fallback,
  );

const count = z.int({ error: 'a whole number' }).check(z.gte(0, { error: 'a whole number' }));
const bucket = z.strictObject({ size: count, one_time_burst: z.optional(count), refill_time: count });

const rateLimiter = z.optional(z.strictObject({ bandwidth: z.optional(bucket), ops: z.optional(bucket) }));

type RateLimiter = z.infer<typeof rateLimiter>;

/** Whether it limits something: a bucket without a size or a time does not. */
function limits(config: RateLimiter): boolean {
  return [config?.bandwidth, config?.ops].some((one) => one !== undefined && one.size > 0 && one.refill_time > 0);
}

export const rateLimitGroupSchema = z
  .strictObject({ id: required('Name, by which disks find it', deviceName), rate_limiter_config: rateLimiter })
  .check(({ value, issues }) => {
    if (limits(value.rate_limiter_config)) return;
    const message = 'a group with a limit of bytes or of operations: a size and a refill time, neither of them 0';
    issues.push({ code: 'custom', input: value, path: [], message });
  });

const cpuList = z
  .array(wholeNumber(0, 8191, 'host CPUs'))
  .check(z.minLength(1, { error: 'at least one host CPU for each queue' }));
const queueAffinity = optional(
  'Gives a queue a thread of its own, bound to these host CPUs',
  z.array(z.strictObject({ queue_index: wholeNumber(0, MAX_QUEUES - 1, 'a queue'), host_cpus: cpuList })),
);

/** What is wrong with a device's `queue_affinity`, if anything. */
function affinityProblem(affinity: z.infer<typeof queueAffinity>, queues: number): string | undefined {
  const bound = new Set<number>();
  for (const { queue_index: queue } of affinity ?? []) {
    if (queue >= queues) return `a queue from 0 to ${queues - 1}`;
    if (bound.has(queue)) return `each queue once (${queue} is repeated)`;
    bound.add(queue);
  }
  return undefined;
}

export const IMAGE_TYPES = ['raw', 'qcow2'] as const;

export const diskSchema = z
  .strictObject({
    path: required('File or block device with the image', path),
    readonly: defaulted('The guest cannot write', flag, false),
    direct: defaulted('Bypass the page cache of the host', flag, false),
    num_queues: defaulted('Queues', wholeNumber(1, MAX_QUEUES), 1),
    queue_size: queueSize(128),
    serial: optional(
      'Serial number',
      z
        .string({ error: 'text' })
        .check(
          z.refine((name) => Buffer.byteLength(name) <= MAX_SERIAL, { error: `text of up to ${MAX_SERIAL} bytes` }),
        ),
    ),
    rate_limiter_config: rateLimiter,
    rate_limit_group: optional('Limit that it shares with other disks', deviceName),
    queue_affinity: queueAffinity,
    backing_files: defaulted('Allow an image that names another one behind it', flag, false),
    sparse: defaulted('Give discarded space back to the host', flag, true),
    image_type: optional(
      'Format, default what the file looks like',
      z.enum(IMAGE_TYPES, { error: `one of ${IMAGE_TYPES.join(', ')}` }),
    ),
    _disable_io_uring: z._default(flag, false),
    _disable_aio: z._default(flag, false),
    ...pciFields,
  })
  .check(({ value, issues }) => {
    const refuse = (field: string, message: string): void => {
      issues.push({ code: 'custom', input: value, path: [field], message });
    };
    const affinity = affinityProblem(value.queue_affinity, value.num_queues);
    if (affinity !== undefined) refuse('queue_affinity', affinity);
    if (value.rate_limit_group !== undefined && value.rate_limiter_config !== undefined) {
      refuse('rate_limit_group', 'a group only for a disk without a limit of its own');
    }
  });

export const macAddress = text(
  /^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$/,
  'a unicast address such as 12:34:56:78:9a:bc',
  (value) => (parseInt(value.slice(0, 2), 16) & 1) === 0 && /[1-9a-f]/i.test(value),
);
const addressError = 'an IPv4 address of a host such as 192.168.249.1';
const address = z.ipv4({ error: addressError }).check(
  z.refine(
    (value) => {
      // RFC 1122, 3.2.1.3: 0 is "this network"; from 224 on they are groups, reserved, or everybody.
      const first = parseInt(value);
      return first > 0 && first < 224;
    },
    { error: addressError },
  ),
);
const maskError = 'a network mask such as 255.255.255.0';
const mask = z.ipv4({ error: maskError }).check(
  z.refine(
    (value) => {
      const hostBits = ~value.split('.').reduce((bits, part) => (bits << 8) | Number(part), 0);
      return (hostBits & (hostBits + 1)) === 0;
    },
    { error: maskError },
  ),
);
/** dev_valid_name() of Linux: 15 bytes, not all dots, no slash, colon or blank. */
const tap = text(
  /^(?!\.{1,2}$)[^\0/:\s]{1,15}$/,
  'the name of a tap, up to 15 characters',
  (name) => Buffer.byteLength(name) <= 15,
);

export const netSchema = z
  .strictObject({
    tap: optional('Tap, made when it is not there; default a new one that the host names', tap),
    ip: optional('Address of the host end', address),
    mask: optional('Network mask of the host end', mask),
    mac: optional('Address of the guest, default a random one', macAddress),
    host_mac: optional('Hardware address of the host end', macAddress),
    mtu: optional('Largest packet of the guest', wholeNumber(MIN_MTU, MAX_MTU)),
    fds: optional(
      'Open tap descriptors, one for each pair of queues',
      z
        .array(wholeNumber(3, 65535, 'open descriptors'))
        .check(z.minLength(1, { error: 'at least one open descriptor' })),
    ),
    num_queues: defaulted('Queues, receiving and sending ones together', wholeNumber(2, MAX_QUEUES), 2),
    queue_size: queueSize(256),
    vhost: defaulted("Leave the data path to the host's kernel (vhost-net)", flag, false),
    offload_tso: defaulted('Segmentation offload (TCP)', flag, true),
    offload_ufo: defaulted('Segmentation offload (UDP)', flag, true),
    offload_csum: defaulted('Checksum offload', flag, true),
    rate_limiter_config: rateLimiter,
    queue_affinity: queueAffinity,
    ...pciFields,
  })
  .check(({ value, issues }) => {
    const refuse = (field: string, message: string): void => {
      issues.push({ code: 'custom', input: value, path: [field], message });
    };
    if (value.num_queues % 2 !== 0) refuse('num_queues', 'an even number');
    if (value.ip === undefined && value.mask !== undefined) refuse('mask', 'a mask only with ip=');
    if (value.ip !== undefined && value.mask === undefined) refuse('ip', 'an address only with mask=');
    if (!value.offload_csum && value.offload_tso) refuse('offload_tso', 'off with offload_csum=off');
    if (!value.offload_csum && value.offload_ufo) refuse('offload_ufo', 'off with offload_csum=off');
    if (value.fds !== undefined && value.fds.length * 2 !== value.num_queues) {
      refuse('fds', `${value.num_queues / 2} descriptors for num_queues=${value.num_queues}`);
    }
    const twice = value.fds?.find((fd, index, fds) => fds.indexOf(fd) !== index);
    if (twice !== undefined) refuse('fds', `each descriptor once (${twice} is repeated)`);
    const affinity = affinityProblem(value.queue_affinity, value.num_queues);
    if (affinity !== undefined) refuse('queue_affinity', affinity);
    if (value.fds !== undefined && value.tap !== undefined) refuse('tap', 'a tap only without fd=');
    if (value.vhost && value.rate_limiter_config !== undefined) refuse('vhost', 'off with a rate limit');
    if (value.vhost && value.queue_affinity !== undefined) refuse('vhost', 'off with queue_affinity=');
  });

export const rngSchema = z.strictObject({
  src: defaulted('File or character device that the random bytes come from', path, '/dev/urandom'),
  ...pciFields,
});

export const balloonSchema = z.strictObject({
  size: defaulted('Memory that the guest is to give back at first', count, 0),
  deflate_on_oom: defaulted('The guest may take it when it runs out of memory', flag, false),
  free_page_reporting: defaulted('The guest tells which pages it does not use', flag, false),
  ...pciFields,
});

/** Pages of guest memory that a mapping of a file takes together. Bytes. */
export const PMEM_ALIGNMENT = 2 * 2 ** 20;
const pmemSizeError = 'a multiple of 2M';

export const pmemSchema = z.strictObject({
  file: required('File or block device with the contents', path),
  size: optional(
    'Size, default that of the file',
    z
      .int({ error: pmemSizeError })
      .check(z.gte(PMEM_ALIGNMENT, { error: pmemSizeError }), z.multipleOf(PMEM_ALIGNMENT, { error: pmemSizeError })),
  ),
  discard_writes: defaulted('What the guest writes is not kept', flag, false),
  ...pciFields,
});

export const deviceModuleSchema = z.strictObject({
  path: required('ES module that describes the device and makes it', path),
  config: optional('Text that the module is given', z.string({ error: 'text' })),
  ...pciFields,
});

export const vsockSchema = z.strictObject({
  cid: required('Context id of the guest', wholeNumber(MIN_CID, MAX_CID, 'a context id')),
  socket: required('Unix socket through which host programs connect', socketPath),
  ...pciFields,
});

const CHARACTER_MODES = ['Off', 'Null', 'Tty', 'Pty', 'File', 'Socket'] as const;

/** Where the serial port or the console leads. */
export const characterSchema = z
  .strictObject({
    mode: z.enum(CHARACTER_MODES, { error: `one of ${CHARACTER_MODES.join(', ')}` }),
    file: z.optional(path),
    socket: z.optional(socketPath),
  })
  .check(({ value, issues }) => {
    for (const [field, mode] of [['file', 'File'] as const, ['socket', 'Socket'] as const]) {
      const wanted = value.mode === mode;
      if (wanted === (value[field] !== undefined)) continue;
      const message = wanted ? 'a path' : `a path only with mode ${mode}`;
      issues.push({ code: 'custom', input: value, path: [field], message });
    }
  });

export const platformSchema = z.strictObject({
  num_pci_segments: defaulted('PCI segments', wholeNumber(1, MAX_PCI_SEGMENTS), 1),
});

export type DiskConfig = z.infer<typeof diskSchema>;
export type NetConfig = z.infer<typeof netSchema>;
export type PmemConfig = z.infer<typeof pmemSchema>;
export type VsockConfig = z.infer<typeof vsockSchema>;
export type DeviceModuleConfig = z.infer<typeof deviceModuleSchema>;

/** Names and places of a device, which every kind has. */
export interface PciPlacement {
  readonly id?: string | undefined;
  readonly pci_segment: number;
  readonly pci_device_id?: number | undefined;
}
