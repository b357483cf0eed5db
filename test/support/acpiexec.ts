/**
 * ACPICA's interpreter, `acpiexec` (package acpica-tools): runs the methods of a DSDT over memory that it makes up for the
 * operation regions. What is written there is read again; a register with effects it does not know.
 */
import { execFile } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

/** An access to an operation region. */
export interface RegionAccess {
  readonly kind: 'read' | 'write';
  /** The low 32 bits, as the interpreter prints them. */
  readonly address: number;
  readonly bytes: number;
  readonly value: number;
}

export interface Evaluation {
  /** In the order in which they came. */
  readonly accesses: readonly RegionAccess[];
  /** Name and value, such as `S005 3`, sorted: each comes on a thread of its own, as it would in a kernel. */
  readonly notifications: readonly string[];
  /** What the method returned: an integer or a buffer's bytes; undefined where it returned nothing. */
  readonly result: number | readonly number[] | undefined;
  /** Lines in which the interpreter finds fault. */
  readonly complaints: readonly string[];
}

/**
 * Evaluates a method after devices have been initialized.
 *
 * @param call path and arguments, such as `\_SB.PC00.S001._EJ0 1`
 * @param fields initial values of fields of operation regions, by path; others are 0
 */
export async function evaluate(
  dsdt: Uint8Array,
  call: string,
  fields: Readonly<Record<string, number>> = {},
): Promise<Evaluation> {
  const output = await interpret(dsdt, call, fields);
  const complaints = output.split('\n').filter((line) => /\bACPI.*(Error|Warning)|\bAE_|exception/i.test(line));
  const start = output.indexOf('\nEvaluating ');
  if (start < 0) throw new Error(output);
  const text = output.slice(start);
  const accesses = [...text.matchAll(/SystemMemory (Read|Write) ?: Val (\w+) Addr (\w+) BitWidth (\w+)/g)].map(
    (match) => {
      const [value, address, bits] = match.slice(2).map((digits) => parseInt(digits, 16));
      return { kind: match[1] === 'Read' ? 'read' : 'write', address, bytes: bits / 8, value } as const;
    },
  );
  const notifications = [...text.matchAll(/Received a \w+ Notify on \[(\w+)\] \w+ Value (\w+)/g)]
    .map(([, device, value]) => `${device} ${Number(value)}`)
    .sort();
  return { accesses, notifications, result: resultOf(text), complaints };
}

/** It sleeps a second before it ends: tests run several at once. */
async function interpret(dsdt: Uint8Array, call: string, fields: Readonly<Record<string, number>>): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'vmm-acpiexec-'));
  try {
    const values = Object.entries(fields).map(([path, value]) => `${path} 0x${value.toString(16)}\n`);
    await writeFile(join(directory, 'fields'), values.join(''));
    await writeFile(join(directory, 'dsdt.aml'), dsdt);
    const init = values.length > 0 ? ['-fi', 'fields'] : [];
    const args = ['-vr', ...init, '-b', `evaluate ${call}`, 'dsdt.aml'];
    const limits = { cwd: directory, maxBuffer: 2 ** 26, timeout: 60_000 };
    const { stdout, stderr } = await promisify(execFile)('acpiexec', args, limits);
    return stdout + stderr;
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

function resultOf(text: string): Evaluation['result'] {
  const number = /^ {2}\[Integer\] = (\w+)$/m.exec(text);
  if (number !== null) return parseInt(number[1], 16);
  const buffer = /\[Buffer\] Length \w+ = ([^[]*)/.exec(text);
  if (buffer === null) return undefined;
  return [...buffer[1].matchAll(/^ *[0-9A-F]+: ((?:[0-9A-F]{2} )+)/gm)].flatMap(([, row]) =>
    row
      .trim()
      .split(' ')
      .map((byte) => parseInt(byte, 16)),
  );
}
