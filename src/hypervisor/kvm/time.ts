/**
 * The clocks of a VM's guest: kvmclock and the time-stamp counters. They stand still, go on, are saved and set, all vCPUs by the same
 * number, so that they stay in step.
 *
 * A counter is the host's, scaled if the guest's has another frequency, and an offset (Documentation/virt/kvm/devices/vcpu.rst, 4.1). What
 * is called the host's here is scaled.
 */
import type { HostKernel } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import type { Msr } from '../x86-state.js';
import * as abi from './abi.js';
import { IA32_TSC } from './msrs.js';

/** KVM takes frequencies that differ by less for the same: its module's parameter tsc_tolerance_ppm. */
const TOLERANCE = 250e-6;
const NANOSECONDS_PER_MILLISECOND = 1_000_000n;
/** A measurement of clock and counter that took no longer is taken, else the quickest of so many. Nanoseconds. */
const QUICK = 10_000n;
const MEASUREMENTS = 8;

/** A vCPU's part of it. */
export interface TimedVcpu {
  /** Of the guest's time-stamp counter; undefined: the host's is not stable. */
  tscKhz(): number | undefined;
  setTscKhz(khz: number): void;
  /** What its time-stamp counter is ahead of the host's, modulo 2^64; undefined before Linux 5.16. */
  tscOffset(): bigint | undefined;
  /** @param offset modulo 2^64 */
  setTscOffset(offset: bigint): void;
  msr(index: number): bigint;
  setMsrs(msrs: readonly Msr[]): void;
  /** The guest's watchdog does not take the time in which it stands still for its own fault. */
  excuseLateness(): void;
}

interface Moment {
  /** Nanoseconds of kvmclock. */
  readonly clock: bigint;
  /** The host's counter; undefined before Linux 5.16, where there are no offsets to be set. */
  readonly counter: bigint | undefined;
}

interface Stopped extends Moment {
  /** Those of the guest, where the host's is not known. */
  readonly counters: ReadonlyMap<TimedVcpu, bigint>;
}

export class KvmTime {
  #stopped: Stopped | undefined;
  /** The host's counter at the moment that the saved counters are for; undefined: nothing has been loaded. */
  #loading: bigint | undefined;
  #otherFrequency = false;

  /** @param fd of the VM @param vcpus which are added as they come */
  constructor(
    private readonly kernel: HostKernel,
    private readonly device: number,
    private readonly fd: number,
    private readonly vcpus: readonly TimedVcpu[],
  ) {}

  /**
   * KVM starts the clocks of all vCPUs together by itself: each new one takes the time of the first.
   *
   * @param passed nanoseconds that they are to be ahead of where they stood; before Linux 5.16 kvmclock alone is, as the counters go on
   */
  start(passed: bigint): void {
    const stopped = this.#stopped;
    if (stopped === undefined) return;
    this.#stopped = undefined;
    const now = this.#now();
    if (stopped.counter !== undefined && now.counter !== undefined) {
      const back = now.counter - stopped.counter - this.#ticks(passed);
      for (const vcpu of this.vcpus) vcpu.setTscOffset(vcpu.tscOffset()! - back);
    }
    // The counters run since that moment, and so does the clock.
    const since = this.#readClock().clock - now.clock;
    const data = new Uint8Array(abi.CLOCK_SIZE);
    new DataView(data.buffer).setBigUint64(abi.CLOCK.clock, stopped.clock + passed + since, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_CLOCK, data);
  }

  stop(): void {
    this.#standAt(this.#now());
  }

  #standAt(moment: Moment): void {
    // Before Linux 5.16 those of the guest go on.
    const read = moment.counter === undefined ? this.vcpus : [];
    this.#stopped = { ...moment, counters: new Map(read.map((vcpu) => [vcpu, vcpu.msr(IA32_TSC)])) };
    for (const vcpu of this.vcpus) vcpu.excuseLateness();
  }

  /** Nanoseconds that kvmclock showed when it was stopped. */
  get clock(): bigint {
    return this.#stoppedAt().clock;
  }

  /** IA32_TSC of a vCPU when it was stopped. */
  counterOf(vcpu: TimedVcpu): bigint {
    const { counter, counters } = this.#stoppedAt();
    return counters.get(vcpu) ?? BigInt.asUintN(64, counter! + vcpu.tscOffset()!);
  }

  #stoppedAt(): Stopped {
    if (this.#stopped === undefined) throw new HypervisorError('The time of the machine has not been stopped');
    return this.#stopped;
  }

  /**
   * Gives a vCPU its saved counter: as all get theirs for one moment, they are as far from each other as they were.
   *
   * @throws HypervisorError when this host has no such frequency
   */
  load(vcpu: TimedVcpu, { tsc, tscKhz }: { readonly tsc: bigint; readonly tscKhz?: number | undefined }): void {
    this.#setFrequency(vcpu, tscKhz);
    const offset = vcpu.tscOffset();
    if (offset === undefined) {
      // KVM takes counters that are written within a second, and are as far apart, for one.
      vcpu.setMsrs([{ index: IA32_TSC, value: tsc }]);
      return;
    }
    this.#loading ??= vcpu.msr(IA32_TSC) - offset;
    vcpu.setTscOffset(tsc - this.#loading);
  }

  /** After all vCPUs: time stands, as after {@link stop}. @param clock nanoseconds of kvmclock */
  loadClock(clock: bigint): void {
    this.#standAt({ clock, counter: this.#loading });
  }

  /** A vCPU that comes when others have been given another frequency than the host's, which KVM gives it. */
  join(vcpu: TimedVcpu): void {
    const [first] = this.vcpus;
    if (!this.#otherFrequency) return;
    this.#setFrequency(vcpu, first.tscKhz());
    vcpu.setTscOffset(first.tscOffset()!);
  }

  #setFrequency(vcpu: TimedVcpu, khz: number | undefined): void {
    const own = vcpu.tscKhz();
    if (khz === undefined || own === undefined || khz === own) return;
    const scales = this.kernel.ioctl(this.device, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP.TSC_CONTROL) > 0;
    if (!scales && Math.abs(khz - own) > own * TOLERANCE) {
      throw new HypervisorError(
        `The guest's time-stamp counter runs at ${khz} kHz and this host's at ${own} kHz, which its processor cannot scale`,
      );
    }
    vcpu.setTscKhz(khz);
    this.#otherFrequency = true;
  }

  /** Of the guest's counter. */
  #ticks(nanoseconds: bigint): bigint {
    return (nanoseconds * BigInt(this.vcpus[0].tscKhz() ?? 0)) / NANOSECONDS_PER_MILLISECOND;
  }

  /**
   * KVM tells the host's counter of the very moment with the clock, unscaled, where it derives the clock from it: not before vCPUs have
   * run, nor when their offsets differ. A vCPU can be asked for it in any case; if that takes long, something came between, and it is asked again.
   */
  #now(): Moment {
    const { clock, hostTsc } = this.#readClock();
    const offset = this.vcpus.at(0)?.tscOffset();
    if (offset === undefined) return { clock, counter: undefined };
    if (hostTsc !== undefined && !this.#otherFrequency) return { clock, counter: hostTsc };
    let best: Moment | undefined;
    let width = QUICK;
    for (let left = MEASUREMENTS; left > 0 && (best === undefined || width > QUICK); left--) {
      const before = this.#readClock().clock;
      const counter = this.vcpus[0].msr(IA32_TSC) - offset;
      const taken = this.#readClock().clock - before;
      if (best !== undefined && taken >= width) continue;
      best = { clock: before, counter };
      width = taken;
    }
    return best!;
  }

  #readClock(): { readonly clock: bigint; readonly hostTsc: bigint | undefined } {
    const data = new Uint8Array(abi.CLOCK_SIZE);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_GET_CLOCK, data);
    const view = new DataView(data.buffer);
    const told = (view.getUint32(abi.CLOCK.flags, true) & abi.KVM_CLOCK_HOST_TSC) !== 0;
    return {
      clock: view.getBigUint64(abi.CLOCK.clock, true),
      hostTsc: told ? view.getBigUint64(abi.CLOCK.hostTsc, true) : undefined,
    };
  }
}
