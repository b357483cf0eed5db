/** One figure of a benchmark: ours beside the peer's, from the same run. */
export interface Row {
  readonly figure: string;
  readonly unit: string;
  readonly ours: number;
  readonly peer: number;
  readonly peerName: string;
  /** ours / peer */
  readonly ratio: number;
  readonly better: 'lower' | 'higher';
}

/** A row whose ratio is the one of the two figures given. */
export function row(figure: string, unit: string, ours: number, peer: number, peerName: string): Row {
  return { figure, unit, ours: round(ours), peer: round(peer), peerName, ratio: round(ours / peer), better: 'lower' };
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function round(value: number): number {
  return Number(value.toPrecision(4));
}

export function table(rows: readonly Row[]): string {
  const cells = [
    ['figure', 'unit', 'ours', 'peer', 'peer is', 'ratio', 'better'],
    ...rows.map((r) => [r.figure, r.unit, String(r.ours), String(r.peer), r.peerName, r.ratio.toFixed(2), r.better]),
  ];
  const widths = cells[0].map((_, column) => Math.max(...cells.map((line) => line[column].length)));
  return cells
    .map((line) =>
      line
        .map((cell, column) => cell.padEnd(widths[column]))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}
