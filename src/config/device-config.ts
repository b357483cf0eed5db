/**
 * The configuration of the paravirtual devices. Names and defaults are those of the REST API; what crosses devices (the
 * same id twice, a PCI segment that does not exist) is checked with the whole machine in vm-config.ts.
 */
import * as z from 'zod';

// A process checks one configuration: to compile a function for each schema first takes longer than that.
z.config({ jitless: true });

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

function wholeNumber(min: number, max: number, what = 'a number'): z.ZodInt {
  const error = `${what} from ${min} to ${max}`;
  return z.int({ error }).min(min, { error }).max(max, { error });
}

const path = z.string({ error: 'a path' }).regex(/^[^\0]+$/, { error: 'a path' });

/** struct sockaddr_un, without the NUL. Node cuts off what is longer. */
export const MAX_SOCKET_PATH = 107;
export const socketPath = path.refine((text) => Buffer.byteLength(text) <= MAX_SOCKET_PATH, {
  error: `a path of up to ${MAX_SOCKET_PATH} bytes`,
});

const idError = 'a name that does not start with __, up to 64 letters, digits, and - _ . :';
const id = z.string({ error: idError }).regex(/^(?!__)[\w.:-]{1,64}$/, { error: idError });

/** What every PCI device may be given. */
const pciFields = {
  id: id.optional().describe('Name of the device'),
  pci_segment: wholeNumber(0, MAX_PCI_SEGMENTS - 1, 'a PCI segment')
    .default(0)
    .describe('PCI segment'),
  pci_device_id: wholeNumber(0, PCI_SLOTS - 1, 'a slot')
    .optional()
    .describe('Slot on its segment, default the next free'),
  iommu: z.boolean().default(false).describe('Offer the guest to translate the addresses of the device'),
};

const queueSize = (fallback: number) =>
  wholeNumber(4, MAX_QUEUE_SIZE, 'a power of two')
    .refine((value) => (value & (value - 1)) === 0, { error: `a power of two from 4 to ${MAX_QUEUE_SIZE}` })
    .default(fallback)
    .describe('Descriptors of each queue');

const count = z.int({ error: 'a whole number' }).min(0, { error: 'a whole number' });
const bucket = z.strictObject({ size: count, one_time_burst: count.optional(), refill_time: count });

const rateLimiter = z.strictObject({ bandwidth: bucket.optional(), ops: bucket.optional() }).optional();

const cpuList = z.array(wholeNumber(0, 8191, 'host CPUs')).min(1, { error: 'at least one host CPU for each queue' });
const queueAffinity = z
  .array(z.strictObject({ queue_index: wholeNumber(0, MAX_QUEUES - 1, 'a queue'), host_cpus: cpuList }))
  .optional()
  .describe('Gives a queue a thread of its own, bound to these host CPUs');

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
    path: path.describe('File or block device with the image'),
    readonly: z.boolean().default(false).describe('The guest cannot write'),
    direct: z.boolean().default(false).describe('Bypass the page cache of the host'),
    num_queues: wholeNumber(1, MAX_QUEUES).default(1).describe('Queues'),
    queue_size: queueSize(128),
    serial: z
      .string({ error: 'text' })
      .refine((text) => Buffer.byteLength(text) <= MAX_SERIAL, { error: `text of up to ${MAX_SERIAL} bytes` })
      .optional()
      .describe('Serial number'),
    rate_limiter_config: rateLimiter,
    queue_affinity: queueAffinity,
    backing_files: z.boolean().default(false).describe('Allow an image that names another one behind it'),
    sparse: z.boolean().default(true).describe('Give discarded space back to the host'),
    image_type: z
      .enum(IMAGE_TYPES, { error: `one of ${IMAGE_TYPES.join(', ')}` })
      .optional()
      .describe('Format, default what the file looks like'),
    _disable_io_uring: z.boolean().default(false),
    _disable_aio: z.boolean().default(false),
    ...pciFields,
  })
  .check(({ value, issues }) => {
    const message = affinityProblem(value.queue_affinity, value.num_queues);
    if (message !== undefined) issues.push({ code: 'custom', input: value, path: ['queue_affinity'], message });
  });

const MAC = /^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i;
const macError = 'a unicast address such as 12:34:56:78:9a:bc';
const mac = z
  .string({ error: macError })
  .regex(MAC, { error: macError })
  .refine((text) => (parseInt(text.slice(0, 2), 16) & 1) === 0 && /[1-9a-f]/i.test(text), { error: macError });
const addressError = 'an IPv4 address of a host such as 192.168.249.1';
const address = z.ipv4({ error: addressError }).refine(
  (text) => {
    // RFC 1122, 3.2.1.3: 0 is "this network"; from 224 on they are groups, reserved, or everybody.
    const first = parseInt(text);
    return first > 0 && first < 224;
  },
  { error: addressError },
);
const maskError = 'a network mask such as 255.255.255.0';
const mask = z.ipv4({ error: maskError }).refine(
  (text) => {
    const hostBits = ~text.split('.').reduce((bits, part) => (bits << 8) | Number(part), 0);
    return (hostBits & (hostBits + 1)) === 0;
  },
  { error: maskError },
);
/** dev_valid_name() of Linux: 15 bytes, not all dots, no slash, colon or blank. */
const tapError = 'the name of a tap, up to 15 characters';
const TAP = /^(?!\.{1,2}$)[^\0/:\s]{1,15}$/;

export const netSchema = z
  .strictObject({
    tap: z
      .string({ error: tapError })
      .regex(TAP, { error: tapError })
      .refine((text) => Buffer.byteLength(text) <= 15, { error: tapError })
      .optional()
      .describe('Tap, made when it is not there; default a new one that the host names'),
    ip: address.optional().describe('Address of the host end'),
    mask: mask.optional().describe('Network mask of the host end'),
    mac: mac.optional().describe('Address of the guest, default a random one'),
    host_mac: mac.optional().describe('Hardware address of the host end'),
    mtu: wholeNumber(MIN_MTU, MAX_MTU).optional().describe('Largest packet of the guest'),
    fds: z
      .array(wholeNumber(3, 65535, 'open descriptors'))
      .min(1, { error: 'at least one open descriptor' })
      .optional()
      .describe('Open tap descriptors, one for each pair of queues'),
    num_queues: wholeNumber(2, MAX_QUEUES).default(2).describe('Queues, receiving and sending ones together'),
    queue_size: queueSize(256),
    vhost: z.boolean().default(false).describe("Leave the data path to the host's kernel (vhost-net)"),
    offload_tso: z.boolean().default(true).describe('Segmentation offload (TCP)'),
    offload_ufo: z.boolean().default(true).describe('Segmentation offload (UDP)'),
    offload_csum: z.boolean().default(true).describe('Checksum offload'),
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
  src: path.default('/dev/urandom').describe('File or character device that the random bytes come from'),
  ...pciFields,
});

export const balloonSchema = z.strictObject({
  size: count.default(0).describe('Memory that the guest is to give back at first'),
  deflate_on_oom: z.boolean().default(false).describe('The guest may take it when it runs out of memory'),
  free_page_reporting: z.boolean().default(false).describe('The guest tells which pages it does not use'),
  ...pciFields,
});

/** Pages of guest memory that a mapping of a file takes together. Bytes. */
export const PMEM_ALIGNMENT = 2 * 2 ** 20;
const pmemSizeError = 'a multiple of 2M';

export const pmemSchema = z.strictObject({
  file: path.describe('File or block device with the contents'),
  size: z
    .int({ error: pmemSizeError })
    .min(PMEM_ALIGNMENT, { error: pmemSizeError })
    .multipleOf(PMEM_ALIGNMENT, { error: pmemSizeError })
    .optional()
    .describe('Size, default that of the file'),
  discard_writes: z.boolean().default(false).describe('What the guest writes is not kept'),
  ...pciFields,
});

export const vsockSchema = z.strictObject({
  cid: wholeNumber(MIN_CID, MAX_CID, 'a context id').describe('Context id of the guest'),
  socket: socketPath.describe('Unix socket through which host programs connect'),
  ...pciFields,
});

const CHARACTER_MODES = ['Off', 'Null', 'Tty', 'Pty', 'File', 'Socket'] as const;

/** Where the serial port or the console leads. */
export const characterSchema = z
  .strictObject({
    mode: z.enum(CHARACTER_MODES, { error: `one of ${CHARACTER_MODES.join(', ')}` }),
    file: path.optional(),
    socket: socketPath.optional(),
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
  num_pci_segments: wholeNumber(1, MAX_PCI_SEGMENTS).default(1).describe('PCI segments'),
});

export type DiskConfig = z.infer<typeof diskSchema>;
export type NetConfig = z.infer<typeof netSchema>;
export type PmemConfig = z.infer<typeof pmemSchema>;
export type VsockConfig = z.infer<typeof vsockSchema>;

/** Names and places of a device, which every kind has. */
export interface PciPlacement {
  readonly id?: string | undefined;
  readonly pci_segment: number;
  readonly pci_device_id?: number | undefined;
}
