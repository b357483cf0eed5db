/** Time on the Microsoft hypervisor: it stands still until the vCPUs run, and is the same on all of them. */
import fs from 'node:fs';
import { expect, test } from '@jest/globals';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import type { X86Vcpu } from '../../../src/hypervisor/hypervisor.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { openMshv } from '../../../src/hypervisor/mshv/mshv.js';
import { MshvVcpu } from '../../../src/hypervisor/mshv/vcpu.js';
import { X86Board } from '../../../src/vmm/boards/x86-board.js';
import { SimulatedMshvKernel } from '../../support/mshv/simulated-kernel.js';

const { TSC, MSR_IA32_MISC_ENABLE } = abi.HV_X64_REGISTER;

function register(vcpu: X86Vcpu, name: number): bigint {
  if (!(vcpu instanceof MshvVcpu)) throw new TypeError('another backend');
  const { hypercalls, handle } = vcpu;
  return hypercalls.getRegisters(handle.id, [name]).getBigUint64(0, true);
}

(fs.existsSync('/dev/kvm') ? test : test.skip)('all vCPUs have one time, which begins when they are let go', () => {
  const hypervisor = openMshv(new SimulatedMshvKernel());
  const vm = hypervisor.createVm();
  const fresh = vm.createVcpu(0);
  const miscEnable = register(fresh, MSR_IA32_MISC_ENABLE);
  fresh.close();
  vm.close();

  const config = vmConfigSchema.parse({ payload: { kernel: 'k' }, cpus: { boot_vcpus: 3, max_vcpus: 3 } });
  const board = new X86Board(hypervisor, config);
  const vcpus = board.createVcpus();
  const times = () => vcpus.map((vcpu) => register(vcpu, TSC));
  const still = times();
  expect(new Set(still).size).toBe(1);
  expect(times()).toEqual(still);
  board.vm.startTime();
  for (let round = 0; round < 10; round++) {
    const read = [...times(), ...times()];
    // Each was read after the one before it.
    expect(read).toEqual([...read].sort((a, b) => Number(a - b)));
    expect(read[0]).toBeGreaterThan(still[0]);
  }
  // They are set ahead by the same.
  board.vm.stopTime();
  const stood = times();
  expect(new Set(stood).size).toBe(1);
  const { clock } = board.vm.save();
  const passed = 3600_000_000_000n;
  board.vm.startTime(passed);
  board.vm.stopTime();
  const ahead = times();
  expect(new Set(ahead).size).toBe(1);
  const { tscKhz } = vcpus[0].save();
  const [ticks, reference] = [ahead[0] - stood[0], board.vm.save().clock - clock];
  expect(reference).toBeGreaterThanOrEqual(passed);
  expect(reference).toBeLessThan(passed + 60_000_000_000n);
  // Both have gone on for the same moment since.
  expect(Number(ticks) / tscKhz!).toBeCloseTo(Number(reference) / 1e6, -4);
  board.vm.startTime();
  // The hypervisor's own.
  expect(vcpus.map((vcpu) => register(vcpu, MSR_IA32_MISC_ENABLE))).toEqual([miscEnable, miscEnable, miscEnable]);
  for (const vcpu of vcpus) vcpu.close();
  board.vm.close();
  hypervisor.close();
});
