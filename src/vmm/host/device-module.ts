/**
 * What a user's module says of its device. It is asked on a thread of its own, which ends with the answer: nothing of the user's ever runs
 * on main's thread, and what never comes to an end is ended.
 */
import { Worker } from 'node:worker_threads';
import { descriptionSchema } from '../../config/device-description.js';
import type { VirtioDescription } from '../../virtio/device.js';
import type { DeviceSetup } from '../../virtio/device-module.js';
import { MachineError } from '../machine/machine-error.js';
import { QUIET } from '../thread-streams.js';

/** What such a thread is started with, in place of devices. */
export interface ModuleQuestion {
  readonly file: string;
  readonly setup: DeviceSetup;
}

export type ModuleAnswer = { readonly description: unknown } | { readonly failure: string };

/** Milliseconds that it may take, more than a module may take to load. */
const PATIENCE = 15_000;

/** @param script that I/O workers run @throws MachineError in one line */
export async function askModule(script: URL, question: ModuleQuestion): Promise<VirtioDescription> {
  const option = `--device-module path=${question.file}`;
  const worker = new Worker(script, { name: 'describe', workerData: { question }, ...QUIET });
  let timer: NodeJS.Timeout | undefined;
  let answer: ModuleAnswer;
  try {
    answer = await new Promise((resolve) => {
      const failed = (why: string) => resolve({ failure: `${option}: ${why}` });
      worker.once('message', resolve);
      worker.once('error', (error) => failed(error.message.split('\n')[0]));
      worker.once('exit', () => failed('its thread ended before it described the device'));
      timer = setTimeout(() => failed(`the device was not described within ${PATIENCE / 1000} s`), PATIENCE);
    });
  } finally {
    clearTimeout(timer);
    await worker.terminate();
  }
  if ('failure' in answer) throw new MachineError(answer.failure);
  const { data, error } = descriptionSchema.safeParse(answer.description);
  const issue = error?.issues[0];
  if (data !== undefined) return data;
  const field = issue!.path.length === 0 ? '' : `${issue!.path.join('.')}: `;
  throw new MachineError(`${option}: describe: ${field}accepted is ${issue!.message}`);
}
