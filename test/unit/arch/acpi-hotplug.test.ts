/** The methods of the DSDT for hotplug, executed by ACPICA's interpreter; what they write is given to the controllers. */
import { describe, expect, test } from '@jest/globals';
import { placeTables } from '../../../src/arch/acpi/tables.js';
import { dsdtTerms } from '../../../src/arch/x86_64/acpi/dsdt.js';
import * as layout from '../../../src/arch/x86_64/layout.js';
import type { AccessSize, BusDevice } from '../../../src/devices/bus.js';
import { CpuHotplug, cpuHotplugLayout } from '../../../src/devices/cpu-hotplug.js';
import { MemoryHotplug, memoryHotplugLayout } from '../../../src/devices/memory-hotplug.js';
import { PciHotplug, pciHotplugLayout } from '../../../src/devices/pci-hotplug.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { evaluate, type Evaluation } from '../../support/acpiexec.js';

const area = layout.platformArea(46, true);

/** @param vcpus possible ones; one is there at boot */
function dsdt(segments: number, vcpus: number): Uint8Array {
  const windows = { start: 0, end: 0x1000 };
  const terms = dsdtTerms({
    ...area,
    apicIds: Array.from({ length: vcpus }, (_, id) => id * 2),
    bootVcpus: 1,
    numa: [],
    pciSegments: Array.from({ length: segments }, () => ({ ecam: 0, mmio32: windows, mmio64: windows })),
    gedAddress: area.ged,
    serial: true,
    pvpanic: true,
  });
  return placeTables(0, 2 ** 20, terms, () => []).tables[0].bytes;
}

/** The interpreter prints 32 bits of an address. */
const offsetOf = (address: number, registers: number) => address - (registers % 2 ** 32);

/** The accesses in short: `W8=20` writes 0x20 to offset 8, `R0` reads. */
function story({ accesses, complaints }: Evaluation, registers: number): string[] {
  expect(complaints).toEqual([]);
  return accesses.map(({ kind, address, value }) => {
    const offset = offsetOf(address, registers).toString(16);
    return kind === 'read' ? `R${offset}` : `W${offset}=${value.toString(16)}`;
  });
}

/** Does to a controller what a method did to the interpreter's memory. */
function replay({ accesses }: Evaluation, registers: number, device: BusDevice): void {
  for (const { kind, address, bytes, value } of accesses) {
    const offset = offsetOf(address, registers);
    if (kind === 'write') device.write(offset, bytes as AccessSize, value);
    else device.read(offset, bytes as AccessSize);
  }
}

describe('PCI hotplug by AML', () => {
  const machine = dsdt(16, 1);
  const PHPR = (field: string) => `\\_SB.PHPR.${field}`;

  test.concurrent(
    'a scan notifies the slots of both bitmaps: a device check of what came, an eject request of what shall go',
    async () => {
      const run = await evaluate(machine, '\\_SB.PC0F.PCNT', {
        [PHPR('PCIU')]: 0x8000_0005,
        [PHPR('PCID')]: 0x0001_0002,
      });
      expect(story(run, area.pciHotplug)).toEqual(['Wc=f', 'R0', 'R4']);
      expect(run.notifications).toEqual(['S000 1', 'S001 3', 'S002 1', 'S016 3', 'S031 1']);
    },
  );

  test.concurrent('every slot has a branch of its own', async () => {
    const run = await evaluate(machine, '\\_SB.PC00.PCNT', { [PHPR('PCIU')]: 0xffff_ffff });
    const slots = Array.from({ length: 32 }, (_, slot) => `S${slot.toString().padStart(3, '0')} 1`);
    expect(run.notifications).toEqual(slots);
  });

  test.concurrent('an event of the GED scans every segment, and reads its register once', async () => {
    const GEVT = '\\_SB.GED.GEVT';
    const scans = Array.from({ length: 16 }, (_, segment) => [`Wc=${segment.toString(16)}`, 'R0', 'R4']).flat();
    const run = await evaluate(machine, '\\_SB.GED._EVT 0xd', { [GEVT]: 4 });
    const [first, ...accesses] = run.accesses;
    expect(first).toEqual({ kind: 'read', address: area.ged % 2 ** 32, bytes: 1, value: 4 });
    expect(story({ ...run, accesses }, area.pciHotplug)).toEqual(scans);
    expect(run.notifications).toEqual([]);
    for (const [events, notifications] of [
      [8, ['PWRB 128']],
      [16, ['VGEN 128']],
      [0xe0, []],
    ] as const) {
      const other = await evaluate(machine, '\\_SB.GED._EVT 0xd', { [GEVT]: events });
      expect(other.accesses).toHaveLength(1);
      expect(other.notifications).toEqual(notifications);
    }
  });

  test.concurrent.each([
    [0, 0],
    [0, 31],
    [15, 5],
  ])('_EJ0 of a slot lets that slot go: segment %d, slot %d', async (segment, slot) => {
    const path = `\\_SB.PC0${segment.toString(16).toUpperCase()}.S${slot.toString().padStart(3, '0')}`;
    const run = await evaluate(machine, `${path}._EJ0 1`);
    expect(story(run, area.pciHotplug)).toEqual([`Wc=${segment.toString(16)}`, `W8=${(2 ** slot).toString(16)}`]);
    const ejected: number[][] = [];
    const controller = new PciHotplug(new StateBlock(pciHotplugLayout), (...place) => void ejected.push(place));
    for (let other = 0; other < 32; other++) controller.unplug(segment, other);
    replay(run, area.pciHotplug, controller);
    expect(ejected).toEqual([[segment, slot]]);
    expect((await evaluate(machine, `${path}._ADR`)).result).toBe(slot * 0x1_0000);
    expect((await evaluate(machine, `${path}._SUN`)).result).toBe(slot);
  });
});

/** Bits of a status byte. */
const HERE = 1;
const CAME = 2;
const SHALL_GO = 4;

describe('CPU hotplug by AML', () => {
  const machine = dsdt(1, 254);
  const PRES = (field: string) => `\\_SB.PRES.${field}`;

  test.concurrent('a scan looks at every processor, acknowledges what it is told, and notifies', async () => {
    const run = await evaluate(machine, '\\_SB.CPUS.CSCN', { [PRES('CINS')]: 1 });
    const steps = story(run, area.cpuHotplug);
    // The interpreter's memory is no controller: the first acknowledgement leaves only that bit, for all.
    expect(steps.slice(0, 4)).toEqual(['W0=0', 'R4', 'W4=2', 'R4']);
    expect(steps.filter((step) => step.startsWith('W0='))).toEqual(
      Array.from({ length: 254 }, (_, id) => `W0=${id.toString(16)}`),
    );
    const names = Array.from({ length: 254 }, (_, id) => `C${id.toString(16).toUpperCase().padStart(3, '0')}`);
    expect(run.notifications).toEqual(names.map((name) => `${name} 1`).sort());
    const removal = await evaluate(machine, '\\_SB.CPUS.CSCN', { [PRES('CRMV')]: 1 });
    expect(story(removal, area.cpuHotplug).slice(0, 4)).toEqual(['W0=0', 'R4', 'R4', 'W4=4']);
    expect(removal.notifications).toEqual(names.map((name) => `${name} 3`).sort());
  });

  test.concurrent('what is told and acknowledged is what the controller means', async () => {
    const state = new StateBlock(cpuHotplugLayout(254));
    const controller = new CpuHotplug(state, () => undefined);
    for (const vcpu of [0, 200, 253]) controller.plug(vcpu);
    controller.unplug(200);
    replay(await evaluate(machine, '\\_SB.CPUS.CSCN', { [PRES('CINS')]: 1 }), area.cpuHotplug, controller);
    const status = (vcpu: number) => {
      controller.write(0, 4, vcpu);
      return controller.read(4, 1);
    };
    expect([0, 1, 200, 253].map(status)).toEqual([HERE, 0, HERE | SHALL_GO, HERE]);
    replay(await evaluate(machine, '\\_SB.CPUS.CSCN', { [PRES('CRMV')]: 1 }), area.cpuHotplug, controller);
    expect(status(200)).toBe(HERE);
  });

  test.concurrent('a processor says whether it is there, and its local APIC', async () => {
    const there = await evaluate(machine, '\\_SB.CPUS.C0FD._STA', { [PRES('CPEN')]: 1 });
    expect([there.result, story(there, area.cpuHotplug)]).toEqual([0xf, ['W0=fd', 'R4']]);
    expect((await evaluate(machine, '\\_SB.CPUS.C0FD._STA', { [PRES('CINS')]: 1 })).result).toBe(0);
    expect((await evaluate(machine, '\\_SB.CPUS.C010._MAT')).result).toEqual([0, 8, 0x10, 0x20, 1, 0, 0, 0]);
  });

  test.concurrent('_EJ0 lets that one go', async () => {
    const run = await evaluate(machine, '\\_SB.CPUS.C0FD._EJ0 1');
    expect(story(run, area.cpuHotplug)).toEqual(['W0=fd', 'W4=8']);
    const gone: number[] = [];
    const controller = new CpuHotplug(new StateBlock(cpuHotplugLayout(254)), (vcpu) => void gone.push(vcpu));
    for (let vcpu = 0; vcpu < 254; vcpu++) {
      controller.enable(vcpu);
      controller.unplug(vcpu);
    }
    replay(run, area.cpuHotplug, controller);
    expect([gone, controller.read(4, 1)]).toEqual([[0xfd], 0]);
  });

  test.concurrent('an event of the GED scans', async () => {
    const { accesses } = await evaluate(dsdt(1, 2), '\\_SB.GED._EVT 0xd', { '\\_SB.GED.GEVT': 1 });
    expect(accesses.slice(1).map(({ address }) => offsetOf(address, area.cpuHotplug))).toEqual([0, 4, 4, 0, 4, 4]);
  });
});

describe('memory hotplug by AML', () => {
  const machine = dsdt(1, 1);
  const MHPC = (field: string) => `\\_SB.MHPC.${field}`;
  const registers = area.memoryHotplug!;
  const slots = Array.from({ length: 8 }, (_, slot) => slot);

  test.concurrent.each([
    ['MINS', 1, CAME],
    ['MRMV', 3, SHALL_GO],
  ])('a scan looks at every slot: %s', async (field, event, bit) => {
    const run = await evaluate(machine, '\\_SB.MHPC.MSCN', { [MHPC(field)]: 1 });
    const steps = event === 1 ? ['R14', `W14=${bit}`, 'R14'] : ['R14', 'R14', `W14=${bit}`];
    expect(story(run, registers)).toEqual(slots.flatMap((slot) => [`W0=${slot}`, ...steps]));
    expect(run.notifications).toEqual(slots.map((slot) => `M00${slot} ${event}`));
  });

  test.concurrent('a slot gives its range and its node', async () => {
    // The slot's number is written over the low half of the base, as this is memory and no controller.
    const base = 0x12_0000_0000;
    const length = 0x3_0800_0000;
    const run = await evaluate(machine, '\\_SB.MHPC.M007._CRS', { [MHPC('MHBA')]: base, [MHPC('MHLN')]: length });
    expect(story(run, registers)).toEqual(['W0=7', 'R0', 'R4', 'R8', 'Rc']);
    const descriptor = Buffer.from(run.result as number[]);
    const CACHEABLE_READ_WRITE = 3;
    expect([...descriptor.subarray(0, 6)]).toEqual([0x8a, 43, 0, 0, 0x0c, CACHEABLE_READ_WRITE]);
    const numbers = [6, 14, 22, 30, 38].map((at) => Number(descriptor.readBigUInt64LE(at)));
    expect(numbers).toEqual([0, base + 7, base + 7 + length - 1, 0, length]);
    // None where there is no memory: an end tag alone.
    expect((await evaluate(machine, '\\_SB.MHPC.M007._CRS')).result).toEqual([0x79, 0]);
    const node = await evaluate(machine, '\\_SB.MHPC.M007._PXM', { [MHPC('MHPX')]: 3 });
    expect([node.result, story(node, registers)]).toEqual([3, ['W0=7', 'R10']]);
  });

  test.concurrent('every access is one that the controller answers', async () => {
    const controller = new MemoryHotplug(new StateBlock(memoryHotplugLayout), () => undefined);
    controller.plug(7, 0x12_0000_0000, 2 ** 27, 3);
    const { accesses } = await evaluate(machine, '\\_SB.MHPC.M007._CRS');
    const [select, ...reads] = accesses;
    controller.write(offsetOf(select.address, registers), select.bytes as AccessSize, select.value);
    const values = reads.map(({ address, bytes }) =>
      controller.read(offsetOf(address, registers), bytes as AccessSize),
    );
    expect(values).toEqual([0, 0x12, 2 ** 27, 0]);
  });

  test.concurrent('a slot says whether memory is there, and lets it go', async () => {
    expect((await evaluate(machine, '\\_SB.MHPC.M003._STA', { [MHPC('MEN')]: 1 })).result).toBe(0xf);
    expect((await evaluate(machine, '\\_SB.MHPC.M003._STA', { [MHPC('MINS')]: 1 })).result).toBe(0);
    const run = await evaluate(machine, '\\_SB.MHPC.M003._EJ0 1');
    const gone: number[] = [];
    const controller = new MemoryHotplug(new StateBlock(memoryHotplugLayout), (slot) => void gone.push(slot));
    for (const slot of slots) {
      controller.plug(slot, 0, 1, 0);
      controller.unplug(slot);
    }
    replay(run, registers, controller);
    expect([gone, controller.read(20, 1)]).toEqual([[3], 0]);
  });

  test.concurrent('an event of the GED scans', async () => {
    const { accesses } = await evaluate(machine, '\\_SB.GED._EVT 0xd', { '\\_SB.GED.GEVT': 2 });
    expect(accesses).toHaveLength(1 + 3 * 8);
  });
});
