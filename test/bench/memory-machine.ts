/** A machine whose memory is full of data, and QEMU's with the same guest: what is kept, copied and sent by benchmarks. */
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { kernel } from '../lab/kernels.js';
import { guestProgram, writeInitramfs } from '../support/guest-image.js';
import { type Controlled, Qemu, Vmm } from './controlled.js';

export const PEER = 'QEMU q35';
const CMDLINE = 'console=ttyS0 quiet loglevel=1 panic=-1 reboot=t';
/** What the kernel and its user space have besides. */
const REST_MIB = 160;

/** What of a machine's memory is filled. */
export const filled = (ramMib: number) => ramMib - REST_MIB;

export interface MemoryMachine {
  readonly ramMib: number;
  readonly cpus: number;
  readonly kernel: string;
  readonly initramfs: string;
}

export async function memoryMachine(folder: string, ramMib: number, cpus = 1): Promise<MemoryMachine> {
  const cloud = await kernel('cloud');
  const initramfs = path.join(folder, `initramfs-${ramMib}`);
  await writeInitramfs(initramfs, {
    command: `exec /bin/memory-guest ${filled(ramMib)}`,
    files: { 'bin/memory-guest': guestProgram(folder, 'memory-guest') },
  });
  return { ramMib, cpus, kernel: cloud.vmlinuz, initramfs };
}

/** @returns a process of ours whose guest has filled its memory */
export async function bootOurs({ ramMib, cpus, kernel: image, initramfs }: MemoryMachine): Promise<Vmm> {
  const ours = new Vmm();
  await ours.answers();
  await ours.call('PUT', 'vm.create', {
    cpus: { boot_vcpus: cpus, max_vcpus: cpus },
    payload: { kernel: image, initramfs, cmdline: CMDLINE },
    memory: { size: ramMib * 2 ** 20 },
    serial: { mode: 'Tty' },
    console: { mode: 'Off' },
  });
  await ours.call('PUT', 'vm.boot');
  await ours.prints('@@READY');
  return ours;
}

/** What QEMU is started with, whether it boots the machine or gets it. */
export function qemuOptions({ ramMib, cpus, kernel: image, initramfs }: MemoryMachine): string[] {
  return [
    ...['-m', String(ramMib), '-smp', String(cpus)],
    ...['-object', 'rng-random,id=rng,filename=/dev/urandom', '-device', 'virtio-rng-pci,rng=rng'],
    ...['-kernel', image, '-initrd', initramfs, '-append', CMDLINE],
  ];
}

export async function bootQemu(machine: MemoryMachine): Promise<Qemu> {
  const qemu = new Qemu(qemuOptions(machine));
  await qemu.answers();
  await qemu.prints('@@READY');
  return qemu;
}

/** By then a process that waits for a machine has done what it does while nothing is asked of it. */
const WARM_MILLISECONDS = 6000;

async function waits<Process extends Controlled>(process: Process): Promise<Process> {
  await process.answers();
  await sleep(WARM_MILLISECONDS);
  return process;
}

/** @returns a process of ours that waits for a machine */
export const waitingOurs = () => waits(new Vmm());
export const waitingQemu = (machine: MemoryMachine) => waits(new Qemu([...qemuOptions(machine), '-incoming', 'defer']));

/** No limit to what it sends, as we have none; and it tells how it goes. */
export async function prepareMigration(qemu: Qemu): Promise<void> {
  await qemu.call('migrate-set-capabilities', { capabilities: [{ capability: 'events', state: true }] });
  await qemu.call('migrate-set-parameters', { 'max-bandwidth': 2 ** 40 });
}

export async function migrated(qemu: Qemu): Promise<void> {
  const ends = new Set(['completed', 'failed']);
  const { data } = await qemu.hears(
    ({ event, data: told }) => event === 'MIGRATION' && ends.has(String(told?.['status'])),
  );
  if (data?.['status'] !== 'completed') throw new Error(`QEMU: ${JSON.stringify(data)}`);
}
