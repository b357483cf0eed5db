/**
 * A machine as it was saved in a lab: Linux 6.1 on an emulated Arm processor with SVE, test/e2e/arm-saved-guest.ts in it. All later
 * versions have to load it. Values are little-endian, without the zeros at their ends.
 */
import fs from 'node:fs';
import { expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/kvm/aarch64/abi.js';
import { openKvmArm64 } from '../../../src/hypervisor/kvm/aarch64/kvm.js';
import type { Arm64Register } from '../../../src/hypervisor/saved-state.js';
import { ArmStateKernel, attributeKey } from '../../support/arm-state-kernel.js';

type Values = Readonly<Record<string, string>>;
interface Golden {
  readonly vcpus: readonly {
    readonly registers: Values;
    readonly poweredOff: boolean;
    readonly serror: { readonly pending: boolean };
  }[];
  readonly vm: {
    readonly counter: string;
    readonly counterFrequency: number;
    readonly gic: Readonly<Record<string, Values>>;
  };
}

const GIC = { distributor: 0x0800_0000, its: 0x0808_0000, redistributors: 0x080a_0000, spis: 96 };
/** What no guest and no monitor sets: lengths of vectors, identification of processor and caches. */
const INVARIANT = /^0x60(60000000015ffff|30000000(13c0[0-3]|13c[89]0|13d801|1100)|20000000110)/;

const golden = JSON.parse(fs.readFileSync('test/unit/hypervisor/golden/arm64-kvm.json', 'utf8')) as Golden;

function bytes(hex: string, size: number): Uint8Array {
  const all = new Uint8Array(size);
  all.set(Buffer.from(hex, 'hex'));
  return all;
}
const records = (values: Values, size: (id: bigint) => number): Arm64Register[] =>
  Object.entries(values).map(([id, hex]) => ({ id: BigInt(id), value: bytes(hex, size(BigInt(id))) }));
const registerSize = (id: bigint) => 1 << Number((id >> 52n) & 0xfn);

test('the golden machine is loaded, and saved again it is the same', () => {
  const host = new ArmStateKernel((vcpu) =>
    Object.entries(golden.vcpus[vcpu].registers).map(([name, hex]) => {
      const size = registerSize(BigInt(name));
      const invariant = INVARIANT.test(name);
      return [BigInt(name), { value: invariant ? bytes(hex, size) : new Uint8Array(size), invariant }];
    }),
  );
  const vm = openKvmArm64(host.kernel).createVm({ ipaBits: 40, gic: GIC });
  const vcpus = golden.vcpus.map((_, id) => vm.createVcpu(id, id > 0));
  vm.finishVcpus();
  const { gic, counterFrequency } = golden.vm;
  const put = (group: number, part: string, id: string, size: number) =>
    host.gic.set(attributeKey(group, BigInt(id)), bytes(gic[part][id], size));
  put(abi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 'distributor', '0x4', 4);
  for (const id of ['0x8', '0xc', '0x100000008', '0x10000000c']) {
    put(abi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, 'redistributors', id, 4);
  }
  put(abi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 'its', '0x8', 8);
  // Its processor has one register of active priorities for each group of interrupts.
  for (const id of [0xc645n, 0xc646n, 0xc647n, 0xc649n, 0xc64an, 0xc64bn]) {
    for (const processor of [0n, 1n << 32n]) {
      host.absent.add(attributeKey(abi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, processor | id));
    }
  }

  const sizes: Readonly<Record<string, number>> = { processorInterfaces: 8, its: 8, itsControl: 8 };
  const saved = {
    vcpus: golden.vcpus.map(({ registers, poweredOff, serror }) => ({
      registers: records(registers, registerSize),
      poweredOff,
      serror: { ...serror, syndrome: undefined },
    })),
    vm: {
      counter: BigInt(golden.vm.counter),
      counterFrequency,
      gic: Object.fromEntries(
        Object.entries(gic).map(([part, values]) => [part, records(values, () => sizes[part] ?? 4)]),
      ),
    },
  };
  vcpus.forEach((vcpu, id) => vcpu.load(saved.vcpus[id]));
  vm.load(saved.vm);
  expect(vcpus.map((vcpu) => vcpu.save())).toEqual(saved.vcpus);
  expect({ ...vm.save(), counterFrequency }).toEqual(saved.vm);
});
