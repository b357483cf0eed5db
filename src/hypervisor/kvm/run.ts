/**
 * Running a KVM vCPU: KVM_RUN, its exits and the kick that ends it (Documentation/virt/kvm/api.rst, section 5).
 *
 * `run` and the data accessors are the hot path: they read the shared kvm_run pages through typed arrays that are made
 * once, allocate nothing, and never throw.
 */
import os from 'node:os';
import { closeAll } from '../../sys/close-all.js';
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import { ExitKind, type VcpuExit, type VcpuHandle } from '../hypervisor.js';
import * as abi from './abi.js';

const { EINTR, EAGAIN } = os.constants.errno;

/** What the vCPUs of all architectures have in common. */
export abstract class KvmRunner {
  readonly exit: VcpuExit = { address: 0, size: 1, count: 0, stride: 0, detail: '' };
  readonly #bytes: Uint8Array;
  readonly #halves: Uint16Array;
  readonly #words: Uint32Array;
  /** Where the current exit's data lies in the kvm_run pages, in bytes. */
  #data = 0;

  constructor(
    protected readonly kernel: HostKernel,
    readonly handle: VcpuHandle,
    private readonly mapping: HostMapping,
  ) {
    const buffer = mapping.view(0, handle.run.length);
    this.#bytes = new Uint8Array(buffer);
    this.#halves = new Uint16Array(buffer);
    this.#words = new Uint32Array(buffer);
  }

  run(): ExitKind {
    const result = this.kernel.ioctlRaw(this.handle.fd, abi.KVM_RUN, 0);
    if (result < 0) {
      if (result === -EINTR || result === -EAGAIN) return ExitKind.Interrupted;
      return this.#failed(`KVM_RUN failed with errno ${-result}`);
    }
    switch (this.#words[abi.RUN.exitReason >> 2]) {
      case abi.KVM_EXIT.IO:
        return this.#portExit();
      case abi.KVM_EXIT.MMIO:
        return this.#mmioExit();
      case abi.KVM_EXIT.INTR:
        return ExitKind.Interrupted;
      case abi.KVM_EXIT.SYSTEM_EVENT:
        return this.#systemEvent();
      case abi.KVM_EXIT.FAIL_ENTRY:
        return this.#failed(
          `the processor refused to enter the guest, hardware reason ${this.#hex(abi.RUN.hardwareReason)}`,
        );
      case abi.KVM_EXIT.INTERNAL_ERROR:
        return this.#failed(`KVM internal error, suberror ${this.#words[abi.RUN.internalSuberror >> 2]}`);
      default: {
        const reason = this.#words[abi.RUN.exitReason >> 2];
        return this.architectureExit(reason) ?? this.#failed(`KVM exit ${reason} is not known`);
      }
    }
  }

  /** An exit that only this architecture has. @returns undefined: it is not known */
  protected abstract architectureExit(reason: number): ExitKind | undefined;

  #portExit(): ExitKind {
    const exit = this.exit;
    exit.address = this.#halves[abi.RUN.ioPort >> 1]!;
    exit.size = this.#bytes[abi.RUN.ioSize] as 1 | 2 | 4;
    exit.count = this.#words[abi.RUN.ioCount >> 2]!;
    exit.stride = 0;
    this.#data = this.#words[abi.RUN.ioDataOffset >> 2]!;
    return this.#bytes[abi.RUN.ioDirection] === abi.KVM_EXIT_IO_OUT ? ExitKind.PortWrite : ExitKind.PortRead;
  }

  #mmioExit(): ExitKind {
    const exit = this.exit;
    const length = this.#words[abi.RUN.mmioLength >> 2];
    exit.address = this.#words[abi.RUN.mmioAddress >> 2] + this.#words[(abi.RUN.mmioAddress >> 2) + 1] * 0x1_0000_0000;
    // KVM gives 1 to 8 bytes; an access that crosses a page comes in odd pieces, taken apart into bytes.
    exit.size = length === 4 || length === 8 ? 4 : length === 2 ? 2 : 1;
    exit.count = length / exit.size;
    exit.stride = exit.size;
    this.#data = abi.RUN.mmioData;
    return this.#bytes[abi.RUN.mmioIsWrite] !== 0 ? ExitKind.MmioWrite : ExitKind.MmioRead;
  }

  #systemEvent(): ExitKind {
    const type = this.#words[abi.RUN.systemEventType >> 2];
    if (type === abi.KVM_SYSTEM_EVENT_SHUTDOWN) return ExitKind.SystemPowerOff;
    if (type === abi.KVM_SYSTEM_EVENT_RESET) return ExitKind.SystemReset;
    return this.#failed(`KVM system event ${type} is not known`);
  }

  #failed(detail: string): ExitKind {
    this.exit.detail = detail;
    return ExitKind.Failed;
  }

  #hex(offset: number): string {
    return `0x${this.#words[offset >> 2].toString(16)}`;
  }

  data(index: number): number {
    const { size } = this.exit;
    if (size === 1) return this.#bytes[this.#data + index];
    if (size === 2) return this.#halves[(this.#data >> 1) + index];
    return this.#words[(this.#data >> 2) + index];
  }

  setData(index: number, value: number): void {
    const { size } = this.exit;
    if (size === 1) this.#bytes[this.#data + index] = value;
    else if (size === 2) this.#halves[(this.#data >> 1) + index] = value;
    else this.#words[(this.#data >> 2) + index] = value;
  }

  /** The exits tell all of it. */
  intercepts(): Record<string, number> {
    return {};
  }

  enterThread(): number {
    this.kernel.blockKickSignal();
    // Inside KVM_RUN nothing is blocked, so a kick ends it with EINTR: api.rst, 4.19. The set is the kernel's 64 bits.
    const mask = new Uint8Array(4 + 8);
    new DataView(mask.buffer).setUint32(0, 8, true);
    this.kernel.ioctlBuffer(this.handle.fd, abi.KVM_SET_SIGNAL_MASK, mask);
    return this.kernel.threadId();
  }

  kick(threadId: number): void {
    // The flag covers a kick that arrives before KVM_RUN; the signal, one during it.
    Atomics.store(this.#bytes, abi.RUN.immediateExit, 1);
    this.kernel.kick(threadId);
  }

  acknowledgeKick(): void {
    Atomics.store(this.#bytes, abi.RUN.immediateExit, 0);
    this.kernel.drainKick();
  }

  close(): void {
    closeAll([() => this.mapping.unmap(), () => this.kernel.close(this.handle.fd)]);
  }
}
