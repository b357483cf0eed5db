/** Machine code of guests of a few instructions. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

/** @param source for GNU as on x86_64, whose labels are used relative to where they are used @returns what may be anywhere */
export function machineCode(source: string): Buffer {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-code-'));
  try {
    const [assembly, object, code] = ['code.s', 'code.o', 'code'].map((name) => path.join(folder, name));
    fs.writeFileSync(assembly, source);
    execFileSync('as', ['-o', object, assembly]);
    execFileSync('objcopy', ['-O', 'binary', '-j', '.text', object, code]);
    return fs.readFileSync(code);
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
