/** Memory that is read from files as it is touched: with the userfaultfd of this machine where it lets this process, else what needs none. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { EPOLL, type HostMapping, SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { openFaults, PageFaults, type Put, registerFaults } from '../../../src/vmm/memory/page-faults.js';
import { PageServer } from '../../../src/vmm/memory/page-server.js';
import { mayServeFaults } from '../../support/faults.js';
import { newDescriptors, openDescriptors } from '../../support/descriptors.js';

const PAGE = 4096;
const kernel = new LinuxKernel();

let folder: string;
let before: ReadonlySet<string>;
const undo: (() => void)[] = [];
let touches = 0;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-faults-'));
  before = openDescriptors();
});
afterEach(() => {
  for (const step of undo.splice(0).reverse()) step();
  fs.rmSync(folder, { recursive: true });
  expect(newDescriptors(before)).toEqual([]);
});

/** Page numbers that have something, each its own. */
function saved(pages: number, data: readonly number[]): { fd: number; bytes: Buffer; file: string } {
  const bytes = Buffer.alloc(pages * PAGE);
  const file = path.join(folder, `memory-${fs.readdirSync(folder).length}`);
  const fd = fs.openSync(file, 'w+');
  undo.push(() => fs.closeSync(fd));
  fs.ftruncateSync(fd, bytes.length);
  for (const page of data) {
    bytes.fill((page % 255) + 1, page * PAGE, (page + 1) * PAGE);
    fs.writeSync(fd, bytes, page * PAGE, PAGE, page * PAGE);
  }
  return { fd, bytes, file };
}

interface Served {
  readonly mapping: HostMapping;
  readonly server: PageServer;
  readonly fd: number;
  readonly address: number;
  /** Bytes that need no more work. */
  done: number;
  /** Reads a page in a system call of another thread. */
  touch(page: number): Promise<Buffer>;
  /** Waits until somebody waits for a page. */
  asked(): void;
  isThere(page: number): boolean;
}

function serve(source: number, pages: number, shared = false): Served {
  const memfd = shared ? kernel.memfd('ram', { size: pages * PAGE }) : undefined;
  const mapping = kernel.map({ length: pages * PAGE, shared, ...(memfd === undefined ? {} : { fd: memfd }) });
  const fd = openFaults(kernel);
  const address = Number(mapping.handle.address);
  registerFaults(kernel, fd, address, pages * PAGE);
  const faults = new PageFaults(kernel, fd);
  const stretch = { hostAddress: address, size: pages * PAGE, fd: source, name: 'memory at 0x0' };
  const server = new PageServer(kernel, faults, [stretch], (bytes) => (served.done += bytes));
  const epoll = kernel.epollCreate();
  kernel.epollAdd(epoll, fd, EPOLL.IN, 0);
  const events = kernel.map({ length: PAGE, shared: false });
  const pagemap = fs.openSync('/proc/self/pagemap', 'r');
  const out = fs.openSync(path.join(folder, 'out'), 'w+');
  undo.push(
    () => mapping.unmap(),
    () => (memfd === undefined ? undefined : kernel.close(memfd)),
    () => events.unmap(),
    () => faults.close(),
    () => server.close(),
    ...[pagemap, out].map((each) => () => fs.closeSync(each)),
    () => kernel.close(fd),
    () => kernel.close(epoll),
  );
  const served: Served = {
    ...{ mapping, server, fd, address, done: 0 },
    touch: (page) => {
      const bytes = new Uint8Array(mapping.view(page * PAGE, PAGE));
      // One of its own: a thread that waits in write(2) keeps others from the file.
      const file = path.join(folder, `touched-${touches++}`);
      const handle = fs.openSync(file, 'w');
      // At once: main may wait for it without its event loop.
      return new Promise((resolve, reject) => {
        fs.write(handle, bytes, 0, PAGE, 0, (error) => {
          fs.closeSync(handle);
          if (error === null) resolve(fs.readFileSync(file));
          else reject(error);
        });
      });
    },
    asked: () => expect(kernel.epollWaitRaw(epoll, Number(events.handle.address), 1, -1)).toBe(1),
    isThere: (page) => {
      const entry = Buffer.alloc(8);
      fs.readSync(pagemap, entry, 0, 8, (address / PAGE + page) * 8);
      return (entry[7] & 0xc0) !== 0;
    },
  };
  return served;
}

/** What a page that was touched has, with the server's turns meanwhile. */
async function touched(served: Served, page: number): Promise<Buffer> {
  let there: Buffer | undefined;
  const touch = served.touch(page).then((bytes) => (there = bytes));
  while (there === undefined) {
    served.server.turn();
    await new Promise(setImmediate);
  }
  return touch;
}

const pagesOf = (bytes: Buffer, page: number) => bytes.subarray(page * PAGE, (page + 1) * PAGE);
const range = (from: number, to: number) => Array.from({ length: to - from }, (_, index) => from + index);

(mayServeFaults(kernel) ? describe : describe.skip)('with page faults', () => {
  test.each([false, true])('all is as the file has it, whoever touches what when, shared %p', async (shared) => {
    const PAGES = 203;
    const runs = fc.array(fc.record({ at: fc.nat(PAGES - 1), count: fc.integer({ min: 1, max: 90 }) }), {
      maxLength: 6,
    });
    await fc.assert(
      fc.asyncProperty(runs, fc.array(fc.nat(PAGES - 1), { maxLength: 5 }), fc.nat(4), async (data, touches, turns) => {
        const { fd, bytes } = saved(
          PAGES,
          data.flatMap(({ at, count }) => range(at, Math.min(at + count, PAGES))),
        );
        const served = serve(fd, PAGES, shared);
        for (let turn = 0; turn < turns; turn++) served.server.turn();
        const read = await Promise.all(touches.map(async (page) => [page, await touched(served, page)] as const));
        expect(served.server.run(() => false)).toBe(true);
        expect(served.done).toBe(PAGES * PAGE);
        for (const [page, content] of read) expect(content.equals(pagesOf(bytes, page))).toBe(true);
        for (const page of range(0, PAGES)) {
          const there = await touched(served, page);
          expect(there.equals(pagesOf(bytes, page))).toBe(true);
        }
      }),
      { numRuns: 12 },
    );
  });

  test('who waits is first, with what is around', async () => {
    const { fd, bytes } = saved(200, range(0, 200));
    const served = serve(fd, 200);
    served.server.turn();
    const touch = served.touch(150);
    served.asked();
    served.server.turn();
    expect((await touch).equals(pagesOf(bytes, 150))).toBe(true);
    // 256 KiB from low to high, and the 64 KiB that the page is in.
    expect(range(0, 200).filter((page) => served.isThere(page))).toEqual([...range(0, 64), ...range(144, 160)]);
  });

  test('a hole is put where it is touched alone; a page of data brings what is around, also over a hole', async () => {
    const { fd, bytes } = saved(64, [16, 31, 40]);
    const served = serve(fd, 64);
    for (const page of [3, 20]) {
      const touch = served.touch(page);
      served.asked();
      served.server.turn();
      expect((await touch).equals(pagesOf(bytes, page))).toBe(true);
    }
    expect(range(0, 64).filter((page) => served.isThere(page))).toEqual([3, 20]);
    const touch = served.touch(31);
    served.asked();
    served.server.turn();
    expect((await touch).equals(pagesOf(bytes, 31))).toBe(true);
    // What was there before is no part of the run.
    expect(range(0, 64).filter((page) => served.isThere(page))).toEqual([3, 20, ...range(21, 32)]);
    expect(served.server.run(() => false)).toBe(true);
    expect(range(0, 64).filter((page) => served.isThere(page))).toEqual([3, 16, 20, ...range(21, 32), 40]);
  });

  test('a page that came while somebody began to wait for it is left as it is', async () => {
    const { fd, bytes } = saved(80, range(0, 80));
    const served = serve(fd, 80);
    const touch = served.touch(2);
    served.asked();
    // Told of the fault, and filled before it is looked at.
    const address = served.address;
    const faults = new PageFaults(kernel, served.fd);
    faults.take(
      (at) => expect(at).toBe(address + 2 * PAGE),
      () => undefined,
    );
    faults.close();
    served.server.turn();
    expect((await touch).equals(pagesOf(bytes, 2))).toBe(true);
    expect(served.server.run(() => false)).toBe(true);
  });

  test.each([false, true])('what is given back before it is filled reads as zeros, shared %p', async (shared) => {
    const { fd, bytes } = saved(300, range(0, 300));
    const served = serve(fd, 300, shared);
    served.server.turn();
    // Some of it is there, and some is not.
    const [first, last] = [60, 280];
    const advice = shared ? 9 : 4;
    const worker = new Worker(
      `const { createRequire } = require('node:module');
       const libc = createRequire(${JSON.stringify(import.meta.url)})('koffi').load('libc.so.6');
       const madvise = libc.func('int madvise(uintptr_t address, size_t length, int advice)');
       if (madvise(${served.address + first * PAGE}, ${(last - first) * PAGE}, ${advice}) !== 0) throw new Error('madvise');`,
      { eval: true },
    );
    const ended = new Promise((resolve, reject) => worker.on('exit', resolve).on('error', reject));
    served.asked();
    // It waits until this has been read.
    expect(served.isThere(first)).toBe(true);
    served.server.turn();
    expect(await ended).toBe(0);
    expect(await touched(served, 100)).toEqual(Buffer.alloc(PAGE));
    expect(served.server.run(() => false)).toBe(true);
    bytes.fill(0, first * PAGE, last * PAGE);
    for (const page of [0, 59, 60, 63, 64, 100, 279, 280, 299]) {
      expect((await touched(served, page)).equals(pagesOf(bytes, page))).toBe(true);
    }
  });

  test.each<[string, readonly number[], number]>([
    ['data', range(0, 64), 10],
    ['a hole that is touched', [0], 10],
    ['the rest', range(0, 8), 9],
  ])('a file that has become shorter is an error: %s', async (what, data, pages) => {
    const { fd, bytes } = saved(64, data);
    const served = serve(fd, 64);
    fs.ftruncateSync(fd, pages * PAGE);
    if (what === 'the rest') {
      expect(() => served.server.run(() => false)).toThrow('memory at 0x0: its file has become shorter');
      return;
    }
    const touch = served.touch(60);
    served.asked();
    expect(() => served.server.turn()).toThrow('memory at 0x0: its file has become shorter');
    // Nobody is let go before the file has it again.
    fs.ftruncateSync(fd, 64 * PAGE);
    const there = what === 'data' ? Buffer.alloc(PAGE) : pagesOf(bytes, 60);
    served.server.turn();
    expect(await touch).toEqual(there);
  });

  test('a file that cannot be read is an error that says so', () => {
    const { fd } = saved(4, [0, 1, 2, 3]);
    class Failing extends LinuxKernel {
      override readvAtRaw(): number {
        return -os.constants.errno.EIO;
      }
    }
    const served = serve(fd, 4);
    const faults = new PageFaults(kernel, served.fd);
    const server = new PageServer(
      new Failing(),
      faults,
      [{ hostAddress: served.address, size: 4 * PAGE, fd, name: 'memory at 0x0' }],
      () => undefined,
    );
    expect(() => server.run(() => false)).toThrow('memory at 0x0: its file cannot be read: input/output error');
    server.close();
    faults.close();
  });

  test('it ends when it is to, with whatever is missing', () => {
    const { fd } = saved(640, range(0, 640));
    const served = serve(fd, 640);
    let left = 3;
    expect(served.server.run(() => left-- === 0)).toBe(false);
    expect(served.isThere(0)).toBe(true);
    expect(served.isThere(639)).toBe(false);
  });

  test('memory that is gone needs nothing', () => {
    const { fd } = saved(640, range(0, 640));
    const served = serve(fd, 640);
    served.server.turn();
    served.mapping.unmap();
    expect(served.server.run(() => false)).toBe(true);
    expect(served.done).toBe(640 * PAGE);
  });
});

/** A host that answers as the test says, in this order, and then does what it is asked for. */
class Answers {
  readonly asked: string[] = [];
  copied = 0;
  faults: number[] = [];
  removed: [number, number][] = [];

  constructor(private readonly answers: [Put, number][]) {}

  take(fault: (address: number) => void, removed: (start: number, end: number) => void): void {
    for (const [start, end] of this.removed.splice(0)) removed(start, end);
    for (const address of this.faults.splice(0)) fault(address);
  }

  copy(to: number, _from: number, length: number): Put {
    const [outcome, copied] = this.answers.shift() ?? ['done', length];
    this.copied = copied;
    this.asked.push(`copy ${to / PAGE}+${length / PAGE} ${outcome}`);
    return outcome;
  }

  zero(page: number): Put {
    const [outcome] = this.answers.shift() ?? ['done', 0];
    this.asked.push(`zero ${page / PAGE} ${outcome}`);
    return outcome;
  }
}

function stub(data: readonly number[], answers: [Put, number][]): { answers: Answers; server: PageServer } {
  const { fd } = saved(40, data);
  const faults = new Answers(answers);
  const stretch = { hostAddress: 100 * PAGE, size: 40 * PAGE, fd, name: 'memory' };
  const server = new PageServer(kernel, faults as unknown as PageFaults, [stretch], () => undefined);
  undo.push(() => server.close());
  return { answers: faults, server };
}

describe('whatever the host answers', () => {
  test('a copy that went half way goes on, and over a page that is there', () => {
    const { answers, server } = stub(range(0, 10), [
      ['again', 3 * PAGE],
      ['needless', 0],
    ]);
    expect(server.run(() => false)).toBe(true);
    expect(answers.asked).toEqual(['copy 100+10 again', 'copy 103+7 needless', 'copy 104+6 done']);
  });

  test('what is just being given back is looked at again', () => {
    const { answers, server } = stub(range(0, 10), [['again', 0]]);
    server.turn();
    answers.removed.push([102 * PAGE, 105 * PAGE], [0, 50 * PAGE], [139 * PAGE, 900 * PAGE]);
    expect(server.run(() => false)).toBe(true);
    expect(answers.asked).toEqual(['copy 100+10 again', 'copy 100+2 done', 'copy 105+5 done']);
  });

  test('who waits is served again later, and what is given back is zeros then', () => {
    const { answers, server } = stub(
      [0, 1, 20],
      [
        ['again', 0],
        ['again', 0],
      ],
    );
    answers.faults.push(101 * PAGE + 5, 130 * PAGE);
    server.turn();
    answers.removed.push([101 * PAGE, 102 * PAGE]);
    server.turn();
    expect(answers.asked).toEqual(['copy 100+16 again', 'zero 130 again', 'zero 101 done', 'zero 130 done']);
    // Nobody knows such an address.
    answers.faults.push(99 * PAGE, 140 * PAGE);
    server.turn();
    expect(answers.asked).toHaveLength(4);
    expect(server.run(() => false)).toBe(true);
  });
});

describe('a host that does not let this process', () => {
  test('is told by the option, and by what is needed', () => {
    class Refusing extends LinuxKernel {
      override userfaultfd(): number {
        throw new SystemError('EPERM', 1, 'userfaultfd', 'operation not permitted');
      }
    }
    expect(() => openFaults(new Refusing())).toThrow(
      'memory_restore_mode=ondemand: accepted is a host that lets vmm serve page faults: by access to /dev/userfaultfd, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1',
    );
  });

  test('one whose kernel is too old for what is needed is as well, and nothing stays open', () => {
    class Older extends LinuxKernel {
      override userfaultfd(): number {
        return this.eventfd();
      }
    }
    expect(() => openFaults(new Older())).toThrow(/^memory_restore_mode=ondemand: accepted is a host/);
  });
});
