/** The ACPICA compiler and disassembler, `iasl` (package acpica-tools): an independent reader of ACPI tables. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** Runs `work` in a directory of its own that is gone afterwards. */
function inScratch<T>(work: (directory: string) => T): T {
  const directory = mkdtempSync(join(tmpdir(), 'vmm-iasl-'));
  try {
    return work(directory);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function iasl(directory: string, args: readonly string[]): { output: string; status: number | null } {
  const { error, stdout, stderr, status } = spawnSync('iasl', args, {
    cwd: directory,
    encoding: 'utf8',
    maxBuffer: 2 ** 26,
  });
  if (error !== undefined) throw error;
  return { output: stdout + stderr, status };
}

export interface Disassembly {
  /** The text of each table, by signature. */
  readonly dsl: Readonly<Record<string, string>>;
  /** Lines in which iasl finds fault with a table. */
  readonly complaints: readonly string[];
}

/** Disassembles tables of different signatures in one process; one of them at most may be of AML, as all share a namespace. */
export function disassemble(tables: readonly Uint8Array[]): Disassembly {
  return inScratch((directory) => {
    const signatures = tables.map((table) => Buffer.from(table.subarray(0, 4)).toString('latin1'));
    signatures.forEach((signature, index) => writeFileSync(join(directory, `${signature}.dat`), tables[index]));
    const { output, status } = iasl(directory, ['-d', ...signatures.map((signature) => `${signature}.dat`)]);
    const dsl = Object.fromEntries(
      signatures.map((signature) => [signature, readFileSync(join(directory, `${signature}.dsl`), 'latin1')]),
    );
    const lines = [output, ...Object.values(dsl)].flatMap((text) => text.split('\n'));
    const complaints = lines.filter((line) => /error|warning|incorrect|invalid|unknown|\*\*\*\*|could not/i.test(line));
    return { dsl, complaints: status === 0 ? complaints : [...complaints, `iasl ended with ${status}`] };
  });
}

export interface Compilation {
  /** Iasl's last line, such as `Compilation successful. 0 Errors, 0 Warnings, 0 Remarks, 0 Optimizations`. */
  readonly summary: string;
  /** The whole table, header included; not optimized. */
  readonly aml: Uint8Array;
}

export function compile(dsl: string): Compilation {
  return inScratch((directory) => {
    writeFileSync(join(directory, 'table.dsl'), dsl, 'latin1');
    const { output } = iasl(directory, ['-oa', '-p', 'table', 'table.dsl']);
    const summary = output.split('\n').find((line) => line.startsWith('Compilation')) ?? output;
    if (!summary.startsWith('Compilation successful')) throw new Error(output);
    return { summary, aml: readFileSync(join(directory, 'table.aml')) };
  });
}
