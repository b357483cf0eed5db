/**
 * The order of test files: jest knows from its cache how long each took, but a fresh clone has none, and two labs that end
 * far apart waste the time between. So the long end-to-end files begin and the short ones fill up.
 */
import path from 'node:path';
import Sequencer from '@jest/test-sequencer';

const LONG = ['aarch64', 'mshv', 'kvm', 'disks', 'cycles', 'hotplug', 'networks', 'package'];
const SHORT = ['devices', 'emulator'];

function rank({ path: file }) {
  const name = path.basename(file, '.test.ts');
  if (path.basename(path.dirname(file)) !== 'e2e') return 0;
  if (LONG.includes(name)) return LONG.indexOf(name) - LONG.length;
  return SHORT.includes(name) ? 1 + SHORT.indexOf(name) : 0;
}

export default class LongFirst extends Sequencer {
  sort(tests) {
    // Files of the same rank stay as jest has them.
    return [...super.sort(tests)].sort((one, other) => rank(one) - rank(other));
  }
}
