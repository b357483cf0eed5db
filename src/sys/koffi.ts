/**
 * koffi's native part, by itself: the JavaScript around it looks for that part, which costs a thread as much time as all else that it
 * loads does, and keeps names of older versions.
 */
import { createRequire } from 'node:module';
import type koffiPackage from 'koffi';

type Koffi = typeof koffiPackage;

/** Where koffi's package for this processor has the part that is linked to glibc. */
const NATIVE = `@koromix/koffi-linux-${process.arch}/linux_${process.arch}/koffi.node`;

function load(): Koffi {
  const require = createRequire(import.meta.url);
  try {
    return require(NATIVE) as Koffi;
  } catch {
    // Another libc, or koffi was built on this machine.
    return require('koffi') as Koffi;
  }
}

export const koffi = load();
