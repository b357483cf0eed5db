/** Notes of ELF files (gABI, "Note Section"): names and contents begin at multiples of 4. */

/** A thread's registers (linux/elf.h). */
const NT_PRSTATUS = 1;
/** struct elf_prstatus of both architectures: the thread's id, and the registers; behind them, whether there is more. */
const PRSTATUS = { id: 32, registers: 112, tail: 8 };

const aligned = (bytes: number): number => Math.ceil(bytes / 4) * 4;

export function note(name: string, type: number, contents: Uint8Array): Uint8Array {
  const terminated = Buffer.from(`${name}\0`);
  const header = 12;
  const bytes = new Uint8Array(header + aligned(terminated.length) + aligned(contents.length));
  new Uint32Array(bytes.buffer, 0, 3).set([terminated.length, contents.length, type]);
  bytes.set(terminated, header);
  bytes.set(contents, header + aligned(terminated.length));
  return bytes;
}

/** @param id from 1 on @param registers in the order of the architecture's struct user_regs */
export function registersNote(id: number, registers: readonly bigint[]): Uint8Array {
  const view = new DataView(new ArrayBuffer(PRSTATUS.registers + registers.length * 8 + PRSTATUS.tail));
  view.setUint32(PRSTATUS.id, id, true);
  registers.forEach((value, index) => view.setBigUint64(PRSTATUS.registers + index * 8, value, true));
  return note('CORE', NT_PRSTATUS, new Uint8Array(view.buffer));
}
