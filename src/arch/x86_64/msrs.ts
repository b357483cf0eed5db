/** Model-specific registers of a processor that starts a kernel without firmware. */
import type { Msr } from '../../hypervisor/x86-state.js';

const IA32_MISC_ENABLE = 0x1a0;
const MISC_ENABLE_FAST_STRING = 1n;
const IA32_MTRR_DEF_TYPE = 0x2ff;
/** MTRRs enabled, everything write-back: what firmware would have set up for RAM (Intel SDM volume 3, 12.11.2.1). */
const MTRR_ENABLE_WRITE_BACK = 0x806n;
/** SYSENTER_CS, _ESP, _EIP, then STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE. */
const ZEROED = [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102];

/**
 * The time-stamp counters are not among them: they start at 0 together, and set one after the other they would differ by the
 * time between.
 */
export function initialMsrs(): Msr[] {
  return [
    ...ZEROED.map((index) => ({ index, value: 0n })),
    { index: IA32_MISC_ENABLE, value: MISC_ENABLE_FAST_STRING },
    { index: IA32_MTRR_DEF_TYPE, value: MTRR_ENABLE_WRITE_BACK },
  ];
}
