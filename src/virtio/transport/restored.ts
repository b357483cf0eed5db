/** A device's state that was loaded: whether this machine's device can have it, and what becomes of its configuration space. */
import { type StateBlock, StateError } from '../../state/state-block.js';
import { Feature, featureWords, type RestoredDevice } from '../device.js';
import { QUEUE_WORDS, QueueWord } from '../queue/queue.js';
import type { VirtioPciHandle } from './pci-handle.js';
import { configBytes, ownWords, Status, type TransportLayout } from './transport-state.js';

type Transport = StateBlock<keyof TransportLayout['at']>;

/** @throws StateError when the driver has agreed to what the device is not */
export function checkRestored(
  { words, layout: { at } }: Transport,
  { id, offered, description }: VirtioPciHandle,
): void {
  const status = words[at.status];
  const agreed = (status & Status.featuresOk) !== 0;
  // 3.1.1
  if ((status & Status.driverOk) !== 0 && !agreed) throw new StateError(`${id}: its driver works without features`);
  const [version1] = featureWords([Feature.version1]).slice(1);
  const high = words[at.driverFeatures + 1];
  const missing = [words[at.driverFeatures] & ~offered[0], high & ~offered[1]];
  if (agreed && ((high & version1) === 0 || missing.some((bits) => bits !== 0))) {
    const bits = Array.from({ length: 64 }, (_, bit) => bit).filter(
      (bit) => (missing[bit >> 5] & (1 << (bit & 31))) !== 0,
    );
    throw new StateError(`${id}: its driver uses features that the device does not have here: ${bits.join(', ')}`);
  }
  description.queueSizes.forEach((most, queue) => {
    const size = words[at.queues + queue * QUEUE_WORDS + QueueWord.size];
    if (size < 1 || size > most)
      throw new StateError(`${id}: its queue ${queue} has ${size} entries, and can have ${most}`);
  });
}

/**
 * The configuration is this machine's, but for what the driver has written, and what the device has made of it.
 *
 * @param adapt does the latter
 * @returns whether the driver is to be told, as it is another than the saved one
 */
export function renewConfig(
  block: Transport,
  { description: { config, writable } }: VirtioPciHandle,
  adapt: ((device: RestoredDevice) => void) | undefined,
): boolean {
  const {
    words,
    layout: { at, length },
  } = block;
  const present = configBytes(block, config.length);
  const saved = Uint8Array.from(present);
  words.fill(0, at.config, at.config + length.config);
  present.set(config);
  for (const [from, end] of writable) present.set(saved.subarray(from, end), from);
  const ready = (words[at.status] & Status.driverOk) !== 0;
  const has = (feature: number) => ready && (words[at.driverFeatures + (feature >> 5)] & (1 << (feature & 31))) !== 0;
  adapt?.({ config: present, own: ownWords(block), ready, has });
  if (saved.every((byte, index) => byte === present[index])) return false;
  words[at.generation]++;
  return ready;
}
