/** The state block of a virtio device behind PCI: everything that its driver can see or set. */
import { FUNCTION_LIMITS, FUNCTION_WORDS } from '../../pci/function.js';
import { MSIX_ENTRY_LIMITS, type MsixPlace, msixWords, NO_VECTOR } from '../../pci/msix.js';
import { DOUBLE, hostOnly, type StateBlock, type StateLayout, stateLayout, upTo } from '../../state/state-block.js';
import { DEVICE_COUNTERS, DEVICE_LATENCIES, type DeviceContext, OWN_WORDS, type VirtioDescription } from '../device.js';
import { LATENCY_NUMBERS, Latency, latencyCounters } from '../latency.js';
import { QUEUE_LIMITS, QUEUE_WORDS, QueueWord } from '../queue/queue.js';

type Fields =
  | 'alignment'
  | 'function'
  | 'msixControl'
  | 'msixTable'
  | 'msixPending'
  | 'msixSenders'
  | 'connected'
  | 'configAccess'
  | 'doorbells'
  | 'heard'
  | 'configWrites'
  | 'status'
  | 'session'
  | 'holders'
  | 'resetting'
  | 'resets'
  | 'known'
  | 'impatient'
  | 'mastering'
  | 'generation'
  | 'isr'
  | 'featureSelect'
  | 'driverFeatureSelect'
  | 'driverFeatures'
  | 'configVector'
  | 'queueSelect'
  | 'queues'
  | 'config'
  | 'own'
  | 'counters';

export type TransportLayout = StateLayout<Fields>;

/** Bits of the device status (2.1). */
export const Status = {
  acknowledge: 1,
  driver: 2,
  driverOk: 4,
  featuresOk: 8,
  needsReset: 64,
  failed: 128,
} as const;

/** Doubles in which one worker counts what a device does. */
const COUNTER_SET = DEVICE_COUNTERS + DEVICE_LATENCIES * LATENCY_NUMBERS;

/** One vector for the configuration and one for each queue. */
export function vectorCount(queues: number): number {
  return queues + 1;
}

/** Of a device of this kind, whatever its name: a state is loaded by the same kind alone. */
export function transportLayout({ type, queueSizes, config }: VirtioDescription): TransportLayout {
  const queues = queueSizes.length;
  const vectors = vectorCount(queues);
  const msix = msixWords(vectors);
  return stateLayout<Fields>(`virtio-${type}`, 1, {
    /** The counters of queues and device are doubles: a word more before them, as the lock is one. */
    alignment: hostOnly(),
    queues: upTo(QUEUE_LIMITS, queues * QUEUE_WORDS),
    /** Of the device: a set for each queue. */
    counters: upTo(DOUBLE, 2 * COUNTER_SET * queues),
    function: upTo(FUNCTION_LIMITS, FUNCTION_WORDS),
    msixControl: upTo(0xffff),
    msixTable: upTo(MSIX_ENTRY_LIMITS, msix.table),
    msixPending: msix.pending,
    /** Threads that are sending a vector's message. */
    msixSenders: hostOnly(vectors),
    /** Vectors that the host's kernel can raise at present, a bit each. */
    connected: hostOnly(msix.pending),
    /** The configuration access capability: BAR, offset, length (4.1.4.9). */
    configAccess: 3,
    /** Guest physical address at which the doorbells are registered, in two words; 0: they are not. */
    doorbells: hostOnly(2),
    /** Queues whose doorbells the hypervisor has taken, a bit each. */
    heard: hostOnly(Math.ceil(queues / 32)),
    /** How often the driver has written the configuration space. */
    configWrites: hostOnly(),
    status: upTo(0xff),
    /** Whose the queues are, which workers hold them, and what waits for those: reset-protocol.ts. A queue has at most a worker. */
    session: hostOnly(),
    holders: hostOnly(queues),
    resetting: hostOnly(),
    /** How often the driver has reset the device. */
    resets: hostOnly(),
    /** 1 once main has been told that a driver is there. */
    known: hostOnly(),
    impatient: hostOnly(),
    mastering: upTo(2),
    generation: 1,
    isr: upTo(3),
    featureSelect: 1,
    driverFeatureSelect: 1,
    driverFeatures: 2,
    configVector: upTo(NO_VECTOR),
    queueSelect: upTo(0xffff),
    config: Math.max(Math.ceil(config.length / 4), 1),
    /** Of the device class. */
    own: OWN_WORDS,
  });
}

export function msixPlace(layout: TransportLayout, queues: number): MsixPlace {
  const { msixControl: control, msixTable: table, msixPending: pending, msixSenders: senders, mastering } = layout.at;
  return { control, table, pending, senders, mastering, vectors: vectorCount(queues) };
}

/** The device's configuration space as bytes. Little-endian hosts only, which both architectures are. */
export function configBytes(block: StateBlock<Fields>, length: number): Uint8Array {
  return new Uint8Array(block.buffer, block.layout.at.config * 4, length);
}

/** Words of the device class's own. */
export function ownWords(block: StateBlock<Fields>): Int32Array {
  const { at, length } = block.layout;
  return block.words.subarray(at.own, at.own + length.own);
}

/** What one worker counts, in the set of the first queue that it serves: nobody else writes it. */
export function workerCounters(
  block: StateBlock<Fields>,
  served: readonly number[],
): Pick<DeviceContext, 'counters' | 'latencies'> {
  const set = counterSet(block, Math.min(...served));
  return {
    counters: set.subarray(0, DEVICE_COUNTERS),
    latencies: Array.from({ length: DEVICE_LATENCIES }, (_, index) => new Latency(latencyNumbers(set, index))),
  };
}

/** What all workers of the device have counted, by name. */
export function deviceCounters(block: StateBlock<Fields>, description: VirtioDescription): Record<string, number> {
  const sets = description.queueSizes.map((_, queue) => counterSet(block, queue));
  const counters: Record<string, number> = {};
  description.counters.forEach((name, index) => {
    counters[name] = sets.reduce((sum, set) => sum + set[index], 0);
  });
  description.latencies?.forEach((name, index) => {
    const parts = sets.map((set) => latencyNumbers(set, index));
    Object.assign(counters, latencyCounters(name, parts));
  });
  return counters;
}

function counterSet(block: StateBlock<Fields>, queue: number): Float64Array {
  return new Float64Array(block.buffer, block.layout.at.counters * 4 + queue * COUNTER_SET * 8, COUNTER_SET);
}

function latencyNumbers(set: Float64Array, index: number): Float64Array {
  const from = DEVICE_COUNTERS + index * LATENCY_NUMBERS;
  return set.subarray(from, from + LATENCY_NUMBERS);
}

/** The device as a reset leaves it (2.4); the PCI function and its vectors stay as they are. */
export function resetTransport(words: Int32Array, at: TransportLayout['at'], description: VirtioDescription): void {
  words[at.featureSelect] = 0;
  words[at.driverFeatureSelect] = 0;
  words[at.driverFeatures] = 0;
  words[at.driverFeatures + 1] = 0;
  words[at.configVector] = NO_VECTOR;
  words[at.queueSelect] = 0;
  words[at.isr] = 0;
  description.queueSizes.forEach((size, queue) => {
    const first = at.queues + queue * QUEUE_WORDS;
    // The counters that follow are not the driver's.
    words.fill(0, first, first + QueueWord.counters);
    words[first + QueueWord.size] = size;
    words[first + QueueWord.vector] = NO_VECTOR;
  });
  words.fill(0, at.own, at.own + OWN_WORDS);
  // What the driver could write of the configuration.
  const config = new Uint8Array(words.buffer, words.byteOffset + at.config * 4, description.config.length);
  for (const [from, end] of description.writable) config.set(description.config.subarray(from, end), from);
  Atomics.store(words, at.status, 0);
}
