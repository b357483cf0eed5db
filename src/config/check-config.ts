/** The one check that every configuration passes, whoever made it: schema, then the facts of the host. */
import { type ConfigProblem, findHostProblem, type HostFacts } from './host-facts.js';
import { TAKEN, type VmConfig, vmConfigSchema } from './vm-config.js';

export type CheckedConfig = { readonly config: VmConfig } | { readonly problem: ConfigProblem };

/** @param input in the schema's own names */
export function checkConfig(input: unknown, host: HostFacts): CheckedConfig {
  const { data: config, error } = vmConfigSchema.safeParse(input);
  const issue = error?.issues[0];
  if (config === undefined) {
    const taken = issue?.code === 'custom' && issue.params === TAKEN;
    return { problem: { path: issue?.path ?? [], accepted: issue?.message ?? '', taken } };
  }
  const problem = findHostProblem(config, host);
  return problem === undefined ? { config } : { problem };
}

/** The console where none is asked for: the terminal, unless the serial port has it. @param serial as it was given */
export function consoleBeside(serial: unknown): { readonly mode: 'Off' | 'Tty' } {
  const taken = typeof serial === 'object' && serial !== null && 'mode' in serial && serial.mode === 'Tty';
  return { mode: taken ? 'Off' : 'Tty' };
}
