/**
 * Runs a freestanding arm64 guest on the KVM backend and prints, as JSON, what it did: `arm-guest-runner.js IMAGE`, in an Arm
 * lab. test/e2e/arm-bare-guest.ts has the guest and says what is expected.
 *
 * The image lies at the start of RAM; vCPU 0 enters it. All other addresses are this program's: a store is noted, a load gives
 * the address. Stores to three of them raise interrupts: the SPI, a message of a PCI function, and the same by its route.
 */
import fs from 'node:fs';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { attachKvmArm64Vcpu, openKvmArm64 } from '../../src/hypervisor/kvm/aarch64/kvm.js';
import { attachKvmSignals } from '../../src/hypervisor/kvm/signals.js';
import { ExitKind, type VcpuHandle, type VmHandle } from '../../src/hypervisor/hypervisor.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';

const RAM = 0x4000_0000;
const RAM_SIZE = 0x20_0000;
const GIC = { distributor: 0x0800_0000, its: 0x0808_0000, redistributors: 0x080a_0000, spis: 96 };
const SPI = 40;
const RAISE_SPI = 0x1000_0018;
const SEND_MESSAGE = 0x1000_0030;
const SIGNAL_ROUTE = 0x1000_0034;
const DOORBELL = 0x1000_1000;
/** GITS_TRANSLATER, to which a PCI function writes its messages. */
const TRANSLATER = GIC.its + 0x1_0040;
/** Segment 1, slot 2. */
const REQUESTER = 0x1_0010;
/** Of the message that is sent, and of the one behind the route. */
const EVENTS = [3, 4] as const;
const VCPUS = 2;
/** A guest that waits in vain is brought back, and what it did is printed. */
const LIMIT_MILLISECONDS = 300_000;

interface Task {
  readonly vcpu: VcpuHandle;
  readonly vm: VmHandle;
  /** Eventfds of the SPI and of the route. */
  readonly spi: number;
  readonly route: number;
}

const kernel = new LinuxKernel();

/** What a vCPU thread tells main. */
type Report = { readonly thread: number } | { readonly store: string } | { readonly end: string };

function runVcpu({ vcpu: handle, vm, spi, route }: Task): void {
  const signals = attachKvmSignals(kernel, vm);
  const vcpu = attachKvmArm64Vcpu(kernel, handle);
  const report = (message: Report) => parentPort!.postMessage(message);
  report({ thread: vcpu.enterThread() });
  for (;;) {
    const kind = vcpu.run();
    const { address, count, size, stride, detail } = vcpu.exit;
    switch (kind) {
      case ExitKind.MmioWrite: {
        const data = Array.from({ length: count }, (_, index) => vcpu.data(index).toString(16));
        report({ store: `${size}*${count} ${address.toString(16)} ${data.join(' ')}` });
        if (address === RAISE_SPI) kernel.signal(spi);
        if (address === SEND_MESSAGE) signals.signalMsi(TRANSLATER, 0, EVENTS[0], REQUESTER);
        if (address === SIGNAL_ROUTE) kernel.signal(route);
        break;
      }
      case ExitKind.MmioRead:
        for (let index = 0; index < count; index++) vcpu.setData(index, address + index * stride);
        break;
      case ExitKind.Handled:
        break;
      default:
        report({ end: `${Object.keys(ExitKind)[kind]}${detail === '' ? '' : `: ${detail}`}` });
        return;
    }
  }
}

async function main(image: string): Promise<void> {
  const hypervisor = openKvmArm64(kernel);
  const vm = hypervisor.createVm({ ipaBits: Math.min(hypervisor.ipaBits, 40), gic: GIC });
  const ram = kernel.map({ length: RAM_SIZE, shared: false });
  new Uint8Array(ram.view(0, RAM_SIZE)).set(fs.readFileSync(image));
  vm.addMemory({ slot: 0, guestAddress: RAM, mapping: ram.handle });
  const vcpus = Array.from({ length: VCPUS }, (_, id) => vm.createVcpu(id, id > 0));
  vm.finishVcpus();
  const { eventfd: spi } = vm.createInterrupt(SPI);
  const route = kernel.eventfd();
  const number = vm.allocateMsiRoute();
  vm.signals.setMsiRoute(number, TRANSLATER, 0, EVENTS[1], REQUESTER);
  vm.signals.connectMsi(number, route);
  const doorbell = kernel.eventfd();
  vm.signals.addDoorbell(DOORBELL, doorbell);
  vcpus[0].setBootState(BigInt(RAM), 0x1234_5678_9abc_def0n);

  const threads: number[] = [];
  const stores: string[][] = vcpus.map(() => []);
  const ends = vcpus.map(
    (vcpu, id) =>
      new Promise<string>((resolve, reject) => {
        const task: Task = { vcpu: vcpu.handle, vm: vm.handle, spi, route };
        const worker = new Worker(new URL(import.meta.url), { workerData: task });
        worker.on('error', reject);
        worker.on('message', (message: Report) => {
          if ('thread' in message) threads[id] = message.thread;
          else if ('store' in message) stores[id].push(message.store);
          else resolve(message.end);
        });
      }),
  );
  const limit = setTimeout(() => vcpus[0].kick(threads[0]), LIMIT_MILLISECONDS);
  const first = await ends[0];
  clearTimeout(limit);
  // The other one sleeps in KVM_RUN; a kick brings it back.
  vcpus[1].kick(threads[1]);
  const report = {
    maxVcpus: hypervisor.maxVcpus,
    ipaBits: hypervisor.ipaBits,
    mpidr: vcpus.map((vcpu) => vcpu.mpidr()),
    ends: [first, await ends[1]],
    stores,
    doorbell: kernel.drainEvent(doorbell),
  };
  process.stdout.write(`${JSON.stringify(report)}\n`);
  for (const vcpu of vcpus) vcpu.close();
  for (const eventfd of [doorbell, route]) kernel.close(eventfd);
  vm.close();
  hypervisor.close();
}

if (isMainThread) await main(process.argv[2]);
else runVcpu(workerData as Task);
