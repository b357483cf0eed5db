/**
 * Records come from files and from other hosts: what is looked at before a hypervisor is told, since neither it nor its driver does,
 * or since a number too large would spill into its neighbours.
 */
import { HypervisorError } from './hypervisor.js';
import type { X86VcpuState } from './saved-state.js';
import type { X86Segment, X86SpecialRegisters } from './x86-state.js';

const LOCAL_APIC_SIZE = 0x400;
/** Intel SDM volume 1, 13.4: the legacy region and the header, which are always there. */
const XSAVE_MIN = 576;
const XSAVE_MAX = 0x1_0000;
const MAX_MSRS = 1024;

const SEGMENTS = ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'] as const;
const TABLES = ['gdt', 'idt'] as const;
const CONTROLS = ['cr0', 'cr2', 'cr3', 'cr4', 'cr8', 'efer', 'apicBase'] as const;
/** Largest values of a segment's parts. */
const SEGMENT_LIMITS: Readonly<Record<Exclude<keyof X86Segment, 'base'>, number>> = {
  ...{ limit: 0xffff_ffff, selector: 0xffff, type: 15, dpl: 3 },
  ...{ present: 1, db: 1, s: 1, l: 1, g: 1, avl: 1, unusable: 1 },
};

/** @throws HypervisorError naming the first part that cannot be */
export function checkX86VcpuState(state: X86VcpuState): void {
  for (const [name, value] of Object.entries(state.registers)) checkWord(name, value as bigint);
  checkSpecial(state.special);
  const { debug, xcr0, tsc, ssp = 0n, msrs, xsave, localApic } = state;
  for (const [name, value] of Object.entries({ xcr0, tsc, ssp, dr6: debug.dr6, dr7: debug.dr7 }))
    checkWord(name, value);
  for (const address of debug.addresses) checkWord('debug', address);
  checkLength('debug', debug.addresses, 4, 4);
  checkLength('msrs', msrs, 0, MAX_MSRS);
  for (const { index, value } of msrs) {
    checkNumber('msrs', index, 0xffff_ffff);
    checkWord('msrs', value);
  }
  checkLength('xsave', xsave, XSAVE_MIN, XSAVE_MAX);
  checkLength('localApic', localApic, LOCAL_APIC_SIZE, LOCAL_APIC_SIZE);
}

function checkSpecial(special: X86SpecialRegisters): void {
  for (const name of CONTROLS) checkWord(name, special[name]);
  for (const name of TABLES) {
    checkWord(name, special[name].base);
    checkNumber(name, special[name].limit, 0xffff);
  }
  for (const name of SEGMENTS) {
    checkWord(name, special[name].base);
    for (const [part, largest] of Object.entries(SEGMENT_LIMITS)) {
      checkNumber(name, special[name][part as keyof typeof SEGMENT_LIMITS], largest);
    }
  }
}

function checkWord(name: string, value: bigint): void {
  if (value !== BigInt.asUintN(64, value)) refuse(name);
}

function checkNumber(name: string, value: number, largest: number): void {
  if (!Number.isInteger(value) || value < 0 || value > largest) refuse(name);
}

function checkLength(name: string, list: { readonly length: number }, least: number, most: number): void {
  if (list.length < least || list.length > most) refuse(name);
}

function refuse(name: string): never {
  throw new HypervisorError(`A processor's record has an impossible ${name}`);
}
