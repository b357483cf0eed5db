/** MSHV_GET_VP_STATE and MSHV_SET_VP_STATE: the parts of a virtual processor's state that move as a whole. */
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { EFAULT, EINVAL } from './errno.js';
import { KVM_GET_XSAVE, KVM_SET_XSAVE } from './kvm-abi.js';
import type { Partition } from './partition.js';
import { synicState } from './synic.js';
import type { VirtualProcessor } from './vp.js';

const PAGE = abi.MSHV_HV_PAGE_SIZE;
/** Bit 63 of XCOMP_BV: the compacted form. Intel SDM volume 1, 13.4.3. */
const XCOMP = 0x208;
const COMPACTED = 1n << 63n;
const LEGACY_AND_HEADER = 0x240;

/** @param argument struct mshv_get_set_vp_state, its size written in place @returns 0 or the negated errno */
export function vpState(
  host: HostKernel,
  partition: Partition,
  vp: VirtualProcessor,
  argument: DataView,
  write: boolean,
  bytesAt: (address: bigint, length: number) => Uint8Array | undefined,
): number {
  const at = abi.VP_STATE;
  const type = argument.getUint8(at.type);
  const size = argument.getUint32(at.bufferSize, true);
  const address = argument.getBigUint64(at.buffer, true);
  const reserved = (argument.getUint32(at.type, true) & 0xffff_ff00) !== 0;
  const types = Object.keys(abi.MSHV_VP_STATE).length;
  if (type >= types || reserved || size === 0 || size % PAGE !== 0 || address % BigInt(PAGE) !== 0n) return -EINVAL;
  const needed = type === abi.MSHV_VP_STATE.SYNTHETIC_TIMERS ? abi.SYNTHETIC_TIMERS_STATE_SIZE : PAGE;
  argument.setUint32(at.bufferSize, needed, true);
  if (needed > size) return -EINVAL;
  const whole = bytesAt(address, size);
  if (whole === undefined) return -EFAULT;
  const bytes = whole.subarray(0, needed);
  switch (type) {
    case abi.MSHV_VP_STATE.LAPIC: {
      // Its mode is in a register that may have been set just now.
      const result = vp.processor.flush();
      if (result < 0) return result;
      const { frozen } = partition.clocks;
      const apic = partition.localApic(vp.index);
      return write ? apic.write(bytes, frozen, vp.processor) : apic.read(bytes, frozen);
    }
    case abi.MSHV_VP_STATE.XSAVE:
      return xsave(host, vp.processor.fd, bytes, write);
    default: {
      const kept = synicState(partition.shared, partition.index, vp.index, type);
      if (write) kept.set(bytes);
      else bytes.set(kept);
      return 0;
    }
  }
}

/** In compacted form; of what comes after the header, AVX alone has a place that both forms agree on. */
function xsave(host: HostKernel, fd: number, bytes: Uint8Array, write: boolean): number {
  const area = new Uint8Array(PAGE);
  if (write) {
    area.set(bytes);
    const header = new DataView(area.buffer, XCOMP, 8);
    if ((header.getBigUint64(0, true) & COMPACTED) === 0n) return -EINVAL;
    header.setBigUint64(0, 0n, true);
    return host.ioctlBufferRaw(fd, KVM_SET_XSAVE, area);
  }
  const result = host.ioctlBufferRaw(fd, KVM_GET_XSAVE, area);
  if (result < 0) return result;
  const view = new DataView(area.buffer);
  // Software bytes are KVM's.
  area.fill(0, 464, 512);
  view.setBigUint64(XCOMP, COMPACTED | 7n, true);
  area.fill(0, XCOMP + 8, LEGACY_AND_HEADER);
  bytes.set(area);
  return 0;
}
