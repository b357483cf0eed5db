/**
 * What the hypervisor alone understands of a processor or a partition, as the bytes that a record has of it: registers by the
 * numbers of their names, and parts of the state that move as a whole.
 *
 * Little-endian: the number of registers; of each its name (4 bytes) and its value (16); the number of parts; of each its type of
 * MSHV_VP_STATE (4), the number of its bytes (4) and those up to the last that is not zero.
 */
import { HypervisorError } from '../hypervisor.js';
import * as abi from './abi.js';
import type { RegisterValue } from './registers.js';

const WORD = 4;
const REGISTER_SIZE = WORD + abi.REGISTER_VALUE_SIZE;
/** Bytes of a part at most. */
export const MAX_PART = abi.MSHV_HV_PAGE_SIZE;

export interface OwnForm {
  readonly registers: readonly RegisterValue[];
  /** By type. */
  readonly parts: ReadonlyMap<number, Uint8Array>;
}

export function encodeOwnForm({ registers, parts }: OwnForm): Uint8Array {
  const cut = [...parts].map(([type, bytes]) => {
    const length = bytes.findLastIndex((byte) => byte !== 0) + 1;
    return [type, bytes.subarray(0, length)] as const;
  });
  const sizes = cut.map(([, bytes]) => 2 * WORD + bytes.length);
  const size = 2 * WORD + registers.length * REGISTER_SIZE + sizes.reduce((sum, one) => sum + one, 0);
  const into = new Uint8Array(size);
  const view = new DataView(into.buffer);
  let at = 0;
  const word = (value: number) => {
    view.setUint32(at, value, true);
    at += WORD;
  };
  word(registers.length);
  for (const [name, low, high = 0n] of registers) {
    word(name);
    view.setBigUint64(at, low, true);
    view.setBigUint64(at + 8, high, true);
    at += abi.REGISTER_VALUE_SIZE;
  }
  word(cut.length);
  for (const [type, bytes] of cut) {
    word(type);
    word(bytes.length);
    into.set(bytes, at);
    at += bytes.length;
  }
  return into;
}

/**
 * @param bytes from a file, which anybody may have written
 * @param names registers that may be there @param types parts that may be there
 * @throws HypervisorError
 */
export function decodeOwnForm(
  bytes: Uint8Array | undefined,
  names: readonly number[],
  types: readonly number[],
): OwnForm {
  if (bytes === undefined) throw new HypervisorError('The record is not of the Microsoft hypervisor');
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  /** @returns where the next so many bytes are */
  const take = (length: number) => {
    if (length > bytes.length - at) throw new HypervisorError('The record ends too early');
    at += length;
    return at - length;
  };
  const word = () => view.getUint32(take(WORD), true);
  /** One of what may be there and has not been yet: an order of a file's is no order. */
  const one = (allowed: readonly number[], met: Set<number>) => {
    const number = word();
    if (!allowed.includes(number) || met.has(number)) {
      throw new HypervisorError(`The record has 0x${number.toString(16)} where it cannot be`);
    }
    met.add(number);
    return number;
  };
  const registers: RegisterValue[] = [];
  const met = new Set<number>();
  // Each is taken once, so there are no more than there are names, whatever the number says.
  for (let left = word(); left > 0; left--) {
    const name = one(names, met);
    const value = take(abi.REGISTER_VALUE_SIZE);
    registers.push([name, view.getBigUint64(value, true), view.getBigUint64(value + 8, true)]);
  }
  const parts = new Map<number, Uint8Array>();
  const had = new Set<number>();
  for (let left = word(); left > 0; left--) {
    const type = one(types, had);
    const length = word();
    if (length > MAX_PART) throw new HypervisorError(`The record has a part of ${length} bytes`);
    const start = take(length);
    parts.set(type, bytes.slice(start, start + length));
  }
  if (at !== bytes.length) throw new HypervisorError('The record has more than it should');
  return { registers, parts };
}
