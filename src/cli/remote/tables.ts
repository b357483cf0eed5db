/** What `vmm remote` prints for people. */
import { formatSize } from '../../config/host-facts.js';
import type { PciDeviceInfo, VmCounters, VmInfo } from '../../sdk/types.js';

/** Columns as wide as what is in them. */
function table(rows: readonly (readonly string[])[]): string {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  const line = (row: readonly string[]) => row.map((text, column) => text.padEnd(widths[column])).join('  ');
  return rows.map((row) => `${line(row).trimEnd()}\n`).join('');
}

export function placeText(place: PciDeviceInfo | undefined): string {
  return place === undefined ? 'The machine gets it at its next boot\n' : `${place.id} at ${place.bdf}\n`;
}

export function infoText({ config, state, memory_actual_size: memory, device_tree: tree = {} }: VmInfo): string {
  const { cpus, payload, disks = [], net = [], pmem = [], device_modules: modules = [], vsock } = config;
  const facts = [
    ['state', state],
    ['kernel', payload.kernel],
    ['vCPUs', `${cpus?.boot_vcpus ?? 1} of ${cpus?.max_vcpus ?? 1}`],
    ['memory', formatSize(memory)],
  ];
  const what = new Map<string | undefined, string>();
  for (const { id, path } of disks) what.set(id, path);
  for (const { id, tap, mac } of net) what.set(id, [tap, mac].filter(Boolean).join(' '));
  for (const { id, file } of pmem) what.set(id, file);
  for (const { id, path } of modules) what.set(id, path);
  if (vsock !== undefined) what.set(vsock.id, `${vsock.cid} ${vsock.socket}`);
  for (const { id, leaving } of Object.values(tree)) {
    if (leaving === true) what.set(id, `${what.get(id) ?? ''} (asked to go)`.trim());
  }
  const devices = Object.values(tree).flatMap(({ children, pci_bdf: bdf }) =>
    bdf === undefined ? [] : children.map((id) => [id, bdf, what.get(id) ?? '']),
  );
  const shown = devices.length > 0 ? `\n${table([['device', 'PCI', ''], ...devices])}` : '';
  return `${table(facts)}${shown}`;
}

export function countersText(counters: VmCounters): string {
  const rows = Object.entries(counters).flatMap(([id, values]) =>
    Object.entries(values).map(([name, value]) => [id, name, String(value)]),
  );
  return table([['device', 'counter', 'value'], ...rows]);
}
