/** What `qemu-img check` looks for, of images in memory: whether something is counted less often than it is used. */

const OFFSET_HIGH = 0x00ff_ffff;
const OFFSET_LOW = 0xffff_fe00;
const COPIED_HIGH = 0x8000_0000;
const COMPRESSED_HIGH = 0x4000_0000;

/** @returns what is wrong, a line each; leaks are not */
export function corruptions(image: Buffer): string[] {
  // What is behind the end of the file reads as zeros.
  const u32 = (at: number) => (at + 4 <= image.length ? image.readUInt32BE(at) : 0);
  const u64 = (at: number) => u32(at) * 2 ** 32 + u32(at + 4);
  const offsetAt = (at: number) => (u32(at) & OFFSET_HIGH) * 2 ** 32 + ((u32(at + 4) & OFFSET_LOW) >>> 0);
  const clusterBits = u32(20);
  const clusterSize = 2 ** clusterBits;
  const order = u32(4) === 2 ? 4 : u32(96);
  const clusters = Math.ceil(image.length / clusterSize);
  const wrong: string[] = [];
  const uses = new Map<number, number>();
  const use = (offset: number, length: number) => {
    for (let cluster = Math.floor(offset / clusterSize); cluster * clusterSize < offset + length; cluster++) {
      uses.set(cluster, (uses.get(cluster) ?? 0) + 1);
    }
  };
  const perBlock = (clusterSize * 8) >>> order;
  const tableAt = u64(48);
  const tableBytes = u32(56) * clusterSize;
  const refcount = (cluster: number): number => {
    const index = Math.floor(cluster / perBlock);
    const block = index * 8 < tableBytes ? offsetAt(tableAt + index * 8) : 0;
    if (block === 0) return 0;
    const entry = cluster % perBlock;
    if (order === 6) return u64(block + entry * 8);
    if (order === 5) return u32(block + entry * 4);
    if (order === 4) return (image[block + entry * 2] << 8) | image[block + entry * 2 + 1];
    const bit = entry * 2 ** order;
    return (image[block + Math.floor(bit / 8)] >>> (bit % 8)) & (2 ** (2 ** order) - 1);
  };
  const flag = (what: string, high: number, offset: number) => {
    const single = refcount(offset / clusterSize) === 1;
    if (single !== ((high & COPIED_HIGH) !== 0)) wrong.push(`${what} at ${offset}: its COPIED flag`);
  };
  const walkTable = (table: number, active: boolean) => {
    for (let at = table; at < table + clusterSize; at += 8) {
      const high = u32(at);
      const low = u32(at + 4);
      if (high === 0 && low === 0) continue;
      if ((high & COMPRESSED_HIGH) !== 0) {
        const shift = 62 - (clusterBits - 8) - 32;
        const start = (high & (2 ** shift - 1)) * 2 ** 32 + low;
        const bytes = (((high & 0x3fff_ffff) >>> shift) + 1) * 512 - (start % 512);
        // The last of its sectors may be behind the end of the file.
        use(start, Math.min(bytes, clusters * clusterSize - start));
        continue;
      }
      const host = offsetAt(at);
      if (host === 0) continue;
      use(host, clusterSize);
      if (active) flag('cluster', high, host);
    }
  };
  const walk = (l1: number, entries: number, active: boolean) => {
    use(l1, entries * 8);
    for (let at = l1; at < l1 + entries * 8; at += 8) {
      const table = offsetAt(at);
      if (table === 0) continue;
      use(table, clusterSize);
      if (active) flag('L2 table', u32(at), table);
      walkTable(table, active);
    }
  };
  use(0, clusterSize);
  walk(u64(40), u32(36), true);
  use(tableAt, tableBytes);
  for (let at = tableAt; at < tableAt + tableBytes; at += 8) {
    const block = offsetAt(at);
    if (block !== 0) use(block, clusterSize);
  }
  const snapshots = u64(64);
  let snapshot = snapshots;
  for (let index = 0; index < u32(60); index++) {
    walk(u64(snapshot), u32(snapshot + 8), false);
    const length = 40 + u32(snapshot + 36) + image.readUInt16BE(snapshot + 12) + image.readUInt16BE(snapshot + 14);
    snapshot += Math.ceil(length / 8) * 8;
  }
  if (snapshot > snapshots) use(snapshots, snapshot - snapshots);
  for (const [cluster, count] of uses) {
    if (refcount(cluster) < count) wrong.push(`cluster ${cluster}: used ${count} times, counted ${refcount(cluster)}`);
  }
  return wrong;
}
