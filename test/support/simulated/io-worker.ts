import { runIoThread } from '../../../src/threads/io-thread.js';
import { SimulatedMshvKernel } from '../mshv/simulated-kernel.js';

runIoThread(new SimulatedMshvKernel());
