/** Reads ELF core files, as gdb and crash do (gABI; struct elf_prstatus of linux/elfcore.h). */
import fs from 'node:fs';

export interface CoreSegment {
  readonly offset: number;
  readonly address: number;
  readonly size: number;
}

export interface CoreNote {
  readonly name: string;
  readonly type: number;
  readonly contents: DataView;
}

export class CoreReader {
  readonly machine: number;
  readonly memory: readonly CoreSegment[];
  readonly notes: readonly CoreNote[];
  readonly #fd: number;

  constructor(path: string) {
    this.#fd = fs.openSync(path, 'r');
    const head = this.#view(0, 64);
    const magic = [0, 1, 2, 3, 4, 5, 6].map((at) => head.getUint8(at));
    if (magic.join() !== '127,69,76,70,2,1,1' || head.getUint16(16, true) !== 4) throw new Error('No core file');
    this.machine = head.getUint16(18, true);
    const count = head.getUint16(56, true);
    const table = this.#view(Number(head.getBigUint64(32, true)), count * 56);
    const entries = Array.from({ length: count }, (_, index) => {
      const word = (at: number) => Number(table.getBigUint64(index * 56 + at, true));
      return { type: table.getUint32(index * 56, true), offset: word(8), address: word(24), size: word(32) };
    });
    this.memory = entries
      .filter(({ type }) => type === 1)
      .map(({ offset, address, size }) => ({ offset, address, size }));
    this.notes = entries.filter(({ type }) => type === 4).flatMap(({ offset, size }) => this.#notes(offset, size));
  }

  #view(offset: number, length: number): DataView {
    const bytes = new Uint8Array(length);
    const read = fs.readSync(this.#fd, bytes, 0, length, offset);
    if (read < length) throw new Error(`${read} of ${length} bytes at ${offset}`);
    return new DataView(bytes.buffer);
  }

  #notes(offset: number, size: number): CoreNote[] {
    const view = this.#view(offset, size);
    const notes: CoreNote[] = [];
    for (let at = 0; at < size;) {
      const [nameSize, contentSize, type] = [0, 4, 8].map((field) => view.getUint32(at + field, true));
      const contents = at + 12 + Math.ceil(nameSize / 4) * 4;
      const name = Buffer.from(view.buffer, at + 12, nameSize - 1).toString();
      notes.push({ name, type, contents: new DataView(view.buffer, contents, contentSize) });
      at = contents + Math.ceil(contentSize / 4) * 4;
    }
    return notes;
  }

  /** Bytes at a guest physical address. */
  read(address: number, length: number): Buffer {
    const part = this.memory.find((each) => address >= each.address && address + length <= each.address + each.size);
    if (part === undefined) throw new Error(`No memory at 0x${address.toString(16)}`);
    return Buffer.from(this.#view(part.offset + address - part.address, length).buffer);
  }

  /** Registers of each thread, in the order of struct user_regs. */
  registers(): { id: number; values: bigint[] }[] {
    return this.notes
      .filter(({ name, type }) => name === 'CORE' && type === 1)
      .map(({ contents }) => ({
        id: contents.getUint32(32, true),
        values: Array.from({ length: (contents.byteLength - 120) / 8 }, (_, index) =>
          contents.getBigUint64(112 + index * 8, true),
        ),
      }));
  }

  close(): void {
    fs.closeSync(this.#fd);
  }
}
