/** CPU hotplug in the DSDT: hotplug-controller.ts says how it works. */
import {
  type Aml,
  buffer,
  call,
  device,
  eisaId,
  FieldAccess,
  fields,
  integer,
  memoryRegion,
  method,
  mutex,
  name,
  returnValue,
  string,
} from './aml.js';
import { CPU_HOTPLUG_SIZE } from './config.js';
import { processor, processorName } from './devices.js';
import { controller, statusFields, statusMethods } from './hotplug-controller.js';

export const CPU_SCAN = '\\_SB.CPUS.CSCN';

const CONTROLLER = { path: '\\_SB.PRES', letter: 'C', lock: 'CPLK', enabled: 'CPEN', eject: 'CEJ0' } as const;

/**
 * The controller of all processors (src/devices/cpu-hotplug.ts), and they themselves.
 *
 * @param more terms of each processor beyond these
 * @param interruptControllers the MADT's entry for each possible processor as if it were there, by number: _MAT, 6.2.10
 */
export function cpuHotplug(
  registers: number,
  interruptControllers: readonly Aml[],
  more: (id: number) => readonly Aml[],
): Aml {
  return (
    controller(
      'PRES',
      'CPU Hotplug Controller',
      registers,
      CPU_HOTPLUG_SIZE,
      mutex('CPLK'),
      memoryRegion('PRST', registers, CPU_HOTPLUG_SIZE),
      fields('PRST', FieldAccess.Dword, ['CSEL', 32]),
      statusFields(CONTROLLER, 'PRST', 4),
    ) +
    device(
      'CPUS',
      name('_HID', string('ACPI0010')),
      name('_CID', eisaId('PNP0A05')),
      ...statusMethods(
        CONTROLLER,
        interruptControllers.map((_, id) => processorName(id)),
      ),
      ...interruptControllers.map((entry, id) =>
        processor(
          id,
          ...more(id),
          method('_STA', 0, returnValue(call('CSTA', integer(id)))),
          // Linux takes a new processor's APIC id from here.
          name('_MAT', buffer(entry)),
          method('_EJ0', 1, call('CEJ0', integer(id))),
        ),
      ),
    )
  );
}
