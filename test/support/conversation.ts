/** A guest that does what it is told, line by line, and a client of its machine's API. */
import type { Guest } from './guest.js';
import type { HostProcess, TestHost } from './host.js';

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

/** A client of the API on the machine that runs vmm. */
export class ApiClient {
  readonly #client: HostProcess;
  readonly #waiting: ((answer: ApiAnswer) => void)[] = [];
  #text = '';

  /** Each line is a request, and so is each line of the answers: a process for each would take seconds in a lab. */
  constructor(host: TestHost, socketPath: string) {
    const script = `
      const http = require('node:http'), [socketPath] = process.argv.slice(1);
      const lines = require('node:readline').createInterface({ input: process.stdin });
      let last = Promise.resolve();
      const ask = (method, name, body) => new Promise((resolve) => {
        const request = http.request({ socketPath, method, path: '/api/v1/' + name, agent: false }, (response) => {
          let text = '';
          response.on('data', (bytes) => (text += bytes)).on('end', () => resolve({ status: response.statusCode, text }));
        });
        request.on('error', (error) => resolve({ status: 0, text: JSON.stringify(String(error)) }));
        request.end(body);
      });
      lines.on('line', (line) => {
        const answer = ask(...JSON.parse(line));
        last = last.then(() => answer).then((found) => console.log(JSON.stringify(found)));
      });`;
    this.#client = host.spawn([process.execPath, '-e', script, socketPath]);
    this.#client.stdout.on('data', (bytes: Buffer) => {
      this.#text += bytes.toString();
      const lines = this.#text.split('\n');
      this.#text = lines.pop()!;
      for (const line of lines) {
        const { status, text } = JSON.parse(line) as { status: number; text: string };
        this.#waiting.shift()!({ status, body: text === '' ? undefined : JSON.parse(text) });
      }
    });
  }

  #ask(method: 'GET' | 'PUT', name: string, body?: unknown): Promise<ApiAnswer> {
    return new Promise((resolve) => {
      this.#waiting.push(resolve);
      this.#client.stdin.write(
        `${JSON.stringify([method, name, body === undefined ? undefined : JSON.stringify(body)])}\n`,
      );
    });
  }

  get(name: string): Promise<ApiAnswer> {
    return this.#ask('GET', name);
  }

  put(name: string, body?: unknown): Promise<ApiAnswer> {
    return this.#ask('PUT', name, body);
  }

  async close(): Promise<void> {
    this.#client.stdin.end();
    await this.#client.exit;
  }
}
