/** What the backend does with each message, with and without a register page, over a driver that answers as told. */
import { describe, expect, test } from '@jest/globals';
import { ExitKind } from '../../../src/hypervisor/hypervisor.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { MshvVcpu, VP_PAGES_SIZE } from '../../../src/hypervisor/mshv/vcpu.js';
import { GuestMemory } from '../../../src/memory/guest-memory.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';

const VP = 5;
const R = abi.HV_X64_REGISTER;
const PAGE = abi.REGISTER_PAGE;
const RIP = 0xffff_ffff_8100_0ffcn;

/** The driver, as far as a VP's thread meets it: its messages are given, its registers can be looked at. */
class Driver extends LinuxKernel {
  readonly registers = new Map<number, bigint>();
  next: ((message: DataView) => void) | number = 0;
  page: DataView | undefined;

  /** The register page is taken back, as at the start of a run. */
  #takePage(): void {
    const { page } = this;
    if (page === undefined) return;
    const dirty = page.getUint32(PAGE.dirty, true);
    const { GENERAL, IP, FLAGS } = abi.HV_X64_REGISTER_CLASS;
    const take = (bit: number, first: number, count: number) => {
      if ((dirty & (1 << bit)) === 0) return;
      for (let index = first; index < first + count; index++) {
        this.registers.set(R.RAX + index, page.getBigUint64(PAGE.generalRegisters + index * 8, true));
      }
    };
    take(GENERAL, 0, 16);
    take(IP, 16, 1);
    take(FLAGS, 17, 1);
    page.setUint32(PAGE.dirty, 0, true);
  }

  #givePage(): void {
    const { page } = this;
    if (page === undefined) return;
    page.setUint8(PAGE.isValid, 1);
    for (let index = 0; index < 18; index++) {
      page.setBigUint64(PAGE.generalRegisters + index * 8, this.registers.get(R.RAX + index) ?? 0n, true);
    }
  }

  override ioctlRaw(_fd: number, request: number, value: number): number {
    expect(request).toBe(abi.MSHV_RUN_VP);
    this.#takePage();
    if (typeof this.next === 'number') return this.next;
    this.#givePage();
    const mapping = this.attach({ address: BigInt(value), length: abi.MESSAGE_SIZE });
    this.next(new DataView(mapping.view(0, abi.MESSAGE_SIZE)));
    return 0;
  }

  override ioctlBufferRaw(_fd: number, request: number, argument: Uint8Array): number {
    expect(request).toBe(abi.MSHV_ROOT_HVCALL);
    const view = new DataView(argument.buffer);
    const input = this.attach({ address: view.getBigUint64(abi.ROOT_HVCALL.inPointer, true), length: 4096 });
    const given = new DataView(input.view(0, 4096));
    const reps = view.getUint16(abi.ROOT_HVCALL.reps, true);
    expect(given.getUint32(abi.SET_VP_REGISTERS.vpIndex, true)).toBe(VP);
    if (view.getUint16(abi.ROOT_HVCALL.code, true) === abi.HVCALL.GET_VP_REGISTERS) {
      const output = this.attach({ address: view.getBigUint64(abi.ROOT_HVCALL.outPointer, true), length: 4096 });
      const result = new DataView(output.view(0, 4096));
      for (let index = 0; index < reps; index++) {
        const name = given.getUint32(abi.GET_VP_REGISTERS.names + index * 4, true);
        result.setBigUint64(index * 16, this.registers.get(name) ?? 0n, true);
      }
    } else {
      for (let index = 0; index < reps; index++) {
        const at = abi.SET_VP_REGISTERS.elements + index * abi.REGISTER_ASSOC_SIZE;
        this.registers.set(given.getUint32(at, true), given.getBigUint64(at + abi.REGISTER_ASSOC.value, true));
      }
    }
    return 0;
  }

  /** The next run's message: a header at RIP, and what else it says. */
  tells(type: number, access: number, more: (message: DataView) => void = () => undefined): void {
    this.next = (message) => {
      message.setUint32(abi.MESSAGE.type, type, true);
      message.setUint8(abi.INTERCEPT.instructionLength, 2);
      message.setUint8(abi.INTERCEPT.accessType, access);
      message.setBigUint64(abi.INTERCEPT.rip, RIP, true);
      more(message);
    };
  }
}

const { READ, WRITE, EXECUTE } = abi.HV_INTERCEPT_ACCESS;

describe.each([true, false])('a VP whose registers are shared in a page: %s', (shared) => {
  function vcpuOf() {
    const driver = new Driver();
    const pages = driver.map({ length: VP_PAGES_SIZE, shared: false });
    const registerPage = shared ? driver.map({ length: 4096, shared: false }) : undefined;
    if (registerPage !== undefined) driver.page = new DataView(registerPage.view(0, 4096));
    const memory = new GuestMemory([{ address: 0, buffer: new ArrayBuffer(4096) }]);
    const handle = { id: VP, fd: -1, run: pages.handle };
    const vcpu = new MshvVcpu(driver, handle, pages, registerPage, { memory });
    driver.registers.set(R.RAX, 0x1122_3344_5566_7788n);
    driver.registers.set(R.RBX, 0xbbbbn);
    driver.registers.set(R.RIP, RIP);
    return { driver, vcpu };
  }

  const port = (access: number, rax: bigint) => (message: DataView) => {
    message.setUint16(abi.IO_PORT_MESSAGE.port, 0xcfc, true);
    message.setUint8(abi.IO_PORT_MESSAGE.accessInfo, access);
    message.setBigUint64(abi.IO_PORT_MESSAGE.rax, rax, true);
  };

  test.each([
    [1, 0x88],
    [2, 0x7788],
    [4, 0x5566_7788],
  ])('OUT of %d bytes gives the accumulator, and goes on behind it', (size, value) => {
    const { driver, vcpu } = vcpuOf();
    driver.tells(abi.HVMSG.X64_IO_PORT_INTERCEPT, WRITE, port(size, 0x1122_3344_5566_7788n));
    expect(vcpu.run()).toBe(ExitKind.PortWrite);
    expect(vcpu.exit).toMatchObject({ address: 0xcfc, size, count: 1 });
    expect(vcpu.data(0)).toBe(value);
    driver.next = -4;
    expect(vcpu.run()).toBe(ExitKind.Interrupted);
    expect(driver.registers.get(R.RIP)).toBe(RIP + 2n);
    expect(driver.registers.get(R.RAX)).toBe(0x1122_3344_5566_7788n);
  });

  test.each([
    [1, 0x1122_3344_5566_77aan],
    [2, 0x1122_3344_5566_ffaan],
    [4, 0xffff_ffaan],
  ])('IN of %d bytes changes as much of the accumulator as the processor would', (size, rax) => {
    const { driver, vcpu } = vcpuOf();
    driver.tells(abi.HVMSG.X64_IO_PORT_INTERCEPT, READ, port(size, 0x1122_3344_5566_7788n));
    expect(vcpu.run()).toBe(ExitKind.PortRead);
    vcpu.setData(0, 0xffff_ffaa);
    driver.next = -4;
    vcpu.run();
    expect(driver.registers.get(R.RAX)).toBe(rax);
    expect(driver.registers.get(R.RIP)).toBe(RIP + 2n);
    expect(driver.registers.get(R.RBX)).toBe(0xbbbbn);
  });

  test('RIP goes on over a carry into its upper half', () => {
    const { driver, vcpu } = vcpuOf();
    driver.tells(abi.HVMSG.X64_IO_PORT_INTERCEPT, WRITE, (message) => {
      port(1, 0n)(message);
      message.setBigUint64(abi.INTERCEPT.rip, 0x7fff_ffff_fffen, true);
    });
    vcpu.run();
    driver.next = -4;
    vcpu.run();
    expect(driver.registers.get(R.RIP)).toBe(0x8000_0000_0000n);
  });

  test('CPUID gets the default answers', () => {
    const { driver, vcpu } = vcpuOf();
    driver.tells(abi.HVMSG.X64_CPUID_INTERCEPT, EXECUTE, (message) => {
      const { defaultRax, defaultRbx, defaultRcx, defaultRdx } = abi.CPUID_MESSAGE;
      [defaultRax, defaultRbx, defaultRcx, defaultRdx].forEach((at, index) =>
        message.setBigUint64(at, BigInt(index + 1), true),
      );
    });
    expect(vcpu.run()).toBe(ExitKind.Handled);
    driver.next = -4;
    vcpu.run();
    expect([R.RAX, R.RBX, R.RCX, R.RDX, R.RIP].map((name) => driver.registers.get(name))).toEqual([
      ...[1n, 2n, 3n, 4n],
      RIP + 2n,
    ]);
  });

  test('a model-specific register that nobody has reads as zero and is not written', () => {
    const { driver, vcpu } = vcpuOf();
    driver.registers.set(R.RDX, 9n);
    driver.tells(abi.HVMSG.X64_MSR_INTERCEPT, WRITE);
    expect(vcpu.run()).toBe(ExitKind.Handled);
    driver.next = -4;
    vcpu.run();
    expect([R.RDX, R.RIP].map((name) => driver.registers.get(name))).toEqual([9n, RIP + 2n]);
    driver.tells(abi.HVMSG.X64_MSR_INTERCEPT, READ);
    expect(vcpu.run()).toBe(ExitKind.Handled);
    driver.next = -4;
    vcpu.run();
    expect([R.RAX, R.RDX, R.RIP].map((name) => driver.registers.get(name))).toEqual([0n, 0n, RIP + 2n]);
  });

  test.each([
    ['X64_APIC_EOI', ExitKind.InterruptEnd],
    ['X64_HALT', ExitKind.Halt],
    ['UNRECOVERABLE_EXCEPTION', ExitKind.TripleFault],
  ] as const)('%s', (name, kind) => {
    const { driver, vcpu } = vcpuOf();
    driver.tells(abi.HVMSG[name], EXECUTE);
    expect(vcpu.run()).toBe(kind);
    expect(vcpu.intercepts()).toEqual({ [name]: 1 });
  });

  test('a message that cannot be handled ends the machine with its name', () => {
    const { driver, vcpu } = vcpuOf();
    driver.tells(abi.HVMSG.INVALID_VP_REGISTER_VALUE, EXECUTE);
    expect(vcpu.run()).toBe(ExitKind.Failed);
    expect(vcpu.exit.detail).toMatch(/HVMSG_INVALID_VP_REGISTER_VALUE cannot be handled/);
    driver.tells(0x8000_1234, EXECUTE);
    vcpu.run();
    expect(vcpu.exit.detail).toMatch(/message 0x80001234 cannot be handled/);
    driver.tells(abi.HVMSG.UNMAPPED_GPA, EXECUTE, (message) =>
      message.setBigUint64(abi.MEMORY_MESSAGE.guestPhysicalAddress, 0xdead_f000n, true),
    );
    expect(vcpu.run()).toBe(ExitKind.Failed);
    expect(vcpu.exit.detail).toMatch(/runs code at guest address 0xdeadf000/);
    driver.next = -22;
    expect(vcpu.run()).toBe(ExitKind.Failed);
    expect(vcpu.exit.detail).toMatch(/MSHV_RUN_VP failed with errno 22/);
  });
});
