/**
 * The registers of KVM's GICv3 and ITS that are kept, in the order in which they are to be set. Offsets and names are those of Arm
 * IHI 0069, section 12; what KVM makes of them is in Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic-its.rst.
 *
 * Left out are the registers of which KVM keeps nothing (GICD_STATUSR, GICR_WAKER) and the other face of those that are here.
 */
import * as abi from './abi.js';

const FIRST_SPI = 32;
/** The second frame of a redistributor. */
const SGI_FRAME = 0x1_0000;
const GITS_BASERS = 8;
const ICC_APRS = 4;

export interface GicRegister {
  /** Within its group, as struct kvm_device_attr has it. */
  readonly id: bigint;
  readonly name: string;
  /** Says what the host or the machine is: never set, only compared. */
  readonly fixed?: boolean;
  /** A host may lack it. */
  readonly optional?: boolean;
  /** Where ones clear what ones set here, so that what is saved can be put in place of what is there. */
  readonly clearedAt?: bigint;
}

/** Groups of attributes, as the records name them. */
export interface GicGroup {
  readonly group: number;
  /** Bytes of each register's value. */
  readonly size: number;
  readonly registers: readonly GicRegister[];
}

/** A register of some bits for each interrupt: words that follow each other. */
function row(name: string, base: number, first: number, end: number, bits: number): GicRegister[] {
  const words = ((end - first) * bits) / 32;
  const start = base + (first * bits) / 8;
  return Array.from({ length: words }, (_, index) => ({ id: BigInt(start + index * 4), name }));
}

/** ISENABLER: KVM's SGIs are enabled from the start. */
function enables(name: string, base: number, first: number, end: number): GicRegister[] {
  return row(name, base, first, end, 1).map((register) => ({ ...register, clearedAt: register.id + 0x80n }));
}

/** @param mpidr affinity of a processor @returns its registers' part of their ids */
function ofProcessor(mpidr: number): bigint {
  const affinity = BigInt(mpidr);
  // Aff3 stands apart in MPIDR_EL1, and beside the others in an attribute.
  return (((affinity >> 32n) << 24n) | (affinity & 0xff_ffffn)) << 32n;
}

/** Identity first, then the enable: KVM forwards nothing that is made pending while the distributor is off. */
export function distributor(spis: number): GicGroup {
  const end = FIRST_SPI + spis;
  const bits = (name: string, base: number, count = 1) => row(name, base, FIRST_SPI, end, count);
  // Words of which the second is always 0, as Aff3 is (GICD_IROUTER).
  const routes = row('GICD_IROUTER', 0x6000, FIRST_SPI, end, 64).filter(({ id }) => (id & 4n) === 0n);
  const registers: GicRegister[] = [
    { id: 0x04n, name: 'GICD_TYPER', fixed: true },
    { id: 0x0cn, name: 'GICD_TYPER2', fixed: true, optional: true },
    { id: 0x08n, name: 'GICD_IIDR' },
    { id: 0x00n, name: 'GICD_CTLR' },
    ...bits('GICD_IGROUPR', 0x80),
    ...bits('GICD_IPRIORITYR', 0x400, 8),
    ...routes,
    ...bits('GICD_ICFGR', 0xc00, 2),
    ...enables('GICD_ISENABLER', 0x100, FIRST_SPI, end),
    ...bits('GICD_ISPENDR', 0x200),
    ...bits('GICD_ISACTIVER', 0x300),
  ];
  return { group: abi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, size: 4, registers };
}

/** Where the tables of LPIs lie can be set only as long as LPIs are not enabled, so GICR_CTLR comes behind. */
export function redistributors(processors: readonly number[]): GicGroup {
  const bits = (name: string, base: number, count = 1) => row(name, SGI_FRAME + base, 0, FIRST_SPI, count);
  const one: readonly GicRegister[] = [
    { id: 0x08n, name: 'GICR_TYPER', fixed: true },
    { id: 0x0cn, name: 'GICR_TYPER', fixed: true },
    { id: 0x70n, name: 'GICR_PROPBASER' },
    { id: 0x74n, name: 'GICR_PROPBASER' },
    { id: 0x78n, name: 'GICR_PENDBASER' },
    { id: 0x7cn, name: 'GICR_PENDBASER' },
    { id: 0x00n, name: 'GICR_CTLR' },
    ...bits('GICR_IGROUPR0', 0x80),
    ...bits('GICR_IPRIORITYR', 0x400, 8),
    ...bits('GICR_ICFGR', 0xc00, 2),
    ...enables('GICR_ISENABLER0', SGI_FRAME + 0x100, 0, FIRST_SPI),
    ...bits('GICR_ISPENDR0', 0x200),
    ...bits('GICR_ISACTIVER0', 0x300),
  ];
  return { group: abi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, size: 4, registers: ofAll(processors, one) };
}

/** Lines of SPIs that devices hold. Those of PPIs are KVM's own: it finds them anew from timers and PMU. */
export function lines(spis: number): GicGroup {
  const registers = Array.from({ length: spis / 32 }, (_, index) => ({
    id: BigInt(FIRST_SPI + index * 32),
    name: 'the levels of SPIs',
  }));
  return { group: abi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, size: 4, registers };
}

/** ICC_CTLR_EL1 has how many bits of priority there are, by which KVM has the registers of active priorities. */
export function processorInterfaces(processors: readonly number[]): GicGroup {
  const register = (name: string, crn: number, crm: number, op2: number, optional = false) => ({
    id: BigInt((3 << 14) | (crn << 7) | (crm << 3) | op2),
    name,
    optional,
  });
  const active = (group: number, crm: number, firstOp2: number) =>
    Array.from({ length: ICC_APRS }, (_, n) => register(`ICC_AP${group}R${n}_EL1`, 12, crm, firstOp2 + n, n > 0));
  const one = [
    register('ICC_SRE_EL1', 12, 12, 5),
    register('ICC_CTLR_EL1', 12, 12, 4),
    register('ICC_PMR_EL1', 4, 6, 0),
    register('ICC_BPR0_EL1', 12, 8, 3),
    register('ICC_BPR1_EL1', 12, 12, 3),
    ...active(0, 8, 4),
    ...active(1, 9, 0),
    register('ICC_IGRPEN0_EL1', 12, 12, 6),
    register('ICC_IGRPEN1_EL1', 12, 12, 7),
  ];
  return { group: abi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, size: 8, registers: ofAll(processors, one) };
}

/** GITS_CBASER sets GITS_CREADR to 0, and comes first. The IIDR says of which form the tables in memory are. */
export function its(): GicGroup {
  const registers = [
    { id: 0x08n, name: 'GITS_TYPER', fixed: true },
    { id: 0x80n, name: 'GITS_CBASER' },
    { id: 0x90n, name: 'GITS_CREADR' },
    { id: 0x88n, name: 'GITS_CWRITER' },
    ...Array.from({ length: GITS_BASERS }, (_, n) => ({ id: BigInt(0x100 + n * 8), name: `GITS_BASER${n}` })),
    { id: 0x04n, name: 'GITS_IIDR' },
  ];
  return { group: abi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, size: 8, registers };
}

/** It enables the ITS, which therefore has its tables by then. */
export function itsControl(): GicGroup {
  return { ...its(), registers: [{ id: 0n, name: 'GITS_CTLR' }] };
}

function ofAll(processors: readonly number[], one: readonly GicRegister[]): GicRegister[] {
  return processors.flatMap((mpidr) =>
    one.map((register) => {
      const clearedAt = register.clearedAt === undefined ? {} : { clearedAt: ofProcessor(mpidr) | register.clearedAt };
      const name = `${register.name} of processor ${mpidr}`;
      return { ...register, ...clearedAt, id: ofProcessor(mpidr) | register.id, name };
    }),
  );
}
