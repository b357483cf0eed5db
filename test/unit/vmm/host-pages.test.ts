import { expect, test } from '@jest/globals';
import { GuestMemory } from '../../../src/memory/guest-memory.js';
import { SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { HostPages } from '../../../src/vmm/memory/host-pages.js';

const PAGE = 4096;
const kernel = new LinuxKernel();

/** RAM of eight pages in two pieces that touch, and four pages of a device behind it. */
function build(shared: boolean) {
  const fd = shared ? kernel.memfd('test', { size: 12 * PAGE }) : undefined;
  const kind = shared ? ('shared' as const) : ('private' as const);
  const parts = [
    { address: 0, size: 4 * PAGE, kind },
    { address: 4 * PAGE, size: 4 * PAGE, kind },
    { address: 8 * PAGE, size: 4 * PAGE, kind: 'device' as const },
  ];
  const mappings = parts.map(({ address: offset, size: length }) => kernel.map({ length, fd, offset, shared }));
  const memory = new GuestMemory(
    parts.map((part, index) => {
      const { handle } = mappings[index];
      const view = (offset: number, length: number) => mappings[index].view(offset, length);
      return { ...part, hostAddress: Number(handle.address), view };
    }),
  );
  const close = () => {
    for (const mapping of mappings) mapping.unmap();
    if (fd !== undefined) kernel.close(fd);
  };
  return { memory, pages: new HostPages(kernel, memory), close };
}

test.each([{ shared: false }, { shared: true }])(
  'RAM is given back across pieces, and nothing else: %j',
  ({ shared }) => {
    const { memory, pages, close } = build(shared);
    memory.fill(0, 1, 12 * PAGE);
    pages.discard(3 * PAGE, 8 * PAGE);
    const left = Array.from({ length: 12 }, (_, page) => memory.u8(page * PAGE));
    expect(left).toEqual([1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
    pages.populate(2 * PAGE, 4 * PAGE);
    expect([memory.u8(2 * PAGE), memory.u8(3 * PAGE)]).toEqual([1, 0]);
    close();
  },
);

test('a copy of a file stays, as its pages would come back with the file', () => {
  const fd = kernel.memfd('test', { size: 2 * PAGE });
  kernel.writeAt(fd, new Uint8Array(2 * PAGE).fill(7), 0);
  const mapping = kernel.map({ length: 2 * PAGE, fd, shared: false });
  const part = { address: 0, size: 2 * PAGE, kind: 'copy' as const, hostAddress: Number(mapping.handle.address) };
  const memory = new GuestMemory([{ ...part, view: (offset, length) => mapping.view(offset, length) }]);
  const pages = new HostPages(kernel, memory);
  memory.fill(0, 1, PAGE);
  pages.discard(0, 2 * PAGE);
  expect([memory.u8(0), memory.u8(PAGE)]).toEqual([1, 7]);
  pages.populate(0, 2 * PAGE);
  expect([memory.u8(0), memory.u8(PAGE)]).toEqual([1, 7]);
  mapping.unmap();
  kernel.close(fd);
});

test('a host that refuses is told', () => {
  const { pages, close } = build(false);
  // Only whole pages can be given back, and had.
  for (const call of [() => pages.discard(1, PAGE), () => pages.populate(1, PAGE)]) {
    expect(call).toThrow(SystemError);
    expect(call).toThrow('madvise: invalid argument (EINVAL)');
  }
  close();
});
