/** Requests to the REST API of a `vmm` on the test host. What it answers is what its OpenAPI document says, or the test fails. */
import { checkAnswer } from './api-document.js';
import type { HostProcess, TestHost } from './host.js';

export interface ApiAnswer {
  readonly status: number;
  readonly body: unknown;
}

export const DONE: ApiAnswer = { status: 204, body: undefined };

/** One request, from the machine that runs vmm. */
export async function askApi(
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
  const answer = { status: Number(status), body: text === '' ? undefined : (JSON.parse(text) as unknown) };
  checkAnswer(method, name, answer);
  return answer;
}

/** It has its name before it listens. Without one, the folder's next change tells. */
const UNTIL_LISTENS = `
  const untilListens = (socket) => new Promise((resolve) => {
    const net = require('node:net');
    const attempt = () => {
      const client = net.connect(socket, () => {
        watcher.close();
        client.destroy();
        resolve();
      });
      client.on('error', ({ code }) => code === 'ECONNREFUSED' && setImmediate(attempt));
    };
    const watcher = require('node:fs').watch(require('node:path').dirname(socket), attempt);
    attempt();
  });`;

/** Waits until somebody listens at a path. */
export async function untilListens(host: TestHost, socket: string): Promise<void> {
  const script = `${UNTIL_LISTENS} untilListens(process.argv[1]).then(() => process.exit());`;
  const { status, stderr } = await host.run([process.execPath, '-e', script, socket]);
  if (status !== 0) throw new Error(stderr);
}

/** A client of the API on the machine that runs vmm. */
export class ApiClient {
  readonly #client: HostProcess;
  readonly #waiting: ((answer: ApiAnswer) => void)[] = [];
  #text = '';

  /** Each line is a request, and so is each line of the answers: a process for each would take seconds in a lab. */
  constructor(host: TestHost, socketPath: string) {
    const script = `${UNTIL_LISTENS}
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
      const listens = () => untilListens(socketPath).then(() => ({ status: 204, text: '' }));
      lines.on('line', (line) => {
        const [method, ...wanted] = JSON.parse(line);
        const answer = method === 'listens' ? listens() : ask(method, ...wanted);
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

  #tell(...words: readonly (string | undefined)[]): Promise<ApiAnswer> {
    return new Promise((resolve) => {
      this.#waiting.push(resolve);
      this.#client.stdin.write(`${JSON.stringify(words)}\n`);
    });
  }

  /** Waits until somebody listens there, as `untilListens` does, without a process for it. */
  async listens(): Promise<void> {
    await this.#tell('listens');
  }

  async #ask(method: 'GET' | 'PUT', name: string, body?: unknown): Promise<ApiAnswer> {
    const answer = await this.#tell(method, name, body === undefined ? undefined : JSON.stringify(body));
    // 0: there was none.
    if (answer.status !== 0) checkAnswer(method, name, answer);
    return answer;
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
