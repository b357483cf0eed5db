/**
 * Instructions on device memory carried out by the emulator, decoding included, against a whole KVM exit for an MMIO read that
 * a device answers: what the emulator adds to each intercept of a hypervisor that does not decode.
 *
 * Runs on whatever KVM the machine has. A figure is the median of rounds; the two alternate.
 */
import { Bus, type BusDevice } from '../../src/devices/bus.js';
import { openKvm } from '../../src/hypervisor/kvm/kvm.js';
import {
  CR0_PE,
  CR0_PG,
  CR4_PAE,
  EFER_LMA,
  RCX,
  RDI,
  RFLAGS,
  RIP,
  RSI,
} from '../../src/hypervisor/mshv/emulator/cpu.js';
import {
  Emulator,
  type EmulatorCpu,
  type EmulatorMemory,
  type EmulatorSegment,
  Outcome,
} from '../../src/hypervisor/mshv/emulator/emulator.js';
import { GuestMemory } from '../../src/memory/guest-memory.js';
import { StateBlock } from '../../src/state/state-block.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { runVcpu, VcpuCommand, vcpuControlLayout } from '../../src/vmm/cpus/vcpu-loop.js';
import { NO_ORDERS } from '../support/vcpu-orders.js';
import { median, row, type Row } from './report.js';

const INSTRUCTIONS = 100_000;
const EXITS = 20_000;
const ROUNDS = 9;
const RAM = 0x4_0000;
const CODE = 0x1_0000;
const DEVICE = 0xd000_0000;
const PML4 = 0x3_0000;

/** mov eax, [rbx]; mov [rbx+4], eax; movzx ecx, byte [rbx+8]; rep movsb; or [rbx], eax */
const MIX = [
  [0x8b, 0x03],
  [0x89, 0x43, 0x04],
  [0x0f, 0xb6, 0x4b, 0x08],
  [0xf3, 0xa4],
  [0x09, 0x03],
];

class BenchCpu implements EmulatorCpu {
  readonly words = new Uint32Array(36);
  readonly segments: EmulatorSegment[] = Array.from({ length: 6 }, (_, index) => ({
    baseLow: 0,
    baseHigh: 0,
    limit: 0xffff_ffff,
    selector: 0,
    attributes: index === 1 ? 0xa09b : 0xc093,
  }));
  readonly cr0 = CR0_PE | CR0_PG;
  readonly cr3Low = PML4;
  readonly cr3High = 0;
  readonly cr4 = CR4_PAE;
  readonly eferLow = EFER_LMA;

  load(): void {
    // They are here.
  }

  loadVector(): void {
    // None in the mix.
  }

  storeVector(): void {
    // None in the mix.
  }
}

class Ram implements EmulatorMemory {
  constructor(private readonly memory: GuestMemory) {}

  read(address: number, into: Uint8Array, length: number): boolean {
    if (!this.memory.contains(address, length)) return false;
    this.memory.copyOut(address, into, 0, length);
    return true;
  }

  write(address: number, from: Uint8Array, length: number): boolean {
    if (!this.memory.contains(address, length)) return false;
    this.memory.copyIn(address, from, 0, length);
    return true;
  }
}

/** @returns nanoseconds per instruction */
function emulate(): number {
  const memory = new GuestMemory([{ address: 0, buffer: new ArrayBuffer(RAM) }]);
  // Four levels, as a kernel maps a device: through 4 KiB pages.
  memory.setU32(PML4, 0x3_1003);
  memory.setU32(0x3_1000, 0x3_2003);
  memory.setU32(0x3_1000 + 3 * 8, 0x3_4003);
  memory.setU32(0x3_2000, 0x3_3003);
  memory.setU32(0x3_4000 + 0x80 * 8, 0x3_5003);
  memory.setU32(0x3_5000, DEVICE | 3);
  for (let page = 0; page < 512; page++) memory.setU32(0x3_3000 + page * 8, (page << 12) | 3);
  const cpu = new BenchCpu();
  const emulator = new Emulator(cpu, new Ram(memory));
  const code = MIX.map((bytes) => Uint8Array.from(bytes));
  const { words } = cpu;
  let address = CODE;
  const at = code.map((bytes) => {
    const start = address;
    address += bytes.length;
    return start;
  });
  words[RFLAGS * 2] = 2;
  const start = process.hrtime.bigint();
  for (let count = 0; count < INSTRUCTIONS; count++) {
    const which = count % MIX.length;
    words[3 * 2] = DEVICE;
    words[RSI * 2] = 0x2_0000;
    words[RDI * 2] = DEVICE + 0x10;
    words[RCX * 2] = 2;
    words[RIP * 2] = at[which];
    let outcome = emulator.begin(code[which], code[which].length);
    while (outcome === Outcome.Read || outcome === Outcome.Write) outcome = emulator.resume();
    if (outcome !== Outcome.Done) throw new Error(emulator.describe());
  }
  return Number(process.hrtime.bigint() - start) / INSTRUCTIONS;
}

/** @returns nanoseconds per exit of a guest that reads the device again and again */
function exits(): number {
  const kernel = new LinuxKernel();
  const hypervisor = openKvm(kernel);
  const vm = hypervisor.createVm({ tssAddress: 0xf800_0000, identityMapAddress: 0xf800_3000 });
  const ram = kernel.map({ length: 0x1_0000, shared: false });
  new Uint8Array(ram.view(0, 0x1_0000)).set([0x8a, 0x07, 0xeb, 0xfc], 0x1000); // mov al, [bx]; jmp back
  vm.addMemory({ slot: 0, guestAddress: 0, mapping: ram.handle });
  const vcpu = vm.createVcpu(0);
  try {
    const special = vcpu.specialRegisters();
    const cs = { ...special.cs, base: 0n, selector: 0 };
    vcpu.setSpecialRegisters({ ...special, cs, ds: { ...special.ds, base: 0xd_0000n } });
    vcpu.setRegisters({ ...vcpu.registers(), rip: 0x1000n, rflags: 2n, rbx: 0n });
    const control = new StateBlock(vcpuControlLayout);
    let accesses = 0;
    const device: BusDevice = {
      read: () => {
        if (++accesses === EXITS) control.words[vcpuControlLayout.at.command] = VcpuCommand.stop;
        return 0;
      },
      write: () => undefined,
    };
    const memory = new Bus();
    memory.insert(0xd_0000, 0x1000, device);
    const start = process.hrtime.bigint();
    runVcpu(vcpu, control, new Bus(), memory, NO_ORDERS);
    return Number(process.hrtime.bigint() - start) / EXITS;
  } finally {
    vcpu.close();
    vm.close();
    ram.unmap();
    hypervisor.close();
  }
}

export function benchEmulator(): Row[] {
  const ours: number[] = [];
  const theirs: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    ours.push(emulate());
    theirs.push(exits());
  }
  return [row('emulated MMIO instruction', 'ns', median(ours), median(theirs), 'KVM MMIO exit')];
}
