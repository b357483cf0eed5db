/** What an I/O worker runs. */
import { LinuxKernel } from '../sys/linux-kernel.js';
import { runIoThread } from './io-thread.js';

runIoThread(new LinuxKernel());
