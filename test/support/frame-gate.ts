/** Stands between the two sides of a migration over TCP, and does something to one of them at a frame that it chooses. */
import { createInterface } from 'node:readline';
import { expect } from '@jest/globals';
import { Frame } from '../../src/vmm/migration/frames.js';
import type { HostProcess, TestHost } from './host.js';

/**
 * What a process has sent arrives, also when it is killed: that one has sent the frame, or at least begun to. Who is killed before a frame
 * comes has not read it, and so its host's kernel resets the connection.
 */
const GATE = `
const net = require('node:net'), HEADER = 12;
const [port, target] = process.argv.slice(1);
let fault;
const pass = (from, one, other) => {
  let header = Buffer.alloc(0), body = 0, held = false;
  const closed = () => held && one.resetAndDestroy();
  const forward = (bytes) => {
    if (other.write(bytes)) return;
    one.pause();
    other.once('drain', () => one.resume());
  };
  one.on('data', (bytes) => {
    while (bytes.length > 0 && !held) {
      if (body > 0) {
        const part = bytes.subarray(0, body);
        body -= part.length;
        bytes = bytes.subarray(part.length);
        forward(part);
        continue;
      }
      const part = bytes.subarray(0, HEADER - header.length);
      header = Buffer.concat([header, part]);
      bytes = bytes.subarray(part.length);
      if (header.length < HEADER) return;
      if (fault !== undefined && fault.from === from && fault.kind === header.readUInt16LE(0)) {
        held = fault.signal === 'SIGKILL' && fault.at !== from;
        process.kill(fault.pid, fault.signal);
        fault = undefined;
        console.log('happened');
        if (held && other.destroyed) closed();
        if (held) return;
      }
      body = header.readUInt32LE(4);
      forward(header);
      header = Buffer.alloc(0);
    }
  });
  one.on('end', () => other.end());
  one.on('error', () => other.resetAndDestroy());
  other.on('end', closed).on('error', closed);
};
require('node:readline').createInterface({ input: process.stdin }).on('line', (line) => {
  fault = JSON.parse(line);
  console.log('waits');
});
net.createServer({ allowHalfOpen: true, noDelay: true }, (source) => {
  const destination = net.connect({ port: target, host: '127.0.0.1', allowHalfOpen: true, noDelay: true });
  pass('source', source, destination);
  pass('destination', destination, source);
}).listen(port, '127.0.0.1', () => console.log('listens'));
`;

type Side = 'source' | 'destination';

export interface GateFault {
  readonly frame: keyof typeof Frame;
  /** Who sends it. */
  readonly from: Side;
  /** To whom it happens. */
  readonly at: Side;
  readonly signal: 'SIGKILL' | 'SIGSTOP';
}

export class FrameGate {
  readonly #process: HostProcess;
  readonly #lines: AsyncIterator<string, undefined>;

  /** @param port of the host's loopback, from which it goes on to `target` */
  constructor(host: TestHost, port: number, target: number) {
    this.#process = host.spawn([process.execPath, '-e', GATE, String(port), String(target)]);
    this.#lines = createInterface({ input: this.#process.stdout })[Symbol.asyncIterator]();
  }

  async listens(): Promise<void> {
    expect((await this.#lines.next()).value).toBe('listens');
  }

  /** It happens at the first such frame from now on. @param pid of whom it happens to */
  async set({ frame, ...fault }: GateFault, pid: number): Promise<void> {
    this.#process.stdin.write(`${JSON.stringify({ ...fault, kind: Frame[frame], pid })}\n`);
    expect((await this.#lines.next()).value).toBe('waits');
  }

  async happened(): Promise<void> {
    expect((await this.#lines.next()).value).toBe('happened');
  }

  async close(): Promise<void> {
    this.#process.kill('SIGKILL');
    await this.#process.exit;
  }
}
