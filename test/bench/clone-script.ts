/** What main asks of KVM as it restores a machine, step by step, for a program in C that does the same (fork-peer.c). */
import fs from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { restoreSchema } from '../../src/config/restore-config.js';
import * as abi from '../../src/hypervisor/kvm/abi.js';
import { openHostKvm } from '../../src/hypervisor/kvm/host.js';
import type { HostKernel, MapOptions, HostMapping } from '../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { Incarnation } from '../../src/vmm/machine/incarnation.js';
import { Vmm } from '../../src/vmm/machine/vmm.js';
import { openSnapshot } from '../../src/vmm/snapshot/snapshot-folder.js';
import { ThreadScript } from '../../src/vmm/thread-script.js';

const Kind = { value: 0, buffer: 1, memory: 2, event: 3, counter: 4 } as const;
/** Where the number of an eventfd is in an argument. Bytes. */
const EVENTS: ReadonlyMap<number, number> = new Map([
  [abi.KVM_IRQFD, 0],
  [abi.KVM_IOEVENTFD, 20],
]);
const KVM_MINOR_TYPE = 0xae;

interface Mapped {
  readonly address: bigint;
  readonly length: number;
  readonly file: string;
}

/** A host kernel that writes down what it is asked. */
class Recorder {
  readonly #steps: Buffer[] = [];
  /** Descriptors of KVM's, in the order in which they came. */
  readonly #targets: number[] = [];
  readonly #mapped: Mapped[] = [];
  readonly kernel: HostKernel;

  /** @param counters the guest's time-stamp counter of each vCPU, as it was saved */
  constructor(
    kernel: HostKernel,
    private readonly counters: readonly bigint[],
  ) {
    this.kernel = new Proxy(kernel, {
      get: (target, name) => {
        const value = Reflect.get(target, name) as unknown;
        if (typeof value !== 'function') return value;
        return (...args: unknown[]) => this.#call(String(name), args, () => value.apply(target, args) as unknown);
      },
    });
  }

  get script(): Buffer {
    return Buffer.concat(this.#steps);
  }

  #call(name: string, args: readonly unknown[], call: () => unknown): unknown {
    const before = args[2] instanceof Uint8Array ? Buffer.from(args[2]) : undefined;
    const result = call();
    if (name === 'open' && args[0] === '/dev/kvm') this.#targets.push(result as number);
    if (name === 'map') {
      const { fd } = args[0] as MapOptions;
      if (fd !== undefined)
        this.#mapped.push({ ...(result as HostMapping).handle, file: fs.readlinkSync(`/proc/self/fd/${fd}`) });
    }
    if (/^ioctl/.test(name)) this.#ioctl(args[0] as number, args[1] as number, before ?? Number(args[2] ?? 0));
    const created = name === 'ioctl' && [abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU].includes(args[1] as number);
    if (created) this.#targets.push(result as number);
    return result;
  }

  #ioctl(fd: number, request: number, argument: Buffer | number): void {
    const target = this.#targets.indexOf(fd);
    if (target < 0 || ((request >> 8) & 0xff) !== KVM_MINOR_TYPE) return;
    if (typeof argument === 'number') this.#step(Kind.value, target, request, argument);
    else if (request === abi.KVM_SET_DEVICE_ATTR || request === abi.KVM_GET_DEVICE_ATTR) {
      // Of vCPUs, by a pointer: the offset of that counter, which is another in each process.
      this.#step(Kind.counter, target, request, this.counters[target - 2], argument);
    } else if (request === abi.KVM_SET_USER_MEMORY_REGION) this.#memory(target, request, argument);
    else {
      const event = EVENTS.get(request);
      this.#step(event === undefined ? Kind.buffer : Kind.event, target, request, event ?? 0, argument);
    }
  }

  #memory(target: number, request: number, argument: Buffer): void {
    const at = argument.readBigUInt64LE(24);
    const mapped = this.#mapped.find(({ address }) => address === at);
    if (mapped === undefined) throw new Error('Memory is in no file');
    const fields = Buffer.alloc(24);
    fields.writeBigUInt64LE(BigInt(argument.readUInt32LE(0)), 0);
    argument.copy(fields, 8, 8, 24);
    this.#step(Kind.memory, target, request, 0, Buffer.concat([fields, Buffer.from(`${mapped.file}\0`)]));
  }

  #step(kind: number, target: number, request: number, value: number | bigint, data: Buffer = Buffer.alloc(0)): void {
    const head = Buffer.alloc(24);
    for (const [index, word] of [kind, target, request, data.length].entries())
      head.writeUInt32LE(word >>> 0, index * 4);
    head.writeBigUInt64LE(BigInt(value), 16);
    const length = head.length + data.length;
    this.#steps.push(head, data, Buffer.alloc(-length & 7));
  }
}

/** Restores a snapshot here, by mapping it. @returns what that asked of KVM */
export async function cloneScript(folder: string): Promise<Buffer> {
  const host = new LinuxKernel();
  const snapshot = await openSnapshot(host, folder);
  await snapshot.close();
  const { board } = snapshot.machine.life;
  if (board.architecture !== 'x86_64') throw new Error('A machine of x86_64 is wanted');
  const recorder = new Recorder(
    host,
    board.vcpus.map(({ tsc }) => tsc),
  );
  const { kernel } = recorder;
  const worker = (name: string) => pathToFileURL(path.resolve(`dist/${name}-worker.js`));
  const threads = (name: string) => new ThreadScript(worker(name));
  const nothing = () => undefined;
  const logger = { error: nothing, warn: nothing, info: nothing, debug: nothing };
  const vmm = new Vmm(
    {
      kernel,
      hypervisor: openHostKvm(kernel),
      logger,
      tell: nothing,
      vcpuWorker: threads('vcpu'),
      ioWorker: threads('io'),
      fillWorker: worker('fill'),
      abort: (error) => {
        throw error;
      },
      openTaps: () => {
        throw new Error('It has no network');
      },
      makeLife: (...parts) => new Incarnation(...parts),
      ask: () => Promise.reject(new Error('It makes no clones')),
    },
    {},
  );
  const source = { source_url: pathToFileURL(folder).href, memory_restore_mode: 'Map', resume: true };
  const anew = { serial: { mode: 'Null' } };
  await vmm.restore(restoreSchema.parse({ ...source, ...anew }), new Map());
  const { script } = recorder;
  await vmm.shutdownVmm('it has been seen');
  return script;
}
