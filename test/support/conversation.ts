/** A guest that does what it is told, line by line. */
import type { Guest } from './guest.js';

/** What the guest runs: a shell whose lines come one by one, so that it does nothing unasked. */
export const LISTEN = `
true
while echo "@@done-$?@@"; read -r line; do
  eval "$line" </dev/null
done`;

/** Waits in the guest for a device: its node is there a moment before the kernel lets it be opened. */
export const opens = (node: string) => `until true 2>/dev/null <${node}; do sleep 0.1; done`;

export class Conversation {
  #from = 0;

  constructor(private readonly guest: Guest) {}

  /** Waits until the guest listens; also for a reboot. @returns what it has said since it was told something last */
  async listens(): Promise<string> {
    await this.guest.waitFor(/@@done-\d+@@/, this.#from);
    const [all, before, status] = /^([^]*?)@@done-(\d+)@@/.exec(this.guest.console.slice(this.#from))!;
    this.#from += all.length;
    if (status !== '0') throw new Error(before);
    return before;
  }

  /** @returns what the command printed @throws Error when it failed */
  async run(command: string): Promise<string> {
    this.guest.type(`${command}\n`);
    return this.listens();
  }

  /** Tells it something, and does not wait. */
  begin(command: string): void {
    this.guest.type(`${command}\n`);
  }
}
