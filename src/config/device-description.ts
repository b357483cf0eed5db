/** What a user's module says of its device. */
import * as z from 'zod/mini';
import { DEVICE_COUNTERS, DEVICE_LATENCIES } from '../virtio/device.js';
import { text, wholeNumber } from './fields.js';

/** PCI device ids go from 0x1040 to 0x107f (virtio 1.3, 4.1.2.1). */
const MAX_TYPE = 63;
const MAX_QUEUES = 64;
const MAX_QUEUE_SIZE = 32768;
/** Bytes: what has room in the region of the BAR. */
const MAX_CONFIG = 4096;

const powerOfTwo = `a power of two from 1 to ${MAX_QUEUE_SIZE}`;
const names = (most: number) =>
  z.array(text(/^\w{1,64}$/, 'letters, digits and _')).check(z.maxLength(most, { error: `up to ${most} names` }));

export const descriptionSchema = z
  .strictObject({
    type: wholeNumber(1, MAX_TYPE, 'a device type'),
    classCode: wholeNumber(0, 0xff_ffff, 'class, subclass and interface'),
    // 2.2: bits 24 to 49 are the transport's.
    features: z.array(
      wholeNumber(0, 63, 'a feature bit').check(
        z.refine((bit) => bit < 24 || bit > 49, { error: 'a feature bit of a device, 0 to 23 or 50 to 63' }),
      ),
    ),
    queueSizes: z
      .array(
        wholeNumber(1, MAX_QUEUE_SIZE, 'a power of two').check(
          z.refine((size) => (size & (size - 1)) === 0, { error: powerOfTwo }),
        ),
      )
      .check(
        z.minLength(1, { error: 'one queue or more' }),
        z.maxLength(MAX_QUEUES, { error: `up to ${MAX_QUEUES} queues` }),
      ),
    config: z
      .instanceof(Uint8Array, { error: 'a Uint8Array' })
      .check(z.refine((bytes) => bytes.length <= MAX_CONFIG, { error: `up to ${MAX_CONFIG} bytes` })),
    writable: z.array(
      z.tuple([z.int({ error: 'an offset' }), z.int({ error: 'an offset' })], { error: '[from, end]' }),
    ),
    counters: names(DEVICE_COUNTERS),
    latencies: z.optional(names(DEVICE_LATENCIES)),
  })
  .check(({ value, issues }) => {
    if (value.writable.every(([from, end]) => from >= 0 && from <= end && end <= value.config.length)) return;
    issues.push({ code: 'custom', input: value, path: ['writable'], message: 'stretches of config: [from, end]' });
  });
