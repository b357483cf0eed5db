import fs from 'node:fs';
import type { TestHost } from './host.js';

/** This process's open descriptors, each as its number and what it is of. The test runner may close some of its own meanwhile. */
export function openDescriptors(): ReadonlySet<string> {
  return new Set(
    fs.readdirSync('/proc/self/fd').flatMap((fd) => {
      try {
        return [`${fd} ${fs.readlinkSync(`/proc/self/fd/${fd}`)}`];
      } catch {
        // Of the listing itself.
        return [];
      }
    }),
  );
}

/** Those that were not there before. */
export function newDescriptors(before: ReadonlySet<string>): string[] {
  return [...openDescriptors()].filter((each) => !before.has(each));
}

/** What a process on the test host holds: its descriptors and threads, by what they are of, without those that io_uring has for a while. */
export function holdings(host: TestHost, pid: number): Promise<string> {
  return host.check(
    `ls -l /proc/${pid}/fd | sed 's/.*-> //; s/[0-9]*//g' | sort; cat /proc/${pid}/task/*/comm | grep -v iou-wrk | sort`,
  );
}
