/** The devicetree compiler, `dtc` (package device-tree-compiler): an independent reader of devicetrees. */
import { spawnSync } from 'node:child_process';

function dtc(args: readonly string[], input: Uint8Array | string): { output: Buffer; complaints: string } {
  const { error, stdout, stderr, status } = spawnSync('dtc', [...args, '-o', '-', '-'], {
    input,
    maxBuffer: 2 ** 26,
  });
  if (error !== undefined) throw error;
  const text = stderr.toString();
  return { output: stdout, complaints: status === 0 ? text : `${text}dtc ended with ${status}` };
}

/** @returns the source, and what dtc finds fault with */
export function decompile(blob: Uint8Array): { source: string; complaints: string } {
  const { output, complaints } = dtc(['-I', 'dtb', '-O', 'dts'], blob);
  return { source: output.toString(), complaints };
}

/** Without the checks: a source that was decompiled refers to nothing by name. */
export function compile(source: string): Buffer {
  const { output, complaints } = dtc(['-q', '-I', 'dts', '-O', 'dtb'], source);
  if (complaints !== '') throw new Error(complaints);
  return output;
}
