/** The timers of a worker's event loop, by a clock that the test turns. */
import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals';
import fc from 'fast-check';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { EpollLoop } from '../../../src/virtio/transport/epoll-loop.js';
import type { Timer } from '../../../src/virtio/device.js';

let clock: number;

beforeEach(() => {
  clock = 1000;
  jest.spyOn(performance, 'now').mockImplementation(() => clock);
});

afterEach(() => {
  jest.restoreAllMocks();
});

/** A loop for which nothing ever happens; how long it would have waited. */
function quietLoop() {
  const host = new LinuxKernel();
  const waits: number[] = [];
  const kernel = {
    epollCreate: () => -1,
    close: () => undefined,
    map: host.map.bind(host),
    epollWaitRaw: (_epoll: number, _events: number, _most: number, timeout: number) => {
      waits.push(timeout);
      return 0;
    },
  } as unknown as HostKernel;
  return { loop: new EpollLoop(kernel), waits };
}

describe('timers', () => {
  test('are served when they are due, and the loop waits no longer than that', () => {
    const { loop, waits } = quietLoop();
    const served: string[] = [];
    const slow = loop.timer(() => served.push('slow'));
    const quick = loop.timer(() => served.push('quick'));
    expect(loop.turn(-1)).toBe(false);
    slow.start(30.5);
    quick.start(10);
    quick.start(20);
    expect([loop.turn(-1), loop.turn(5)]).toEqual([false, false]);
    clock += 20;
    expect(loop.turn(-1)).toBe(true);
    expect(served).toEqual(['quick']);
    slow.stop();
    slow.stop();
    loop.turn(-1);
    expect(waits).toEqual([-1, 20, 5, 0, -1]);
    loop.close();
  });

  test('do not see the time in which the loop stood still', () => {
    const { loop, waits } = quietLoop();
    const served: number[] = [];
    loop.timer(() => served.push(loop.now())).start(50);
    const before = loop.now();
    clock += 10;
    loop.standStill(() => (clock += 1_000_000));
    expect(loop.now()).toBe(before + 10);
    loop.turn(-1);
    expect(served).toEqual([]);
    clock += 40;
    loop.turn(-1);
    expect(served).toEqual([before + 50]);
    expect(waits).toEqual([40, 0]);
    loop.close();
  });

  test('whose handler starts it at once wait for the next turn', () => {
    const { loop } = quietLoop();
    let served = 0;
    const timer: Timer = loop.timer(() => {
      served++;
      timer.start(0);
    });
    timer.start(0);
    for (let turn = 1; turn <= 3; turn++) {
      loop.turn(-1);
      expect(served).toBe(turn);
    }
    loop.close();
  });

  test('may be started and stopped by any handler: who is due is served, who is stopped is not', () => {
    const TIMERS = 5;
    const action = fc.record({ timer: fc.nat(TIMERS - 1), start: fc.option(fc.nat(3), { nil: undefined }) });
    const actions = fc.array(action, { maxLength: 3 });
    const step = fc.record({ later: fc.nat(3), actions });
    fc.assert(
      fc.property(
        fc.array(actions, { minLength: TIMERS, maxLength: TIMERS }),
        fc.array(step, { minLength: 1, maxLength: 12 }),
        (handlers, steps) => {
          const { loop, waits } = quietLoop();
          /** When each that is started is due. */
          const due = new Map<number, number>();
          /** Those that a handler has started or stopped in this turn. */
          const changed = new Set<number>();
          const perform = (list: readonly { timer: number; start: number | undefined }[]) => {
            for (const { timer, start } of list) {
              changed.add(timer);
              if (start === undefined) {
                timers[timer].stop();
                due.delete(timer);
              } else {
                timers[timer].start(start);
                due.set(timer, clock + start);
              }
            }
          };
          const timers = handlers.map((list, index) =>
            loop.timer(() => {
              expect(due.get(index)).toBeLessThanOrEqual(clock);
              due.delete(index);
              perform(list);
            }),
          );
          for (const { later, actions: list } of steps) {
            clock += later;
            perform(list);
            changed.clear();
            const before = [...due];
            const first = Math.min(...due.values());
            loop.turn(-1);
            expect(waits.pop()).toBe(before.length === 0 ? -1 : Math.max(first - clock, 0));
            for (const [timer, at] of before) {
              if (!changed.has(timer)) expect(due.has(timer)).toBe(at > clock);
            }
          }
          for (const timer of timers) timer.stop();
          loop.turn(-1);
          expect(waits.pop()).toBe(-1);
          loop.close();
        },
      ),
      { numRuns: 500 },
    );
  });
});
