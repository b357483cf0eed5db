/** `npm run bench -- NAME [--json]`: runs a benchmark and prints its table, or one JSON array on standard output. */
import { benchExits } from './exits.js';
import { table, type Row } from './report.js';

const BENCHMARKS: Readonly<Record<string, () => Row[] | Promise<Row[]>>> = {
  exits: benchExits,
};

const args = process.argv.slice(2);
const json = args.includes('--json');
const names = args.filter((arg) => arg !== '--json');
const benchmark = names.length === 1 ? BENCHMARKS[names[0]!] : undefined;
if (benchmark === undefined) {
  console.error(`bench: accepted is one of: ${Object.keys(BENCHMARKS).join(', ')}; and --json`);
  process.exitCode = 2;
} else {
  const rows = await benchmark();
  console.log(json ? JSON.stringify(rows) : table(rows));
}
