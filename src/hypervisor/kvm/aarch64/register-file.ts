/** Registers that are kept and set back one by one, by their ids: a vCPU's, or those of a part of the GIC. */
import { SystemError } from '../../../sys/host-kernel.js';
import { HypervisorError } from '../../hypervisor.js';
import type { Arm64Register } from '../../saved-state.js';

export interface RegisterFile {
  /** In the order in which they are to be set. */
  readonly ids: readonly bigint[];
  name(id: bigint): string;
  /** Bytes of the value. */
  size(id: bigint): number;
  /** Says what the host or the machine is: never set, only compared. */
  fixed(id: bigint): boolean;
  /** Need not be among those that were saved: it keeps the value that it has from the start. */
  optional(id: bigint): boolean;
  /**
   * @returns the value, valid until another register is touched; undefined: this host has not the register
   * @throws SystemError
   */
  read(id: bigint): Uint8Array | undefined;
  /** @param value of the register's size @throws SystemError */
  write(id: bigint, value: Uint8Array): void;
}

export function saveRegisters(file: RegisterFile): Arm64Register[] {
  return file.ids.flatMap((id) => {
    const value = file.read(id);
    return value === undefined ? [] : [{ id, value: value.slice() }];
  });
}

/**
 * @param saved from a file that anybody may have written: nothing is set unless all ids and sizes are this file's own
 * @throws HypervisorError with one line that names the first register that does not fit
 */
export function loadRegisters(file: RegisterFile, saved: readonly Arm64Register[]): void {
  const values = new Map<bigint, Uint8Array>();
  const known = new Set(file.ids);
  for (const { id, value } of saved) {
    const name = file.name(id);
    if (!known.has(id)) throw new HypervisorError(`The saved machine has ${name}; KVM on this host has not`);
    if (values.has(id)) throw new HypervisorError(`The saved state has ${name} twice`);
    const size = file.size(id);
    if (value.length !== size) {
      throw new HypervisorError(`The saved state has ${value.length} bytes for ${name}, which has ${size}`);
    }
    values.set(id, value);
  }
  const missing = file.ids.find((id) => !values.has(id) && !file.optional(id));
  if (missing !== undefined) throw new HypervisorError(`The saved state lacks ${file.name(missing)}`);
  for (const id of file.ids) {
    const value = values.get(id);
    if (value !== undefined) loadRegister(file, id, value);
  }
}

/** KVM refuses to set what it cannot change, also to the value that it has. */
function loadRegister(file: RegisterFile, id: bigint, value: Uint8Array): void {
  if (!file.fixed(id)) {
    try {
      file.write(id, value);
      return;
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
    }
  }
  const here = file.read(id);
  if (here?.every((byte, index) => byte === value[index]) === true) return;
  throw new HypervisorError(
    `The machine was saved with ${hex(value)} in ${file.name(id)}; KVM on this host has ${here ? hex(here) : 'no such register'}`,
  );
}

function hex(value: Uint8Array): string {
  return `0x${Buffer.from(value).reverse().toString('hex')}`;
}
