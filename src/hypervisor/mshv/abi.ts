/**
 * The ABI of the Microsoft hypervisor's root partition driver that this backend uses: requests of /dev/mshv, hypercalls that
 * are passed through, register names, partition properties and the layouts of intercept messages.
 *
 * Sources: linux/mshv.h and include/hyperv/*.h of Linux >= 6.15; the Hypervisor Top-Level Functional Specification (TLFS)
 * for what those leave out. A unit test compiles a C probe against the kernel's headers and compares every value here with
 * it. All structures are packed and little-endian.
 */
export * from './abi/driver.js';
export * from './abi/hypercalls.js';
export * from './abi/messages.js';
export * from './abi/properties.js';
export * from './abi/registers.js';
export * from './abi/vp-state.js';
