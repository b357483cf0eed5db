/** A guest that does what it is told, line by line, and a client of its machine's API. */
import type { Guest } from './guest.js';
import type { TestHost } from './host.js';

/** What the guest runs: a shell whose lines come one by one, so that it does nothing unasked. */
export const LISTEN = `
true
while echo "@@done-$?@@"; read -r line; do
  eval "$line" </dev/null
done`;

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

export interface ApiAnswer {
  readonly status: number;
  readonly body: unknown;
}

export const DONE: ApiAnswer = { status: 204, body: undefined };

/** One request, by a client on the machine that runs vmm. */
export async function request(
  host: TestHost,
  socket: string,
  method: 'GET' | 'PUT',
  name: string,
  body?: unknown,
): Promise<ApiAnswer> {
  const script = `
    const [socketPath, method, path, body] = process.argv.slice(1);
    require('node:http').request({ socketPath, method, path }, (response) => {
      process.stdout.write(response.statusCode + ' ');
      response.pipe(process.stdout);
    }).end(body);`;
  const words = [socket, method, `/api/v1/${name}`, ...(body === undefined ? [] : [JSON.stringify(body)])];
  const { stdout, stderr } = await host.run([process.execPath, '-e', script, ...words]);
  const match = /^(\d+) ([^]*)$/.exec(stdout);
  if (match === null) throw new Error(`${method} ${name}: ${stderr}`);
  const [, status, text] = match;
  return { status: Number(status), body: text === '' ? undefined : (JSON.parse(text) as unknown) };
}
