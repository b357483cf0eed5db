/** The `vmm` command, on a host kernel of the caller's choice. */
import packageJson from '../../package.json' with { type: 'json' };
import { readHostFacts } from '../config/host-facts.js';
import type { Api } from '../api/server.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { HYPERVISOR, VMM, vmmContainer, type WorkerScripts } from './container.js';
import { HostOutput, openInherited } from '../vmm/host/host-output.js';
import { reportAndExitCode } from './errors.js';
import { type EventMonitor, openEventMonitor } from './event-monitor.js';
import { openLog } from './logging.js';
import { type Command, parseCommandLine } from './parse.js';

/** For which a process that is to end at once waits until its last lines are read. */
const ABORT_MILLISECONDS = 1000;

/** A process that has been asked for no machine so far is kept for one. */
const IDLE_MILLISECONDS = 1000;

type RunCommand = Extract<Command, { kind: 'run' }>;

async function runVmmProcess(kernel: HostKernel, scripts: WorkerScripts, command: RunCommand): Promise<void> {
  const { apiSocket, eventMonitor, endWith } = command.process;
  const log = openLog(command.process, kernel);
  let events: EventMonitor | undefined;
  try {
    if (eventMonitor !== undefined) events = openEventMonitor(eventMonitor, kernel, log);
    const abort = (error: Error) => {
      let said = '';
      const status = reportAndExitCode(error, { verbose: command.process.verbosity > 0 }, (text) => (said += text));
      const exit = () => kernel.exitNow(status);
      void Promise.allSettled([write(kernel, 2, said), events?.close(), log.close()]).then(exit);
      // Who reads them may be slow.
      setTimeout(exit, ABORT_MILLISECONDS);
    };
    const container = vmmContainer(kernel, command.process, log, events?.tell ?? (() => undefined), scripts, abort);
    const vmm = container.get(VMM);
    const stop = (signal: NodeJS.Signals) => void vmm.shutdownVmm(signal);
    process.on('SIGTERM', stop).on('SIGINT', stop).on('SIGHUP', stop);
    // The power button, for scripts. Without a machine that runs, it has nothing to press.
    process.on('SIGUSR1', () => {
      if (vmm.runs) vmm.powerButton();
    });
    process.on('SIGUSR2', () => vmm.logCounters());
    let api: Api | undefined;
    let unwatch: (() => void) | undefined;
    try {
      if (endWith !== undefined) {
        const { watchOwner } = await import('./end-with.js');
        unwatch = watchOwner(endWith, (reason) => void vmm.shutdownVmm(reason));
      }
      // Most machines have none, and a HTTP server takes memory.
      if (apiSocket !== undefined) {
        const { openApi } = await import('../api/server.js');
        api = await openApi(kernel, apiSocket, vmm, { version: packageJson.version, logger: log });
      }
      if (command.config !== undefined) {
        await vmm.create(command.config);
        await vmm.boot();
      } else if (command.restore !== undefined) {
        const { net_fds: networks = [] } = command.restore;
        await vmm.restore(command.restore, new Map(networks.map(({ id, fds = [] }) => [id, fds])));
      } else setTimeout(() => void vmm.prepare(), IDLE_MILLISECONDS).unref();
      await vmm.ended;
    } finally {
      unwatch?.();
      await vmm.shutdownVmm('the process ends');
      await api?.close();
      container.get(HYPERVISOR).close();
    }
  } finally {
    await events?.close();
    await log.close();
  }
}

/** Text to standard output or error, as far as it is read: who has gone is not told. */
async function write(kernel: HostKernel, fd: 1 | 2, text: string): Promise<void> {
  const ignore = () => undefined;
  const output = new HostOutput(kernel, openInherited(fd), { hold: true, refused: ignore, lost: ignore });
  output.write(Buffer.from(text));
  await output.close();
}

async function execute(kernel: HostKernel, scripts: WorkerScripts, onMachine: () => void): Promise<void> {
  const command = parseCommandLine(process.argv.slice(2), readHostFacts());
  switch (command.kind) {
    case 'help':
    case 'version':
      await write(kernel, 1, `${command.text}\n`);
      break;
    case 'doctor': {
      const { doctor } = await import('./doctor/doctor.js');
      const { text, status } = doctor(kernel, command.json);
      await write(kernel, 1, text);
      process.exitCode = status;
      break;
    }
    case 'remote': {
      const { remote } = await import('./remote/remote.js');
      await write(kernel, 1, await remote(command.argv, kernel));
      break;
    }
    case 'run':
      onMachine();
      await runVmmProcess(kernel, scripts, command);
      break;
  }
}

/**
 * Does what the process's command line says and sets its exit code.
 *
 * @param scripts the scripts that threads run
 * @param onMachine called before a machine is made
 */
export function runVmm(kernel: HostKernel, scripts: WorkerScripts, onMachine: () => void): void {
  const verbose = process.argv.some((argument) => /^-[Vh]*v/.test(argument) || argument === '--verbose');
  execute(kernel, scripts, onMachine).catch(async (error: unknown) => {
    let said = '';
    process.exitCode = reportAndExitCode(error, { verbose }, (text) => (said += text));
    await write(kernel, 2, said);
  });
}
