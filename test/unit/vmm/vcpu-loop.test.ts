import { describe, expect, test } from '@jest/globals';
import { Bus, type BusDevice } from '../../../src/devices/bus.js';
import { EXIT_KINDS, ExitKind, type Vcpu, type VcpuExit } from '../../../src/hypervisor/hypervisor.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { hold, letGo, runVcpu, VcpuCommand, vcpuControlLayout } from '../../../src/vmm/cpus/vcpu-loop.js';
import { NO_ORDERS } from '../../support/vcpu-orders.js';

type Step = { kind: ExitKind; exit?: Partial<VcpuExit>; data?: number[] };

/** A vCPU that takes the exits of a script, one per run. */
function scripted(steps: Step[]): { vcpu: Vcpu; answers: number[][]; acknowledged: () => number } {
  const exit: VcpuExit = { address: 0, size: 1, count: 1, stride: 0, detail: '' };
  const answers: number[][] = [];
  let data: number[] = [];
  let kicks = 0;
  const vcpu = {
    exit,
    run: () => {
      const step = steps.shift() ?? { kind: ExitKind.Failed, exit: { detail: 'end of script' } };
      Object.assign(exit, { count: 1, stride: 0 }, step.exit);
      data = step.data ?? [];
      if (step.kind === ExitKind.PortRead || step.kind === ExitKind.MmioRead) answers.push(data);
      return step.kind;
    },
    data: (index: number) => data[index],
    setData: (index: number, value: number) => (data[index] = value),
    acknowledgeKick: () => kicks++,
  };
  return { vcpu: vcpu as unknown as Vcpu, answers, acknowledged: () => kicks };
}

class Recorder implements BusDevice {
  readonly writes: [number, number, number][] = [];
  read(offset: number, size: number): number {
    return offset * 16 + size;
  }
  write(offset: number, size: number, value: number): void {
    this.writes.push([offset, size, value]);
  }
}

function buses(): { ports: Bus; memory: Bus; device: Recorder } {
  const device = new Recorder();
  const ports = new Bus();
  const memory = new Bus();
  ports.insert(0x100, 8, device);
  memory.insert(0xd000_0000, 0x1000, device);
  return { ports, memory, device };
}

const { command } = vcpuControlLayout.at;

describe('a vCPU that is told something', () => {
  test('that it is held, before it runs: it says so, and waits for another command', () => {
    const { ports, memory } = buses();
    const seen: unknown[] = [];
    for (const next of [0, VcpuCommand.stop]) {
      const control = new StateBlock(vcpuControlLayout);
      expect(hold(control)).toBe(1);
      const { vcpu } = scripted([{ kind: ExitKind.Halt }]);
      const end = runVcpu(vcpu, control, ports, memory, {
        ...NO_ORDERS,
        // Main lets it go between what it says and its wait: it must not sleep then.
        held: (time) => {
          seen.push(time);
          control.words[command] = next;
        },
      });
      seen.push(end.kind);
    }
    expect(seen).toEqual([1, 'halt', 1, 'stopped']);
  });

  test('that it is held while it runs: when the exit that it was at is complete, each time, and it reads messages meanwhile', () => {
    const { ports, memory } = buses();
    const control = new StateBlock(vcpuControlLayout);
    const { words } = control;
    const seen: string[] = [];
    const { vcpu } = scripted([
      { kind: ExitKind.PortWrite, exit: { address: 0x101, size: 1 }, data: [7] },
      { kind: ExitKind.Interrupted },
      { kind: ExitKind.Halt },
    ]);
    const run = vcpu.run.bind(vcpu);
    vcpu.run = () => {
      const kind = run();
      seen.push(EXIT_KINDS[kind]);
      if (kind === ExitKind.PortWrite) hold(control);
      return kind;
    };
    let told = 0;
    const end = runVcpu(vcpu, control, ports, memory, {
      ...NO_ORDERS,
      held: (time) => {
        seen.push(`held ${time}`);
        told++;
        if (told === 1) words[command] |= VcpuCommand.attend;
        // Let go, and held anew before the thread could see it.
        if (told === 2 || told === 3) letGo(control);
        if (told === 2) hold(control);
      },
      attend: () => seen.push('attend'),
    });
    expect(end).toEqual({ kind: 'halt' });
    expect(seen).toEqual(['PortWrite', 'Interrupted', 'held 1', 'attend', 'held 1', 'held 2', 'Halt']);
  });

  test('a message, also one that comes while another is read', () => {
    const { ports, memory } = buses();
    const control = new StateBlock(vcpuControlLayout);
    control.words[command] = VcpuCommand.attend;
    let messages = 0;
    const { vcpu } = scripted([{ kind: ExitKind.Halt }]);
    runVcpu(vcpu, control, ports, memory, {
      ...NO_ORDERS,
      attend: () => {
        if (++messages === 1) control.words[command] |= VcpuCommand.attend;
      },
    });
    expect(messages).toBe(2);
  });
});

describe('the vCPU loop', () => {
  test('answers reads and delivers writes, string and wide ones element by element', () => {
    const { vcpu, answers } = scripted([
      { kind: ExitKind.PortWrite, exit: { address: 0x101, size: 1, count: 3 }, data: [7, 8, 9] },
      { kind: ExitKind.PortRead, exit: { address: 0x102, size: 2, count: 2 } },
      { kind: ExitKind.MmioWrite, exit: { address: 0xd000_0010, size: 4, count: 2, stride: 4 }, data: [1, 2] },
      { kind: ExitKind.MmioRead, exit: { address: 0xd000_0020, size: 4, count: 2, stride: 4 } },
      { kind: ExitKind.PortRead, exit: { address: 0x500, size: 4, count: 1 } },
    ]);
    const { ports, memory, device } = buses();
    const end = runVcpu(vcpu, new StateBlock(vcpuControlLayout), ports, memory, NO_ORDERS);
    expect(end).toEqual({ kind: 'failed', detail: 'end of script' });
    expect(device.writes).toEqual([
      [1, 1, 7],
      [1, 1, 8],
      [1, 1, 9],
      [0x10, 4, 1],
      [0x14, 4, 2],
    ]);
    expect(answers).toEqual([[0x22, 0x22], [0x204, 0x244], [0xffff_ffff]]);
  });

  test('counts exits by kind and stops at the command, after a kick too', () => {
    const control = new StateBlock(vcpuControlLayout);
    const { ports, memory } = buses();
    const { vcpu, acknowledged } = scripted([
      { kind: ExitKind.Handled },
      { kind: ExitKind.Interrupted },
      { kind: ExitKind.Halt },
    ]);
    expect(runVcpu(vcpu, control, ports, memory, NO_ORDERS)).toEqual({ kind: 'halt' });
    expect(acknowledged()).toBe(1);
    const counts = EXIT_KINDS.map((_, index) => control.words[vcpuControlLayout.at.exits + index]);
    expect(counts).toEqual(EXIT_KINDS.map((kind) => (['Handled', 'Interrupted', 'Halt'].includes(kind) ? 1 : 0)));
    control.words[vcpuControlLayout.at.command] = VcpuCommand.stop;
    expect(runVcpu(vcpu, control, ports, memory, NO_ORDERS)).toEqual({ kind: 'stopped' });
  });
});
