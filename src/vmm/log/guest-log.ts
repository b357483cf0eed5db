/**
 * Log lines, and other things that a guest can make main say: each device has a budget for each kind of them, and what is beyond it is
 * counted and told later.
 */
import { budgetLayout, MessageBudget } from '../../state/message-budget.js';
import { StateBlock } from '../../state/state-block.js';

type Level = 'info' | 'warn';

/** How much a device would have said, and was not let. Structured-cloneable. */
export interface LeftOut {
  readonly device: string;
  readonly count: number;
}
/** What has a budget: lines of a level, and events for programs. */
type Kind = Level | 'event';

export class GuestLog {
  readonly #budgets = new Map<string, { device: string; kind: Kind; budget: MessageBudget }>();

  constructor(
    private readonly write: (level: Level, line: string, leftOut?: LeftOut) => void,
    private readonly milliseconds: () => number = () => performance.now(),
  ) {}

  /** @param device whose budget the line is on: one of a bounded number of names */
  log(device: string, level: Level, line: string): void {
    if (this.allows(device, level)) this.write(level, line);
  }

  /** Whether something may be told now; takes it from the device's budget. */
  allows(device: string, kind: Kind): boolean {
    const key = `${kind} ${device}`;
    let entry = this.#budgets.get(key);
    if (entry === undefined) {
      const budget = new MessageBudget(new StateBlock(budgetLayout), this.milliseconds);
      entry = { device, kind, budget };
      this.#budgets.set(key, entry);
    }
    const refused = entry.budget.take();
    if (refused < 0) return false;
    this.leftOut(device, kind, refused);
    return true;
  }

  /** Tells that some were left out. */
  leftOut(device: string, kind: Kind, count: number): void {
    if (count === 0) return;
    const what = kind === 'event' ? 'events' : 'lines like the last';
    this.write(kind === 'event' ? 'warn' : kind, `${device}: ${count} ${what} were left out`, { device, count });
  }

  /** Tells what was left out and not told yet. */
  close(): void {
    for (const { device, kind, budget } of this.#budgets.values()) this.leftOut(device, kind, budget.refused());
  }
}
