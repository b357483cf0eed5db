/** What a machine's process takes of the host's memory beside its guest. */
import fs from 'node:fs';

/** Resident bytes of a process beyond the mapping that is guest RAM: the one of just that size. */
export function memoryBeyondRam(pid: number, ramMib: number): number {
  let resident = 0;
  let size = 0;
  for (const line of fs.readFileSync(`/proc/${pid}/smaps`, 'utf8').split('\n')) {
    const [, name, kib] = /^(Size|Rss): +(\d+) kB$/.exec(line) ?? [];
    if (name === 'Size') size = Number(kib);
    if (name === 'Rss' && size !== ramMib * 1024) resident += Number(kib) * 1024;
  }
  return resident;
}
