/**
 * Guest RAM: allocated on the host the way `--memory` says, and given to the VM as slots.
 * Each range of a zone has a mapping of its own.
 */
import fs from 'node:fs';
import type { MemoryConfig, MemoryZone } from '../../config/memory-config.js';
import type { Vm } from '../../hypervisor/hypervisor.js';
import { GuestMemory, type MemoryRange, WINDOW_SIZE } from '../../memory/guest-memory.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import { errnoName, errnoText, type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import type { MemoryFile, MemoryFiles } from '../host/memory-file.js';
import { MachineError } from '../machine/machine-error.js';
import { hugepageSize as sizeOfHugepages, sizeOptions, sizesOf } from './hotplug.js';
import type { ZoneLayout } from './memory-layout.js';
import { type HeldMemory, nextData } from './memory-pages.js';
import { type MemoryPart, source } from './memory-part.js';
import type { MissingStretch } from './page-server.js';
import { MemorySlots } from './memory-slots.js';

/** A file that memory is in, and from where on. */
interface Backing extends Pick<MemoryFile, 'fd' | 'pageSize'> {
  readonly offset: number;
  /** Where it has something, and it goes with the memory; undefined: it is the machine's, and counts as a whole. */
  readonly holes?: (from: number) => MemoryRange | undefined;
}

/** What memory holds at first. */
export interface MemoryContents {
  /** Goes on from what the files hold, or that is put in by somebody else, as it is touched (`missing`), or is what somebody else has. */
  readonly mode: 'map' | 'ondemand' | 'share';
  /** Descriptors of files with stretches of it, by guest physical address: each is as long as the stretch. */
  readonly files: ReadonlyMap<number, number>;
}

interface AllocateOptions {
  /** False: the guest does not have all of it at once. */
  readonly present?: boolean;
  /** Its owner gives it to the VM. */
  readonly later?: boolean;
  /** What it is in, and from where on. */
  readonly file?: Backing;
  /** Descriptor of what another process has as its shared memory. */
  readonly memfd?: number;
}

/** Memory with what it takes of the host. */
interface Stretch {
  readonly part: MemoryPart;
  readonly mapping: HostMapping;
  readonly zone: MemoryZone;
  /** To be closed with it. */
  readonly fd: number | undefined;
  /** What tells where something is. */
  readonly held: Pick<HeldMemory, 'touched' | 'nextData' | 'file'>;
  /** The guest has it from the start. */
  readonly present: boolean;
  readonly later: boolean;
  /** It held something from the start. */
  readonly content: boolean;
  /** The file from which it is to be put in as it is touched. */
  missing?: number;
}

export class MemoryManager {
  /** RAM that is there from the start. */
  readonly memory: GuestMemory;
  readonly #stretches: Stretch[] = [];

  /**
   * @param zones with their places. What the guest plugs is mapped and known to every thread from the start, too; only its pages
   * come and go.
   * @param files that zones are in
   * @param contents what RAM holds at first, where it is not filled later
   * @throws MachineError when the host cannot map the memory asked for
   */
  constructor(
    private readonly kernel: HostKernel,
    private readonly config: MemoryConfig,
    zones: readonly ZoneLayout[],
    private readonly files: MemoryFiles = new Map(),
    private readonly contents?: MemoryContents,
  ) {
    try {
      for (const { zone, ram } of zones) this.#allocateRam(zone, ram);
      for (const { zone, hotplug } of zones) {
        if (hotplug !== undefined) attempt(zone, () => this.#allocateHeld(zone, hotplug, { present: false }));
      }
    } catch (error) {
      undoAll(error, [() => this.close()]);
    }
    const ram = this.#stretches.filter(({ present }) => present);
    const sources = ram.map(({ part: { range, kind }, mapping }) => source(range, mapping, kind));
    this.memory = new GuestMemory(sources, BOOT_WINDOW);
  }

  #allocateRam(zone: MemoryZone, ranges: readonly MemoryRange[]): void {
    const file = this.files.get(zone.id);
    let offset = 0;
    for (const range of ranges) {
      attempt(zone, () => {
        const { mapping, missing } =
          file === undefined
            ? this.#allocateHeld(zone, range, {})
            : this.#allocate(zone, range, { file: { ...file, offset } });
        // Where there is a page already, none is put in.
        if (zone.prefault && missing === undefined) this.#populate(mapping, 0, range.size);
      });
      offset += range.size;
    }
  }

  /** With what it holds at first, if that is known. @throws MachineError */
  #allocateHeld(zone: MemoryZone, range: MemoryRange, options: AllocateOptions): Stretch {
    const { address, size } = range;
    const file = this.contents?.files.get(address);
    if (this.contents?.mode === 'share')
      return this.#allocate(zone, range, { ...options, memfd: this.#sharable(zone, range, file) });
    const mapped = this.contents?.mode === 'map';
    // What is not plugged reads as zeros when it is: such memory is no copy of a file.
    if (file === undefined || (mapped && options.present === false)) return this.#allocate(zone, range, options);
    if (zone.hugepages || (mapped && zone.shared)) {
      const accepted = mapped ? 'neither shared nor in huge pages' : 'not in huge pages';
      throw new MachineError(`memory_restore_mode=${this.contents!.mode}: accepted is memory that is ${accepted}`);
    }
    // A touch behind the end of a mapped file would end the process (SIGBUS).
    if (fs.fstatSync(file).size !== size) {
      throw new MachineError(
        `${nameOf(range)}: accepted is a file of ${size} bytes, as much as the configuration makes`,
      );
    }
    if (!mapped) {
      const stretch = this.#allocate(zone, range, options);
      stretch.missing = file;
      return stretch;
    }
    // It goes on with pages of its own.
    const fd = this.kernel.duplicate(file);
    const holes = (from: number) => nextData(this.kernel, fd, from);
    return this.#allocate(zone, range, { ...options, file: { fd, pageSize: PAGE_SIZE, offset: 0, holes } });
  }

  /** @returns the file @throws MachineError where it is not what another process would have as this memory */
  #sharable(zone: MemoryZone, range: MemoryRange, file: number | undefined): number {
    if (!zone.shared) throw new MachineError(`${sizeOptions(zone)}: accepted is shared memory`);
    // A touch behind the end of a file that is made shorter would end the process (SIGBUS).
    if (file !== undefined && fs.fstatSync(file).size === range.size && this.kernel.keepsItsSize(file)) return file;
    throw new MachineError(`${nameOf(range)}: accepted is a sealed file of ${range.size} bytes`);
  }

  /** The same at once, before the machine runs; it may have come before. @throws MachineError */
  addNow(zone: MemoryZone, range: MemoryRange): MemoryPart {
    let stretch = this.#stretches.find(
      ({ part: { range: present } }) => present.address === range.address && present.size === range.size,
    );
    if (stretch !== undefined) return stretch.part;
    attempt(zone, () => (stretch = this.#allocateHeld(zone, range, { later: true })));
    return stretch!.part;
  }

  /**
   * Allocates more while the machine runs.
   *
   * @param range of as many bytes as whole pages have
   * @throws MachineError when the host cannot map it; nothing has changed then
   */
  async add(zone: MemoryZone, range: MemoryRange): Promise<MemoryPart> {
    const before = this.#stretches.length;
    try {
      const { part, mapping } = this.#allocate(zone, range, { later: true });
      const piece = Math.max(POPULATED_AT_ONCE, sizeOfHugepages(zone) ?? 0);
      for (let start = 0; zone.prefault && start < range.size; start += piece) {
        this.#populate(mapping, start, Math.min(piece, range.size - start));
        // Main has other things to do meanwhile.
        await new Promise(setImmediate);
      }
      return part;
    } catch (error) {
      const undo = this.#stretches.splice(before).map((stretch) => () => this.#release(stretch));
      return undoAll(tooMuch(`${range.size} bytes more`, error), undo);
    }
  }

  /** Unmaps what `add` has allocated; no thread and no VM uses it any more. */
  remove(part: MemoryPart): void {
    const index = this.#stretches.findIndex((stretch) => stretch.part === part);
    this.#release(this.#stretches.splice(index, 1)[0]);
  }

  #allocate(
    zone: MemoryZone,
    range: MemoryRange,
    { present = true, later = false, file, memfd: given }: AllocateOptions,
  ): Stretch {
    const { address, size } = range;
    const { shared, hugepages } = zone;
    const hugepageSize = file === undefined ? sizeOfHugepages(zone) : undefined;
    // An empty pool of huge pages is an error now, or a fault while the guest runs, which ends the process. What is plugged later is
    // had from the pool then, or not plugged.
    const reserve = present && (zone.reserve ?? hugepages);
    const memfd = () =>
      given === undefined ? this.kernel.memfd('guest-ram', { size, hugepageSize }) : this.kernel.duplicate(given);
    const shareable = () => (shared ? memfd() : undefined);
    const own = file === undefined ? shareable() : file.holes && file.fd;
    const page = Math.max(hugepageSize ?? PAGE_SIZE, file?.pageSize ?? 0);
    // Behind a zone of smaller pages the guest may have it where none of these begins.
    const misplaced = address % page > 0;
    const modulo = Math.max(size >= HUGEST_PAGE ? HUGEST_PAGE : HUGE_PAGE, page);
    const placement = misplaced ? { like: 0, modulo: page } : { like: address, modulo };
    const backing = { fd: file?.fd ?? own, offset: file?.offset, shared, hugepageSize };
    let mapping: HostMapping;
    try {
      mapping = this.kernel.map({ length: size, ...backing, placement, reserve });
    } catch (error) {
      return undoAll(error, own === undefined ? [] : [() => this.kernel.close(own)]);
    }
    // The host has a file's pages again where they were dropped, not zeros.
    const kind = shared ? 'shared' : file === undefined ? 'private' : 'copy';
    const held =
      file !== undefined
        ? { touched: file.holes !== undefined, nextData: file.holes ?? ((from: number) => rest(range, from)) }
        : shared && !hugepages
          ? { touched: false, nextData: (from: number) => nextData(this.kernel, own!, from), file: own }
          : { touched: true, file: own };
    const stretch: Stretch = {
      part: { range, mapping: mapping.handle, kind },
      mapping,
      zone,
      fd: own,
      held,
      present,
      later,
      content: file?.holes !== undefined,
    };
    this.#stretches.push(stretch);
    this.#wish(zone, mapping, page === PAGE_SIZE);
    return stretch;
  }

  /** @param small whether it has pages of the smallest size */
  #wish(zone: MemoryZone, mapping: HostMapping, small: boolean): void {
    if (small) this.#advise(zone, mapping, this.config.thp ? 'hugepage' : 'nohugepage');
    if (zone.mergeable) this.#advise(zone, mapping, 'mergeable');
    if (zone.host_numa_node !== undefined) this.#bind(zone, mapping, zone.host_numa_node);
  }

  /**
   * Has files that hold what memory holds in its place: with whoever else maps them it is there once. Nothing touches it meanwhile.
   *
   * @param files by guest physical address, each as long as its stretch; of a machine whose memory is neither shared nor in huge pages
   * @returns what the VM has to be told of
   * @throws SystemError; what has been done by then is as good
   */
  mapFrom(files: MemoryContents['files']): MemoryPart[] {
    return this.#stretches.map((stretch, index) => {
      const { part, mapping, zone, fd: old } = stretch;
      const fd = this.kernel.duplicate(files.get(part.range.address)!);
      try {
        mapping.replace(fd);
      } catch (error) {
        return undoAll(error, [() => this.kernel.close(fd)]);
      }
      const held = { touched: true, nextData: (from: number) => nextData(this.kernel, fd, from) };
      this.#stretches[index] = { ...stretch, fd, held, content: true };
      part.kind = 'copy';
      this.memory.setKind(part.range.address, 'copy');
      if (old !== undefined) this.kernel.close(old);
      this.#wish(zone, mapping, true);
      return part;
    });
  }

  #bind({ id }: MemoryZone, mapping: HostMapping, node: number): void {
    try {
      this.kernel.bindToNode(mapping, node);
    } catch (cause) {
      if (!(cause instanceof SystemError)) throw cause;
      throw new MachineError(`--memory-zone id=${id},host_numa_node=${node}: the host does not bind memory to it`, {
        cause,
      });
    }
  }

  /** Puts pages everywhere: after the advice on huge pages, or there would be small ones already, and after the node. @throws SystemError */
  #populate(mapping: HostMapping, start: number, length: number): void {
    const errno = -this.kernel.populateRaw(Number(mapping.handle.address) + start, length);
    if (errno <= 0) return;
    const code = errnoName(errno);
    // Linux before 5.14 does not know that advice. A write to each page that changes nothing, as nobody else has it yet.
    if (code !== 'EINVAL') throw new SystemError(code, errno, 'madvise', errnoText(errno));
    for (let at = start, end = start + length; at < end; at += WINDOW_SIZE) {
      const bytes = new Uint8Array(mapping.view(at, Math.min(WINDOW_SIZE, end - at)));
      for (let page = 0; page < bytes.length; page += PAGE_SIZE) bytes[page] |= 0;
    }
  }

  #advise({ id, implicit }: MemoryZone, mapping: HostMapping, advice: 'hugepage' | 'nohugepage' | 'mergeable'): void {
    try {
      this.kernel.advise(mapping, advice);
    } catch (error) {
      // A host kernel built without huge pages has none to give or refuse; without KSM, the user's wish cannot be met.
      if (!(error instanceof SystemError)) throw error;
      if (advice === 'mergeable') {
        const option = implicit ? '--memory ' : `--memory-zone id=${id},`;
        throw new MachineError(`${option}mergeable=on: the host's kernel has no page merging`, { cause: error });
      }
    }
  }

  /**
   * Gives all of it to the VM, but for what comes when the machine is there.
   *
   * @returns the VM's memory, to which more may be added
   * @throws MachineError when the hypervisor refuses it: a slot of KVM's holds less than 8 TiB
   */
  attach(vm: Vm): MemorySlots {
    const slots = new MemorySlots(vm);
    try {
      for (const { part, later } of this.#stretches) if (!later) slots.add(part);
      return slots;
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      throw new MachineError(`${sizesOf(this.config)}: the hypervisor does not take that much`, {
        cause: error,
      });
    }
  }

  /** All of it, as it is written to a file. */
  held(): HeldMemory[] {
    return this.#stretches.map(({ part: { range }, mapping, held }) => ({
      range,
      hostAddress: Number(mapping.handle.address),
      view: (offset, length) => mapping.view(offset, length),
      ...held,
    }));
  }

  /** Those that hold nothing yet. */
  unfilled(): HeldMemory[] {
    const filled = this.#stretches.filter(({ content, missing }) => content || missing !== undefined);
    const ranges = new Set(filled.map(({ part }) => part.range));
    return this.held().filter(({ range }) => !ranges.has(range));
  }

  /** What is to be put in as it is touched; the descriptors are those of `contents`. */
  missing(): MissingStretch[] {
    return this.#stretches.flatMap(({ part: { range }, mapping: { handle }, missing: fd }) =>
      fd === undefined ? [] : { hostAddress: Number(handle.address), size: range.size, fd, name: nameOf(range) },
    );
  }

  /** Unmaps it; no thread and no VM uses it any more. */
  close(): void {
    closeAll(this.#stretches.splice(0).map((stretch) => () => this.#release(stretch)));
  }

  #release({ mapping, fd }: Stretch): void {
    closeAll([() => mapping.unmap(), () => fd !== undefined && this.kernel.close(fd)]);
  }
}

const nameOf = ({ address }: MemoryRange) => `memory at 0x${address.toString(16)}`;

function rest({ size }: MemoryRange, from: number): MemoryRange | undefined {
  return from < size ? { address: from, size: size - from } : undefined;
}

/** @throws MachineError where the host refuses */
function attempt(zone: MemoryZone, allocate: () => void): void {
  try {
    allocate();
  } catch (error) {
    throw tooMuch(sizeOptions(zone), error);
  }
}

function tooMuch(what: string, error: unknown): unknown {
  return error instanceof SystemError
    ? new MachineError(`${what}: the host cannot map that much`, { cause: error })
    : error;
}

/**
 * Page sizes by which processors map the memory of guests: hypervisors use one where guest and host addresses are equal modulo
 * its size. RAM of this size or more may have pages of 1 GiB.
 */
const PAGE_SIZE = 2 ** 12;
const HUGE_PAGE = 2 ** 21;
const HUGEST_PAGE = 2 ** 30;
/** Some 20 ms of a processor's time. Bytes. */
const POPULATED_AT_ONCE = 2 ** 26;
/** Main writes a kernel, an initramfs and tables, and looks at no more: mostly less than V8 would collect garbage for (guest-memory.ts). */
const BOOT_WINDOW = 2 ** 23;
