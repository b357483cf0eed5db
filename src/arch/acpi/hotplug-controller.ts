/**
 * What the DSDT has for hotplug: for each controller a device with its registers and a method that looks what came and what
 * shall go, and for each thing that can come and go a device with _EJ0 (ACPI 6.5, 6.3). Names and registers are Cloud Hypervisor's.
 *
 * The generic event device calls the methods; they notify the devices concerned: 5.6.6. A controller's mutex keeps what selects
 * a register's meaning together with the access to it.
 */
import {
  type Aml,
  ARG0,
  ARG1,
  call,
  device,
  eisaId,
  equal,
  FieldAccess,
  fields,
  GAP,
  ifThen,
  increment,
  integer,
  lessThan,
  LOCAL0,
  locked,
  method,
  name,
  notify,
  qwordMemory,
  reference,
  resourceTemplate,
  returnValue,
  store,
  string,
  whileTrue,
} from './aml.js';

/** Slots are numbered in decimal, processors and bridges in hexadecimal. */
export function numbered(letter: string, slot: number): string {
  return letter + slot.toString().padStart(3, '0');
}

export const DEVICE_CHECK = integer(1);
export const EJECT_REQUEST = integer(3);

/** A device of no class that has registers of its own. */
export function controller(path: string, uid: string, registers: number, size: number, ...terms: Aml[]): Aml {
  /** Present, working and using its registers, but nothing that a user cares for: 6.3.7. */
  const STATUS = 0x0b;
  return device(
    path,
    name('_HID', eisaId('PNP0A06')),
    name('_STA', integer(STATUS)),
    name('_UID', string(uid)),
    name('_CRS', resourceTemplate(qwordMemory(registers, registers + size))),
    ...terms,
  );
}

/** A controller with a status byte: src/devices/hotplug-status.ts. Its names begin with a letter. */
export interface StatusController {
  readonly path: string;
  readonly letter: string;
  readonly lock: string;
  /** Name of the status's lowest bit. */
  readonly enabled: string;
  /** Name of the method that lets one go. */
  readonly eject: string;
}

/** Fields of the status byte, which is the `byte`th of a region. */
export function statusFields({ letter, enabled }: StatusController, region: string, byte: number): Aml {
  const bits = [enabled, `${letter}INS`, `${letter}RMV`, `${letter}EJ0`].map((field): [string, number] => [field, 1]);
  return fields(region, FieldAccess.Byte, [GAP, 8 * byte], ...bits);
}

/**
 * Methods over such a controller: xSTA and the one that lets go are about one thing, xSCN looks at all of them, and xTFY tells one.
 *
 * @param paths of the devices, by number
 */
export function statusMethods(controller: StatusController, paths: readonly string[]): Aml[] {
  const { letter, eject } = controller;
  const lock = `${controller.path}.${controller.lock}`;
  const register = (field: string) => reference(`${controller.path}.${field}`);
  const select = (index: Aml) => store(index, register(`${letter}SEL`));
  const tell = (bit: Aml, event: Aml) =>
    // Acknowledged first: what comes again from here on is told again.
    ifThen(bit, store(integer(1), bit), call(`${letter}TFY`, LOCAL0, event));
  return [
    // What _STA returns: all there is to say of what is there, or nothing (6.3.7).
    method(
      `${letter}STA`,
      1,
      locked(lock, select(ARG0), store(register(controller.enabled), LOCAL0)),
      ifThen(LOCAL0, returnValue(integer(0xf))),
      returnValue(integer(0)),
    ),
    method(eject, 1, locked(lock, select(ARG0), store(integer(1), register(`${letter}EJ0`)))),
    method(`${letter}TFY`, 2, ...paths.map((path, index) => ifThen(equal(ARG0, integer(index)), notify(path, ARG1)))),
    method(
      `${letter}SCN`,
      0,
      store(integer(0), LOCAL0),
      locked(
        lock,
        whileTrue(
          lessThan(LOCAL0, integer(paths.length)),
          select(LOCAL0),
          tell(register(`${letter}INS`), DEVICE_CHECK),
          tell(register(`${letter}RMV`), EJECT_REQUEST),
          increment(LOCAL0),
        ),
      ),
    ),
  ];
}
