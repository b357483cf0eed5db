/**
 * The agent in a lab: runs commands for the host, many at a time, over the virtio-serial port that is its argument.
 *
 * A host that disconnects reads as end of file; the next one says hello, which starts from nothing.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import fs from 'node:fs';
import { encodeFrame, type ExitReport, Frame, FrameReader, type SpawnRequest } from './protocol.js';

const READ_SIZE = 256 * 1024;
const RETRY_MILLISECONDS = 20;
/** How often a port that nobody has connected to is looked at: an idle lab is to leave the processor to others. */
const IDLE_MILLISECONDS = 200;
/** Frames that wait for the host; beyond it, the commands' output is held back. */
const MAX_QUEUED = 1024 * 1024;

const port = fs.openSync(process.argv[2], 'r+');
const children = new Map<number, ChildProcess>();

let queue: Buffer[] = [];
let queued = 0;
let writing = false;

function flush(): void {
  if (writing) return;
  if (queue.length === 0) {
    for (const child of children.values()) {
      child.stdout?.resume();
      child.stderr?.resume();
    }
    return;
  }
  writing = true;
  const bytes = Buffer.concat(queue);
  queue = [];
  queued = 0;
  const next = (from: number) => {
    fs.write(port, bytes, from, bytes.length - from, null, (error, count) => {
      if (error !== null) {
        // Nobody is connected: the next hello starts anew.
        writing = false;
        if (error.code === 'EAGAIN') setTimeout(() => next(from), RETRY_MILLISECONDS);
      } else if (from + count < bytes.length) next(from + count);
      else {
        writing = false;
        flush();
      }
    });
  };
  next(0);
}

function send(type: Frame, id: number, payload: Uint8Array | string = ''): void {
  const frame = encodeFrame(type, id, payload);
  queue.push(frame);
  queued += frame.length;
  flush();
}

function start(id: number, { argv, cwd, env }: SpawnRequest): void {
  const child = spawn(argv[0], argv.slice(1), { cwd, env, detached: true });
  children.set(id, child);
  const forward = (type: Frame, stream: NodeJS.ReadableStream) =>
    stream.on('data', (bytes: Buffer) => {
      send(type, id, bytes);
      if (queued > MAX_QUEUED) stream.pause();
    });
  forward(Frame.Data, child.stdout);
  forward(Frame.ErrorData, child.stderr);
  child.stdin.on('error', () => undefined); // the command does not read: its business
  const end = (report: ExitReport) => {
    if (children.delete(id)) send(Frame.Exit, id, JSON.stringify(report));
  };
  child.on('spawn', () => send(Frame.Spawn, id, String(child.pid)));
  child.on('error', (error) => end({ status: null, signal: null, error: error.message }));
  child.on('close', (status, signal) => end({ status, signal }));
}

/** Each command leads a process group of its own: its children get the signal too. */
function signal(child: ChildProcess, name: NodeJS.Signals): void {
  try {
    process.kill(-child.pid!, name);
  } catch {
    // It has ended.
  }
}

const reader = new FrameReader((type, id, payload) => {
  const child = children.get(id);
  switch (type) {
    case Frame.Hello:
      for (const running of children.values()) signal(running, 'SIGKILL');
      children.clear();
      queue = [];
      queued = 0;
      send(Frame.Hello, 0);
      break;
    case Frame.Spawn:
      start(id, JSON.parse(payload.toString()) as SpawnRequest);
      break;
    case Frame.Data:
      child?.stdin?.write(payload);
      break;
    case Frame.End:
      child?.stdin?.end();
      break;
    case Frame.Signal:
      if (child !== undefined) signal(child, payload.toString() as NodeJS.Signals);
      break;
    case Frame.Ping:
      send(Frame.Ping, id);
      break;
    default:
      break;
  }
});

function read(): void {
  fs.read(port, Buffer.alloc(READ_SIZE), 0, READ_SIZE, null, (error, count, buffer) => {
    if (error === null && count > 0) {
      reader.push(buffer.subarray(0, count));
      read();
    } else {
      reader.reset();
      setTimeout(read, IDLE_MILLISECONDS);
    }
  });
}
read();
