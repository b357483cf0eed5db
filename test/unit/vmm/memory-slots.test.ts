import { expect, test } from '@jest/globals';
import type { MemorySlot, Vm } from '../../../src/hypervisor/hypervisor.js';
import type { MemoryKind } from '../../../src/memory/guest-memory.js';
import type { MemoryPart } from '../../../src/vmm/memory/memory-part.js';
import { MemorySlots } from '../../../src/vmm/memory/memory-slots.js';

function part(address: number, kind: MemoryKind): MemoryPart {
  return {
    range: { address, size: 0x1000 },
    mapping: { address: BigInt(address) + 0x7000_0000n, length: 0x1000 },
    kind,
  };
}

/** RAM, a device's memory and RAM again, in a VM that notes what it is asked for and refuses what it is told to. */
function machine() {
  const asked: string[] = [];
  const refused = new Set<string>();
  const ask = (what: string) => {
    if (refused.has(what)) throw new Error(`no ${what}`);
    asked.push(what);
  };
  const vm = {
    addMemory: ({ slot }: MemorySlot) => ask(`add ${slot}`),
    removeMemory: (slot: number) => ask(`remove ${slot}`),
    trackWrites: ({ slot }: MemorySlot, on: boolean) => ask(`${on ? 'track' : 'untrack'} ${slot}`),
    takeWritten: ({ slot, guestAddress, mapping }: MemorySlot, into: Uint32Array) => {
      ask(`take ${slot}`);
      into.set([guestAddress, Number(mapping.address)]);
    },
  };
  const slots = new MemorySlots(vm as unknown as Vm);
  for (const [index, kind] of (['private', 'device', 'shared'] as const).entries()) slots.add(part(index << 12, kind));
  asked.length = 0;
  return { slots, asked, refused };
}

test('writes to all RAM are tracked, what is added later included', () => {
  const { slots, asked } = machine();
  slots.trackWrites(true);
  slots.trackWrites(true);
  slots.add(part(0x3000, 'copy'));
  slots.add(part(0x4000, 'device'));
  slots.trackWrites(false);
  slots.add(part(0x5000, 'private'));
  expect(asked.join(', ')).toBe('track 0, track 2, add 3, track 3, add 4, untrack 0, untrack 2, untrack 3, add 5');
});

test('a refusal leaves all as they were', () => {
  const { slots, asked, refused } = machine();
  refused.add('track 2');
  expect(() => slots.trackWrites(true)).toThrow('no track 2');
  expect(asked.splice(0)).toEqual(['track 0', 'untrack 0']);
  refused.clear();
  slots.trackWrites(true);
  refused.add('untrack 2');
  asked.length = 0;
  expect(() => slots.trackWrites(false)).toThrow('no untrack 2');
  expect(asked.splice(0)).toEqual(['untrack 0', 'track 0']);
  // Still on.
  refused.add('track 3');
  const late = part(0x3000, 'private');
  expect(() => slots.add(late)).toThrow('no track 3');
  expect(asked).toEqual(['add 3', 'remove 3']);
  expect(slots.parts).not.toContain(late);
});

test('what was written is asked for by the range', () => {
  const { slots, asked } = machine();
  const into = new Uint32Array(2);
  slots.takeWritten({ address: 0x2000, size: 0x1000 }, into);
  expect([asked, [...into]]).toEqual([['take 2'], [0x2000, 0x7000_2000]]);
});

test('what the host has at an address anew is told in the same slot', () => {
  const { slots, asked } = machine();
  const [, , last] = slots.parts;
  slots.renew(last);
  expect(asked).toEqual(['remove 2', 'add 2']);
});
