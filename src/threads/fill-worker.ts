/** What the thread runs that reads memory as it is touched. */
import { LinuxKernel } from '../sys/linux-kernel.js';
import { runFillThread } from './fill-thread.js';

runFillThread(new LinuxKernel());
