/** Which pages of a simulated partition's memory its guest has written to, from KVM's log. */
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { E2BIG, EFAULT, EINVAL, EIO } from './errno.js';
import * as k from './kvm-abi.js';
import type { Partition } from './partition.js';
import { DIRTY_BYTES, P, type Shared } from './shared.js';

const PAGE = abi.MSHV_HV_PAGE_SIZE;

export class DirtyPages {
  constructor(
    private readonly host: HostKernel,
    private readonly shared: Shared,
    private readonly partition: Partition,
  ) {}

  /** Of the bitmap. */
  get #start(): number {
    return this.shared.dirty(this.partition.index);
  }

  clear(): void {
    this.shared.bytes.fill(0, this.#start, this.#start + DIRTY_BYTES);
  }

  /** MSHV_GET_GPAP_ACCESS_BITMAP; every page counts as accessed. */
  accessBitmap(argument: DataView, bytesAt: (address: bigint, length: number) => Uint8Array | undefined): number {
    const at = abi.GPAP_BITMAP;
    const type = argument.getUint8(at.type);
    const operation = argument.getUint8(at.operation);
    const count = argument.getBigUint64(at.pageCount, true);
    const bitmap = argument.getBigUint64(at.bitmap, true);
    for (let byte = at.operation + 1; byte < at.pageCount; byte++) if (argument.getUint8(byte) !== 0) return -EINVAL;
    if (type > 1 || operation > 2 || count === 0n || bitmap === 0n) return -EINVAL;
    if (count >= 1n << 40n) return -E2BIG;
    // HV_STATUS_INVALID_PARTITION_STATE: nothing is tracked.
    if (this.partition.word(P.tracking) === 0) return -EIO;
    const into = bytesAt(bitmap, Math.ceil(Number(count) / 8));
    if (into === undefined) return -EFAULT;
    const first = Number(argument.getBigUint64(at.gpapBase, true));
    if ((first + Number(count)) / 8 > DIRTY_BYTES) return -EINVAL;
    return this.partition.locked(() => {
      const result = this.#collectDirty();
      if (result < 0) return result;
      into.fill(0);
      const bits = this.#start;
      for (let page = 0; page < Number(count); page++) {
        const byte = bits + ((first + page) >> 3);
        const bit = 1 << ((first + page) & 7);
        const dirty = (this.shared.bytes[byte] & bit) !== 0;
        if (dirty || type === abi.MSHV_GPAP_ACCESS_TYPE.ACCESSED) into[page >> 3] |= 1 << (page & 7);
        // What is not accessed is not dirty. The driver takes any other operation for SET, NOOP as well.
        if (operation === abi.MSHV_GPAP_ACCESS_OP.CLEAR) this.shared.bytes[byte] &= ~bit;
        else if (type === abi.MSHV_GPAP_ACCESS_TYPE.DIRTY) this.shared.bytes[byte] |= bit;
      }
      return 0;
    });
  }

  /** KVM forgets what it tells, the hypervisor only when it is told to: so the bits are kept here. */
  #collectDirty(): number {
    for (const { used, slot, guest, size } of this.partition.regions()) {
      if (!used) continue;
      const log = new Uint8Array(Math.ceil(Number(size) / PAGE / 64) * 8);
      const page = this.host.map({ length: Math.ceil(log.length / PAGE) * PAGE, shared: false });
      try {
        const argument = new Uint8Array(16);
        const view = new DataView(argument.buffer);
        view.setUint32(0, slot, true);
        view.setBigUint64(8, page.handle.address, true);
        const result = this.host.ioctlBufferRaw(this.partition.word(P.fd), k.KVM_GET_DIRTY_LOG, argument);
        if (result < 0) return result;
        log.set(new Uint8Array(page.view(0, log.length)));
      } finally {
        page.unmap();
      }
      const first = Number(guest) / PAGE;
      for (let index = 0; index < log.length * 8; index++) {
        if (log[index >> 3] === 0) index |= 7;
        else if ((log[index >> 3] & (1 << (index & 7))) !== 0)
          this.shared.bytes[this.#start + ((first + index) >> 3)] |= 1 << ((first + index) & 7);
      }
    }
    return 0;
  }
}
