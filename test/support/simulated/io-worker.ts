import type { Import } from '../../../src/threads/device-module.js';
import { startIoThread } from '../../../src/threads/io-thread.js';
import { SimulatedMshvKernel } from '../mshv/simulated-kernel.js';

declare const importModule: Import;

startIoThread(new SimulatedMshvKernel(), importModule);
