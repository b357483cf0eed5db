/** What an I/O worker runs. */
import { LinuxKernel } from '../sys/linux-kernel.js';
import type { Import } from './device-module.js';
import { startIoThread } from './io-thread.js';

/** The launcher's (launch-worker.ts). */
declare const importModule: Import;

startIoThread(new LinuxKernel(), importModule);
