/** Users' device modules, on the threads that run them. */
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import type { DeviceContext, VirtioDevice } from '../virtio/device.js';
import { type DeviceModule, ModuleDevice, reasonOf } from '../virtio/device-module.js';
import { Pop } from '../virtio/queue/queue.js';
import { serveQueue } from '../virtio/queue/serve.js';
import type { ModuleAnswer, ModuleQuestion } from '../vmm/host/device-module.js';

/** `import()` of what is no part of a bundle, which the launcher gives (launch-worker.ts). */
export type Import = (url: string) => Promise<unknown>;

/** How long a module may take to load, in milliseconds: it may wait for something at its top level. */
const PATIENCE = 10_000;

/** What every device has. */
const METHODS = ['activate', 'kick', 'deactivate', 'close'] as const;

/** @throws Error in one line */
export async function loadModule(file: string, importModule: Import): Promise<DeviceModule> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`it was not loaded within ${PATIENCE / 1000} s`)), PATIENCE);
  });
  try {
    const found = await Promise.race([importModule(pathToFileURL(path.resolve(file)).href), late]);
    for (const name of ['describe', 'create'] as const) {
      if (typeof (found as Partial<DeviceModule>)[name] !== 'function') {
        throw new Error(`accepted is a module that exports the functions describe and create: ${name} is missing`);
      }
    }
    return found as DeviceModule;
  } catch (error) {
    throw new Error(`--device-module path=${file}: ${reasonOf(error)}`, { cause: error });
  } finally {
    clearTimeout(timer);
  }
}

/** Answers what main asks of a module. */
export async function describeModule({ file, setup }: ModuleQuestion, importModule: Import): Promise<ModuleAnswer> {
  try {
    const module = await loadModule(file, importModule);
    try {
      return { description: structuredClone(module.describe(setup)) };
    } catch (error) {
      return { failure: `--device-module path=${file}: describe: ${reasonOf(error)}` };
    }
  } catch (error) {
    return { failure: reasonOf(error) };
  }
}

/** @throws Error in one line */
export function makeDevice(
  module: DeviceModule,
  { file, setup }: ModuleQuestion,
  context: DeviceContext,
): VirtioDevice {
  try {
    return new ModuleDevice(context, (given) => {
      const device = module.create(given, setup, { Pop, serveQueue }) as Partial<VirtioDevice> | undefined;
      const missing = METHODS.find((name) => typeof device?.[name] !== 'function');
      if (missing !== undefined)
        throw new Error(`accepted is a device with ${METHODS.join(', ')}: ${missing} is missing`);
      return device as VirtioDevice;
    });
  } catch (error) {
    throw new Error(`--device-module path=${file}: create: ${reasonOf(error)}`, { cause: error });
  }
}
