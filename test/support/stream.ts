/** A connection of a guest, over which numbers go to and fro all the time. */
import { createInterface } from 'node:readline';
import { expect } from '@jest/globals';
import type { HostProcess, TestHost } from './host.js';

/**
 * Sends numbers to who connects, a thousand ahead, and looks whether they come back one after the other, none lost and none twice. Told
 * a count, it answers when that many more have come.
 */
const STREAM = `
const CHUNK = 256, AHEAD = 4, PACE = 20;
let sent = 0, seen = 0, rest = Buffer.alloc(0), wanted;
const end = (reason) => { console.log(reason); process.exit(1); };
const server = require('node:net').createServer((socket) => {
  server.close();
  const send = () => {
    const numbers = Buffer.alloc(CHUNK * 4);
    for (let at = 0; at < numbers.length; at += 4) numbers.writeUInt32BE(sent++, at);
    socket.write(numbers);
  };
  socket.on('error', (error) => end(String(error))).on('close', () => end('closed'));
  socket.on('data', (bytes) => {
    rest = Buffer.concat([rest, bytes]);
    let at = 0;
    for (; at + 4 <= rest.length; at += 4) {
      const number = rest.readUInt32BE(at);
      if (number !== seen) end(number + ' after ' + seen + ' numbers');
      if (++seen % CHUNK === 0) setTimeout(send, PACE);
    }
    rest = rest.subarray(at);
    if (seen >= wanted) { console.log('more'); wanted = undefined; }
  });
  for (let chunk = 0; chunk < AHEAD; chunk++) send();
});
const [host, port] = process.argv.slice(1);
server.listen(port, host, () => console.log('listens'));
require('node:readline').createInterface({ input: process.stdin }).on('line', (line) => { wanted = seen + Number(line); });
`;

export class Stream {
  readonly #server: HostProcess;
  readonly #lines: AsyncIterator<string, undefined>;

  /** The guest connects to it, and sends back what it gets. */
  constructor(host: TestHost, address: string, port: number) {
    this.#server = host.spawn([process.execPath, '-e', STREAM, address, String(port)]);
    this.#lines = createInterface({ input: this.#server.stdout })[Symbol.asyncIterator]();
  }

  async listens(): Promise<void> {
    expect((await this.#lines.next()).value).toBe('listens');
  }

  /** Waits until many more have come back, than ever were on their way. */
  async flows(): Promise<void> {
    this.#server.stdin.write('2048\n');
    expect((await this.#lines.next()).value).toBe('more');
  }

  async end(): Promise<void> {
    this.#server.kill('SIGKILL');
    await this.#server.exit;
  }
}
