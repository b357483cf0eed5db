import { expect, test } from '@jest/globals';
import type { SerialBackend } from '../../../src/vmm/host/serial-backend.js';
import { type BytePort, SerialPump } from '../../../src/vmm/host/serial-pump.js';

test('a flush leaves nothing with the device, and what it took is said once', () => {
  let held = Buffer.from('said by the guest');
  const device: BytePort = {
    drainTransmit: (into) => {
      const count = Math.min(held.length, into.length, 5);
      into.set(held.subarray(0, count));
      held = held.subarray(count);
      return count;
    },
    receive: () => 0,
  };
  let said = '';
  const backend = {
    write: (bytes: Uint8Array) => {
      said += Buffer.from(bytes).toString();
      return false;
    },
    resume: () => undefined,
  } as Partial<SerialBackend> as SerialBackend;
  const pump = new SerialPump(device, backend);
  pump.output();
  pump.flush();
  expect(held).toHaveLength(0);
  pump.close();
  expect(said).toBe('said by the guest');
});
