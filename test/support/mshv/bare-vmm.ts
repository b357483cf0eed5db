/** The least VMM for the simulated device: one partition with some memory, and guests of a few instructions. */
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostMapping } from '../../../src/sys/host-kernel.js';
import { machineCode } from '../machine-code.js';
import { SimulatedMshvKernel } from './simulated-kernel.js';

const PAGE = abi.MSHV_HV_PAGE_SIZE;
export const MEMORY_SIZE = 0x20_0000;
export const CODE = 0x1000;

const assembled = new Map<string, Uint8Array>();

/** Machine code of assembler text (GNU as, Intel syntax), to be loaded at CODE. */
export function assemble(bits: 16 | 32 | 64, text: string): Uint8Array {
  const key = `${bits} ${text}`;
  const known = assembled.get(key);
  if (known !== undefined) return known;
  const code = machineCode(`.intel_syntax noprefix\n.code${bits}\n.text\n${text}\n`);
  assembled.set(key, code);
  return code;
}

/** As {@link assemble}, of lines that do not refer to each other: each is assembled once, in whatever it stands. */
export function assembleEach(bits: 16 | 32 | 64, lines: readonly string[]): Uint8Array {
  return Buffer.concat(lines.map((line) => assemble(bits, line)));
}

type Register = keyof typeof abi.HV_X64_REGISTER;

export interface VmmOptions {
  readonly flags?: number;
  readonly initialize?: boolean;
}

export const LAPIC_FLAGS = (1 << abi.MSHV_PT_BIT.LAPIC) | (1 << abi.MSHV_PT_BIT.X2APIC);

export class BareVmm {
  readonly kernel = new SimulatedMshvKernel();
  readonly device = this.kernel.open(abi.MSHV_DEVICE);
  readonly partition: number;
  readonly memory: HostMapping;
  readonly bytes: Uint8Array;
  readonly message = new DataView(new ArrayBuffer(abi.MSHV_RUN_VP_BUF_SZ));
  readonly #pages: HostMapping;
  readonly input: DataView;
  readonly output: DataView;

  constructor({ flags = LAPIC_FLAGS, initialize = true }: VmmOptions = {}) {
    const create = new DataView(new ArrayBuffer(abi.CREATE_PARTITION_SIZE));
    create.setBigUint64(abi.CREATE_PARTITION.flags, BigInt(flags), true);
    this.partition = this.kernel.ioctlBuffer(this.device, abi.MSHV_CREATE_PARTITION, new Uint8Array(create.buffer));
    this.memory = this.kernel.map({ length: MEMORY_SIZE, shared: true });
    this.bytes = new Uint8Array(this.memory.view(0, MEMORY_SIZE));
    this.#pages = this.kernel.map({ length: 2 * PAGE, shared: false });
    this.input = new DataView(this.#pages.view(0, PAGE));
    this.output = new DataView(this.#pages.view(PAGE, PAGE));
    if (!initialize) return;
    const present =
      (1n << BigInt(abi.SYNTHETIC_FEATURE_BIT.hypervisor_present)) | (1n << BigInt(abi.SYNTHETIC_FEATURE_BIT.hv1));
    this.setProperty(abi.HV_PARTITION_PROPERTY.SYNTHETIC_PROC_FEATURES, present);
    this.kernel.ioctl(this.partition, abi.MSHV_INITIALIZE_PARTITION);
    this.mapMemory(0, MEMORY_SIZE, this.memory.handle.address);
  }

  mapMemory(guest: number, size: number, user: bigint, flags = 3, reserved = 0): void {
    const region = new DataView(new ArrayBuffer(abi.MEM_REGION_SIZE));
    region.setBigUint64(abi.MEM_REGION.size, BigInt(size), true);
    region.setBigUint64(abi.MEM_REGION.guestPfn, BigInt(guest / PAGE), true);
    region.setBigUint64(abi.MEM_REGION.userspaceAddress, user, true);
    region.setUint8(abi.MEM_REGION.flags, flags);
    region.setUint8(abi.MEM_REGION.flags + 1, reserved);
    this.kernel.ioctlBuffer(this.partition, abi.MSHV_SET_GUEST_MEMORY, new Uint8Array(region.buffer));
  }

  createVp(index: number): number {
    const argument = new Uint8Array(new Uint32Array([index]).buffer);
    return this.kernel.ioctlBuffer(this.partition, abi.MSHV_CREATE_VP, argument);
  }

  /** @returns the status in the low half, completed reps above; throws as the request does */
  hypercall(fd: number, code: number, inSize: number, outSize = 0, reps = 0): number {
    const argument = new DataView(new ArrayBuffer(abi.ROOT_HVCALL_SIZE));
    argument.setUint16(abi.ROOT_HVCALL.code, code, true);
    argument.setUint16(abi.ROOT_HVCALL.reps, reps, true);
    argument.setUint16(abi.ROOT_HVCALL.inSize, inSize, true);
    argument.setUint16(abi.ROOT_HVCALL.outSize, outSize, true);
    argument.setBigUint64(abi.ROOT_HVCALL.inPointer, this.#pages.handle.address, true);
    const output = outSize === 0 ? 0n : this.#pages.handle.address + BigInt(PAGE);
    argument.setBigUint64(abi.ROOT_HVCALL.outPointer, output, true);
    const result = this.kernel.ioctlBufferRaw(fd, abi.MSHV_ROOT_HVCALL, new Uint8Array(argument.buffer));
    const status = argument.getUint16(abi.ROOT_HVCALL.status, true);
    return result === 0 || status !== 0 ? status | (argument.getUint16(abi.ROOT_HVCALL.reps, true) << 16) : result;
  }

  clear(): void {
    new Uint8Array(this.input.buffer, this.input.byteOffset, PAGE).fill(0);
  }

  setProperty(code: number, value: bigint): number {
    this.clear();
    this.input.setUint32(abi.PARTITION_PROPERTY.code, code, true);
    this.input.setBigUint64(abi.PARTITION_PROPERTY.value, value, true);
    return this.hypercall(this.partition, abi.HVCALL.SET_PARTITION_PROPERTY, abi.SET_PARTITION_PROPERTY_SIZE);
  }

  set(vp: number, fd: number, registers: Partial<Record<Register, bigint | readonly [bigint, bigint]>>): number {
    this.clear();
    const entries = Object.entries(registers);
    this.input.setUint32(abi.SET_VP_REGISTERS.vpIndex, vp, true);
    entries.forEach(([name, value], index) => {
      const at = abi.SET_VP_REGISTERS.elements + index * abi.REGISTER_ASSOC_SIZE;
      const [low, high] = typeof value === 'bigint' ? [value, 0n] : value;
      this.input.setUint32(at, abi.HV_X64_REGISTER[name as Register], true);
      this.input.setBigUint64(at + abi.REGISTER_ASSOC.value, low, true);
      this.input.setBigUint64(at + abi.REGISTER_ASSOC.value + 8, high, true);
    });
    const size = abi.SET_VP_REGISTERS.elements + entries.length * abi.REGISTER_ASSOC_SIZE;
    return this.hypercall(fd, abi.HVCALL.SET_VP_REGISTERS, size, 0, entries.length);
  }

  get(vp: number, fd: number, name: Register): bigint {
    this.clear();
    this.input.setUint32(abi.GET_VP_REGISTERS.vpIndex, vp, true);
    this.input.setUint32(abi.GET_VP_REGISTERS.names, abi.HV_X64_REGISTER[name], true);
    const status = this.hypercall(fd, abi.HVCALL.GET_VP_REGISTERS, abi.GET_VP_REGISTERS.names + 4, 16, 1);
    if (status !== 1 << 16) throw new Error(`GET_VP_REGISTERS ${name}: ${status}`);
    return this.output.getBigUint64(0, true);
  }

  /** Flat segments, in the mode of a guest's bits; long mode with the first GiB mapped one to one. */
  enter(vp: number, fd: number, bits: 16 | 32 | 64, registers: Partial<Record<Register, bigint>> = {}): void {
    const attributes = (type: number) => BigInt(type | 0x90 | (bits === 64 ? 0xa000 : bits === 32 ? 0xc000 : 0x8000));
    const segment = (type: number): [bigint, bigint] => [0n, 0xffff_ffffn | (8n << 32n) | (attributes(type) << 48n)];
    const data = segment(3);
    if (bits === 64) this.#pageTables();
    this.set(vp, fd, {
      CS: segment(0xb),
      DS: data,
      ES: data,
      SS: data,
      CR0: bits === 16 ? 0x10n : bits === 32 ? 0x11n : 0x8000_0011n,
      CR3: 0x10_0000n,
      CR4: bits === 64 ? 0x620n : 0x600n,
      EFER: bits === 64 ? 0x500n : 0n,
      RIP: BigInt(CODE),
      RFLAGS: 2n,
      RSP: 0x8000n,
      ...registers,
    });
  }

  #pageTables(): void {
    const view = new DataView(this.bytes.buffer, this.bytes.byteOffset, this.bytes.length);
    view.setBigUint64(0x10_0000, 0x10_1023n, true);
    for (let gib = 0; gib < 4; gib++) {
      view.setBigUint64(0x10_1000 + 8 * gib, BigInt(0x10_2023 + gib * PAGE), true);
      for (let index = 0; index < 512; index++) {
        view.setBigUint64(
          0x10_2000 + gib * PAGE + 8 * index,
          BigInt(gib * 0x4000_0000 + index * 0x20_0000) | 0xe3n,
          true,
        );
      }
    }
  }

  load(code: Uint8Array): void {
    this.bytes.set(code, CODE);
  }

  /** @returns the message's type, or the negated errno */
  run(fd: number): number {
    const result = this.kernel.ioctlBufferRaw(fd, abi.MSHV_RUN_VP, new Uint8Array(this.message.buffer));
    return result < 0 ? result : this.message.getUint32(abi.MESSAGE.type, true);
  }

  /** Puts the processor behind the instruction of a port's message. */
  skipPort(vp: number, fd: number, registers: Partial<Record<Register, bigint>> = {}): void {
    const length = BigInt(this.message.getUint8(abi.INTERCEPT.instructionLength) & 0xf);
    this.set(vp, fd, { RIP: this.message.getBigUint64(abi.INTERCEPT.rip, true) + length, ...registers });
  }

  close(vps: readonly number[]): void {
    for (const fd of vps) this.kernel.close(fd);
    this.kernel.close(this.partition);
    this.kernel.close(this.device);
    this.memory.unmap();
    this.#pages.unmap();
  }
}
