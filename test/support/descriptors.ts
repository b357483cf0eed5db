import fs from 'node:fs';

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
