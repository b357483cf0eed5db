/**
 * The round trip of an exit handled by a device on the bus, against a C loop that does the same ioctls.
 *
 * Runs on whatever KVM the machine has: real-mode code suffices. Ours and the peer's runs alternate; a figure is the median.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { Bus, type BusDevice } from '../../src/devices/bus.js';
import { openKvm } from '../../src/hypervisor/kvm/kvm.js';
import { StateBlock } from '../../src/state/state-block.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { runVcpu, VcpuCommand, vcpuControlLayout } from '../../src/vmm/cpus/vcpu-loop.js';
import { NO_ORDERS } from '../support/vcpu-orders.js';
import { median, row, type Row } from './report.js';

const EXITS = 20_000;
const ROUNDS = 9;
const PORT = 0xe0;
/** No RAM here: the guest has 64 KiB. */
const MMIO = 0xd_0000;

/** Endless loops of one instruction and a jump back to it. */
const CASES = [
  { figure: 'port write', code: [0xe6, PORT, 0xeb, 0xfc] }, // out PORT, al
  { figure: 'port read', code: [0xe4, PORT, 0xeb, 0xfc] }, // in al, PORT
  { figure: 'MMIO write', code: [0x88, 0x07, 0xeb, 0xfc] }, // mov [bx], al
];

/** Keeps the last value, and stops the vCPU after EXITS accesses. */
class Latch implements BusDevice {
  accesses = 0;
  #value = 0;

  constructor(private readonly control: Int32Array) {}

  read(): number {
    this.#count();
    return this.#value;
  }

  write(_offset: number, _size: number, value: number): void {
    this.#value = value;
    this.#count();
  }

  #count(): void {
    if (++this.accesses === EXITS) this.control[vcpuControlLayout.at.command] = VcpuCommand.stop;
  }
}

/** @returns nanoseconds per exit */
function runOurs(code: readonly number[]): number {
  const kernel = new LinuxKernel();
  const hypervisor = openKvm(kernel);
  const vm = hypervisor.createVm({ tssAddress: 0xf800_0000, identityMapAddress: 0xf800_3000 });
  const ram = kernel.map({ length: 0x1_0000, shared: false });
  const vcpu = (() => {
    new Uint8Array(ram.view(0, 0x1_0000)).set(code, 0x1000);
    vm.addMemory({ slot: 0, guestAddress: 0, mapping: ram.handle });
    return vm.createVcpu(0);
  })();
  try {
    const special = vcpu.specialRegisters();
    vcpu.setSpecialRegisters({
      ...special,
      cs: { ...special.cs, base: 0n, selector: 0 },
      ds: { ...special.ds, base: BigInt(MMIO) },
    });
    const registers = vcpu.registers();
    vcpu.setRegisters({ ...registers, rip: 0x1000n, rflags: 2n, rbx: 0n });
    const control = new StateBlock(vcpuControlLayout);
    const device = new Latch(control.words);
    const ports = new Bus();
    const memory = new Bus();
    ports.insert(PORT, 1, device);
    memory.insert(MMIO, 0x1000, device);
    const start = process.hrtime.bigint();
    const end = runVcpu(vcpu, control, ports, memory, NO_ORDERS);
    const elapsed = Number(process.hrtime.bigint() - start);
    if (end.kind !== 'stopped' || device.accesses !== EXITS)
      throw new Error(`The guest ended by ${JSON.stringify(end)}`);
    return elapsed / EXITS;
  } finally {
    vcpu.close();
    vm.close();
    ram.unmap();
    hypervisor.close();
  }
}

export function benchExits(): Row[] {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-bench-'));
  try {
    const peer = path.join(folder, 'exits-peer');
    const source = path.resolve('test/bench/exits-peer.c');
    execFileSync('gcc', ['-O2', '-o', peer, source], { stdio: ['ignore', 'inherit', 'inherit'] });
    return CASES.map(({ figure, code }) => {
      const file = path.join(folder, 'code');
      fs.writeFileSync(file, Uint8Array.from(code));
      const ours: number[] = [];
      const theirs: number[] = [];
      for (let round = 0; round < ROUNDS; round++) {
        ours.push(runOurs(code));
        theirs.push(Number(execFileSync(peer, [file, String(MMIO), String(EXITS)], { encoding: 'utf8' })));
      }
      return row(`${figure} exit`, 'ns', median(ours), median(theirs), 'C loop');
    });
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
