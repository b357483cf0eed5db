/** A user's device module: the example of docs/devices.md, as it stands there. */
import fs from 'node:fs';
import path from 'node:path';

export function moduleExample(): string {
  const text = fs.readFileSync(path.resolve('docs/devices.md'), 'utf8');
  return /```js\n(\/\*\* An entropy device[^]*?)```/.exec(text)![1];
}
