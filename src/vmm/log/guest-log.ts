/** Log lines that a guest can cause: each device has a budget for each level, and lines beyond it are counted and told later. */
import { budgetLayout, MessageBudget } from '../../state/message-budget.js';
import { StateBlock } from '../../state/state-block.js';

type Level = 'info' | 'warn';

export class GuestLog {
  readonly #budgets = new Map<string, { device: string; level: Level; budget: MessageBudget }>();

  constructor(
    private readonly write: (level: Level, line: string) => void,
    private readonly milliseconds: () => number = () => performance.now(),
  ) {}

  /** @param device whose budget the line is on: one of a bounded number of names */
  log(device: string, level: Level, line: string): void {
    const key = `${level} ${device}`;
    let entry = this.#budgets.get(key);
    if (entry === undefined) {
      const budget = new MessageBudget(new StateBlock(budgetLayout), this.milliseconds);
      entry = { device, level, budget };
      this.#budgets.set(key, entry);
    }
    const refused = entry.budget.take();
    if (refused < 0) return;
    this.leftOut(device, level, refused);
    this.write(level, line);
  }

  /** Tells that lines, or what would have become lines, were left out. */
  leftOut(device: string, level: Level, count: number): void {
    if (count > 0) this.write(level, `${device}: ${count} lines like the last were left out`);
  }

  /** Tells what was left out and not told yet. */
  close(): void {
    for (const { device, level, budget } of this.#budgets.values()) this.leftOut(device, level, budget.refused());
  }
}
