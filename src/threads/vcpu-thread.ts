/** The composition root of a vCPU thread: it attaches to its vCPU, builds its own view of the devices, and runs. */
import fs from 'node:fs';
import { parentPort, receiveMessageOnPort } from 'node:worker_threads';
import type { GuestMemory } from '../memory/guest-memory.js';
import { WrittenPages, type WrittenPagesHandle } from '../memory/written-pages.js';
import { StateBlock } from '../state/state-block.js';
import type { HostKernel } from '../sys/host-kernel.js';
import type { VcpuChange, VcpuMessage, VcpuWorkerData } from '../vmm/cpus/cpu-manager.js';
import { attachMemory, attachPart } from '../vmm/memory/memory-part.js';
import { attachPlatform } from '../vmm/boards/platform.js';
import { command, runVcpu, VcpuCommand, vcpuControlLayout } from '../vmm/cpus/vcpu-loop.js';
import { attachSignals, attachVcpu } from './backends.js';
import { startData } from './start-data.js';

/** Spends the thread's life in the guest. */
export function runVcpuThread(kernel: HostKernel): void {
  const data = startData() as VcpuWorkerData;
  const post = (message: VcpuMessage) => parentPort!.postMessage(message);

  const control = new StateBlock(vcpuControlLayout, data.control);
  const { threadId } = vcpuControlLayout.at;
  const { ports, memory, endOfInterrupt, apply } = attachPlatform(
    data.platform,
    kernel,
    attachSignals(data.hypervisor, kernel, data.platform.vm),
    (event) => {
      // A guest that resets or powers itself off runs no further instruction; main stops the other vCPUs.
      if (event.kind === 'reset' || event.kind === 'power-off') command(control, VcpuCommand.stop);
      post(event);
    },
  );

  // The thread's name, for tools such as top and taskset.
  fs.writeFileSync(`/proc/self/task/${kernel.threadId()}/comm`, data.name);
  if (data.affinity !== undefined) kernel.setAffinity(data.affinity);
  let guestMemory: GuestMemory | undefined;
  const vcpu = attachVcpu(data.hypervisor, kernel, data.vcpu, () => {
    guestMemory = attachMemory(data.memory, kernel);
    return guestMemory;
  });
  const track = (pages: WrittenPagesHandle | undefined) => {
    // Without memory it writes none.
    if (guestMemory !== undefined) guestMemory.written = pages && WrittenPages.attach(kernel, pages);
  };
  track(data.written);
  Atomics.store(control.words, threadId, vcpu.enterThread());
  let changes = 0;
  const end = runVcpu(vcpu, control, ports, memory, {
    endOfInterrupt,
    held: (time) => post({ kind: 'held', time }),
    attend: () => {
      for (let next = receiveMessageOnPort(parentPort!); next !== undefined; next = receiveMessageOnPort(parentPort!)) {
        const change = next.message as VcpuChange;
        if (change.kind === 'add-memory') guestMemory?.add(attachPart(change.part, kernel));
        else if (change.kind === 'remove-memory') guestMemory?.remove(change.part.range.address);
        else if (change.kind === 'track-writes') track(change.pages);
        else apply(change);
        changes++;
      }
      post({ kind: 'attended', changes });
    },
  });
  // The thread's id may be used again once it is gone.
  Atomics.store(control.words, threadId, 0);
  if (end.kind !== 'stopped') post({ kind: 'ended', end, instructionPointer: vcpu.instructionPointer() });
}
