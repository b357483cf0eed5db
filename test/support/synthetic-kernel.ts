/** Kernels of a few KiB that have the headers of real ones: for the loader, and some of a few instructions to run. */

/** 64-bit boot protocol: Documentation/arch/x86/boot.rst. Names are the header's fields. */
export interface SetupHeader {
  readonly setup_sects: number;
  readonly version: number;
  readonly initrd_addr_max: number;
  readonly kernel_alignment: number;
  readonly relocatable_kernel: number;
  readonly xloadflags: number;
  readonly cmdline_size: number;
  readonly pref_address: bigint;
  readonly init_size: number;
}

const SETUP_HEADER: SetupHeader = {
  setup_sects: 1,
  version: 0x020f,
  initrd_addr_max: 0x7fff_ffff,
  kernel_alignment: 0x20_0000,
  relocatable_kernel: 1,
  xloadflags: 0x3f,
  cmdline_size: 255,
  pref_address: 0x30_0000n,
  init_size: 0x8000,
};

/** @param body the protected-mode kernel: a multiple of 16 bytes */
export function bzImage(fields: Partial<SetupHeader> = {}, body: Buffer = pattern(0x1000)): Buffer {
  const header = { ...SETUP_HEADER, ...fields };
  const setup = Buffer.alloc(((header.setup_sects || 4) + 1) * 512);
  setup[0x1f1] = header.setup_sects;
  setup.writeUInt32LE(body.length / 16, 0x1f4);
  setup.writeUInt16LE(0xaa55, 0x1fe);
  setup.writeUInt16LE(0x6aeb, 0x200); // jmp over the header, which so ends at 0x26c
  setup.write('HdrS', 0x202, 'latin1');
  setup.writeUInt16LE(header.version, 0x206);
  setup[0x211] = 0x01; // loadflags: LOADED_HIGH
  setup.writeUInt32LE(header.initrd_addr_max, 0x22c);
  setup.writeUInt32LE(header.kernel_alignment, 0x230);
  setup[0x234] = header.relocatable_kernel;
  setup.writeUInt16LE(header.xloadflags, 0x236);
  setup.writeUInt32LE(header.cmdline_size, 0x238);
  setup.writeBigUInt64LE(header.pref_address, 0x258);
  setup.writeUInt32LE(header.init_size, 0x260);
  setup.fill(0xee, 0x26c); // code behind the header, which is not for the zero page
  return Buffer.concat([setup, body]);
}

/** A bzImage whose 64-bit entry (0x200 into the protected-mode kernel) is this code, which may be anywhere. */
export function runnable(...code: readonly number[]): Buffer {
  const body = Buffer.alloc(0x1000, 0xf4);
  body.set(code, 0x200);
  return bzImage({}, body);
}

const le32 = (value: number) => [value & 0xff, (value >> 8) & 0xff, (value >> 16) & 0xff, value >>> 24];

/** out: mov dx, port; mov al, value; out dx, al */
export const out = (port: number, value: number) => [0x66, 0xba, port & 0xff, port >> 8, 0xb0, value, 0xee];
/** Runs what follows `count` times: mov ecx, count; again: ...; dec ecx; jnz again */
export const repeat = (count: number, body: readonly number[]) => [
  0xb9,
  ...le32(count),
  ...body,
  ...[0xff, 0xc9, 0x75, -(body.length + 4) & 0xff],
];
/** again: ...; jmp again */
export const forever = (body: readonly number[]) => [...body, 0xeb, -(body.length + 2) & 0xff];
/** The machine is off: S5 into the ACPI sleep register. */
export const TURN_OFF = [...out(0x600, 0x34), ...forever([0xf4])];
export const COM1 = 0x3f8;

const dx = (port: number) => [0x66, 0xba, port & 0xff, port >> 8];
/** A guest that says back what it hears at its serial port, and powers itself off after a q. */
export const ECHO = runnable(
  ...[...dx(COM1 + 5), 0xec, 0xa8, 0x01, 0x74, 0xf7], // again: in al, LSR; test al, 1; jz again
  ...[...dx(COM1), 0xec, 0xee, 0x3c, 0x71, 0x75, 0xed], // in al, dx; out dx, al; cmp al, 'q'; jne again
  ...TURN_OFF,
);

export const PT_LOAD = 1;
export const PT_NOTE = 4;

export interface ElfSegment {
  readonly p_type: number;
  readonly p_paddr: bigint;
  readonly data: Buffer;
  readonly p_offset?: bigint;
  readonly p_filesz?: bigint;
  readonly p_memsz?: bigint;
  readonly p_align?: bigint;
}

export interface ElfFields {
  readonly wide?: boolean;
  readonly e_machine?: number;
  readonly e_entry?: bigint;
  readonly segments?: readonly ElfSegment[];
}

/** System V ABI, chapters 4 and 5: the headers, then each segment's bytes. ELF64 unless `wide` is false. */
export function elf(fields: ElfFields = {}): Buffer {
  const { wide = true, e_machine: machine = 62, e_entry: entry = 0x10_0100n, segments = [text()] } = fields;
  const [headerSize, entrySize] = wide ? [64, 56] : [52, 32];
  const header = Buffer.alloc(headerSize + segments.length * entrySize);
  const word = (value: bigint, at: number, short: number) =>
    wide ? header.writeBigUInt64LE(value, at) : header.writeUInt32LE(Number(value), short);
  header.write('\x7fELF', 0, 'latin1');
  header.set([wide ? 2 : 1, 1, 1], 4);
  header.writeUInt16LE(2, 16); // ET_EXEC
  header.writeUInt16LE(machine, 18);
  word(entry, 24, 24);
  word(BigInt(headerSize), 32, 28);
  header.writeUInt16LE(entrySize, wide ? 54 : 42);
  header.writeUInt16LE(segments.length, wide ? 56 : 44);
  let end = header.length;
  segments.forEach((segment, index) => {
    const at = headerSize + index * entrySize;
    const filesz = segment.p_filesz ?? BigInt(segment.data.length);
    header.writeUInt32LE(segment.p_type, at);
    word(segment.p_offset ?? BigInt(end), at + 8, at + 4);
    word(segment.p_paddr, at + 24, at + 12);
    word(filesz, at + 32, at + 16);
    word(segment.p_memsz ?? filesz, at + 40, at + 20);
    word(segment.p_align ?? 4n, at + 48, at + 28);
    end += segment.data.length;
  });
  return Buffer.concat([header, ...segments.map(({ data }) => data)]);
}

/** 4 KiB of code at 1 MiB, and 4 KiB of bss behind it. */
export function text(fields: Partial<ElfSegment> = {}): ElfSegment {
  return { p_type: PT_LOAD, p_paddr: 0x10_0000n, data: pattern(0x1000), p_memsz: 0x2000n, ...fields };
}

/** @param align 4 or 8, to which the note's name and description are padded */
export function note(name: string, type: number, description: Buffer, align = 4): Buffer {
  const pad = (bytes: Buffer) => Buffer.concat([bytes, Buffer.alloc(-bytes.length & (align - 1))]);
  const header = Buffer.alloc(12);
  header.writeUInt32LE(name.length + 1);
  header.writeUInt32LE(description.length, 4);
  header.writeUInt32LE(type, 8);
  return pad(Buffer.concat([pad(Buffer.concat([header, Buffer.from(`${name}\0`)])), description]));
}

/** Xen, docs/misc/pvh.pandoc: a segment with XEN_ELFNOTE_PHYS32_ENTRY behind another note, as in vmlinux. */
export function pvhNote(entry: number, size: 4 | 8 = 8, align: 4 | 8 = 4): ElfSegment {
  const address = Buffer.alloc(size);
  address.writeUInt32LE(entry);
  const data = Buffer.concat([note('Linux', 0x101, Buffer.alloc(1), align), note('Xen', 18, address, align)]);
  return { p_type: PT_NOTE, p_paddr: 0n, data, p_align: BigInt(align) };
}

/** A kernel that writes one byte to a port, and stops there. */
export function portWriter(port: number, value: number): Buffer {
  // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
  const data = Buffer.from([0x66, 0xba, port & 0xff, port >> 8, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd]);
  return elf({ e_entry: 0x10_0000n, segments: [text({ data, p_memsz: 0x1000n }), pvhNote(0x10_0000)] });
}

/** The sleep control register of ACPI: sleep type 5, enabled. */
export const POWER_OFF = [0x600, 0x34] as const;

/** Bytes none of which is 0 and which differ from place to place. */
export function pattern(length: number): Buffer {
  return Buffer.from(Uint8Array.from({ length }, (_, index) => 1 + (index % 251)));
}
