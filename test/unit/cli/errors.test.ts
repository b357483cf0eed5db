import { beforeEach, expect, test } from '@jest/globals';
import { reportAndExitCode } from '../../../src/cli/errors.js';
import { OptionError } from '../../../src/config/option-syntax.js';

let written: string;
beforeEach(() => void (written = ''));
const report = (error: unknown, options: { readonly verbose: boolean }) =>
  reportAndExitCode(error, options, (text) => (written += text));

test('one line, causes from the outermost in, and 1', () => {
  const error = new Error('Cannot start', { cause: new Error('No KVM', { cause: new Error('ENOENT') }) });
  expect(report(error, { verbose: false })).toBe(1);
  expect(written).toBe('vmm: Cannot start: No KVM: ENOENT\n');
});

test('2 for a wrong command line', () => {
  expect(report(new OptionError('--cpus boot=0', 'a number'), { verbose: false })).toBe(2);
  expect(written).toBe('vmm: --cpus boot=0: accepted is a number\n');
});

test('a message that two levels share is said once', () => {
  report(new Error('A', { cause: new Error('B', { cause: new Error('A') }) }), { verbose: false });
  expect(written).toBe('vmm: A: B\n');
});

test('what a message ends with already is not said again', () => {
  const cause = new Error('ioctl: not supported by this device (ENOTTY)', { cause: new Error('ENOTTY') });
  const error = new Error('--net tap=lo: ioctl: not supported by this device (ENOTTY)', { cause });
  report(error, { verbose: false });
  expect(written).toBe('vmm: --net tap=lo: ioctl: not supported by this device (ENOTTY): ENOTTY\n');
});

test('a chain that loops ends', () => {
  const error = new Error('A');
  error.cause = error;
  report(error, { verbose: false });
  expect(written).toBe('vmm: A\n');
});

test('always one line without control characters, whatever was thrown', () => {
  report(new Error('a\n  b\u001b[2J', { cause: 'text' }), { verbose: false });
  report({ odd: true }, { verbose: false });
  report(new TypeError(), { verbose: false });
  expect(written).toBe("vmm: a b\\u{1b}[2J: 'text'\nvmm: { odd: true }\nvmm: TypeError\n");
});

test('the stack only when verbose', () => {
  report(new Error('A'), { verbose: true });
  expect(written).toMatch(/^vmm: A\nError: A\n {4}at /);
});
