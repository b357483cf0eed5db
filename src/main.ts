/** The `vmm` command, as launch.ts runs it. */
import { HYPERVISOR, machineContainer, MACHINE } from './cli/container.js';
import { reportAndExitCode } from './cli/errors.js';
import { openLog } from './cli/logging.js';
import { type Command, parseCommandLine } from './cli/parse.js';
import { readHostFacts } from './config/host-facts.js';

/** The scripts of the threads: bundles of their own beside this one, see tools/build.mjs. */
const script = (name: string) => new URL(name, `file://${__filename}`);
const SCRIPTS = { vcpu: script('vcpu-worker.js'), io: script('io-worker.js') };

async function runMachine(command: Extract<Command, { kind: 'run' }>): Promise<void> {
  const log = openLog(command.process);
  try {
    const container = machineContainer(command.config, command.process, log, SCRIPTS);
    const machine = container.get(MACHINE);
    const stop = (signal: NodeJS.Signals) => machine.stop(signal);
    process.on('SIGTERM', stop).on('SIGINT', stop).on('SIGHUP', stop);
    // The power button, for scripts.
    process.on('SIGUSR1', () => machine.powerButton());
    process.on('SIGUSR2', () => machine.logCounters());
    try {
      await machine.run();
    } finally {
      container.get(HYPERVISOR).close();
    }
  } finally {
    await log.close();
  }
}

async function main(): Promise<void> {
  const command = parseCommandLine(process.argv.slice(2), readHostFacts());
  switch (command.kind) {
    case 'help':
    case 'version':
      process.stdout.write(`${command.text}\n`);
      break;
    case 'doctor': {
      const { doctor } = await import('./cli/doctor/doctor.js');
      process.exitCode = doctor(command.json);
      break;
    }
    case 'run':
      await runMachine(command);
      break;
  }
}

const verbose = process.argv.some((argument) => /^-[Vh]*v/.test(argument) || argument === '--verbose');
main().catch((error: unknown) => {
  process.exitCode = reportAndExitCode(error, { verbose });
});
