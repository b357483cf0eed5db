/** Memory hotplug in the DSDT: hotplug-controller.ts says how it works. */
import {
  add,
  type Aml,
  ARG0,
  CACHEABLE,
  call,
  device,
  eisaId,
  equal,
  FieldAccess,
  fields,
  ifThen,
  integer,
  LOCAL0,
  locked,
  memoryRegion,
  method,
  mutex,
  name,
  qwordField,
  qwordMemory,
  reference,
  resourceTemplate,
  returnValue,
  store,
  subtract,
} from './aml.js';
import { MEMORY_HOTPLUG_SIZE, MEMORY_SLOTS } from './config.js';
import { controller, numbered, statusFields, statusMethods } from './hotplug-controller.js';

export const MEMORY_SCAN = '\\_SB.MHPC.MSCN';

const CONTROLLER = { path: '\\_SB.MHPC', letter: 'M', lock: 'MLCK', enabled: 'MEN_', eject: 'MEJT' } as const;

/** The controller of memory, and its slots: src/devices/memory-hotplug.ts. */
export function memoryHotplug(registers: number): Aml {
  const slots = Array.from({ length: MEMORY_SLOTS }, (_, slot) => ({ slot, path: numbered('M', slot) }));
  return controller(
    'MHPC',
    'Memory Hotplug Controller',
    registers,
    MEMORY_HOTPLUG_SIZE,
    mutex('MLCK'),
    memoryRegion('MHPR', registers, MEMORY_HOTPLUG_SIZE),
    fields('MHPR', FieldAccess.Dword, ['MSEL', 32]),
    fields('MHPR', FieldAccess.Dword, ['MHBA', 64], ['MHLN', 64], ['MHPX', 32]),
    statusFields(CONTROLLER, 'MHPR', 20),
    ...statusMethods(
      CONTROLLER,
      slots.map(({ path }) => path),
    ),
    memoryRange(),
    method(
      'MPXM',
      1,
      locked('MLCK', store(ARG0, reference('MSEL')), store(reference('MHPX'), LOCAL0)),
      returnValue(LOCAL0),
    ),
    ...slots.map(({ slot, path }) => {
      const from = (query: string, base: string) => method(query, 0, returnValue(call(base, integer(slot))));
      return device(
        path,
        name('_HID', eisaId('PNP0C80')),
        name('_UID', integer(slot)),
        from('_STA', 'MSTA'),
        from('_CRS', 'MCRS'),
        from('_PXM', 'MPXM'),
        method('_EJ0', 1, call('MEJT', integer(slot))),
      );
    }),
  );
}

/** What _CRS of a memory slot returns: a buffer of each call's own, as it is read when the next call may have begun. */
function memoryRange(): Aml {
  /** Places in the descriptor: 6.4.3.5.1. */
  const MINIMUM = 14;
  const MAXIMUM = 22;
  const LENGTH = 38;
  const [range, base, last, length] = ['MR64', 'MINA', 'MAXA', 'LENA'].map(reference);
  return method(
    'MCRS',
    1,
    name('MR64', resourceTemplate(qwordMemory(0, 1, CACHEABLE))),
    qwordField(range, MINIMUM, 'MINA'),
    qwordField(range, MAXIMUM, 'MAXA'),
    qwordField(range, LENGTH, 'LENA'),
    locked('MLCK', store(ARG0, reference('MSEL')), store(reference('MHBA'), base), store(reference('MHLN'), length)),
    // A range of nothing cannot be where it is (6.4.3.5, table 6.48): an empty slot has none.
    ifThen(equal(length, integer(0)), returnValue(resourceTemplate())),
    subtract(add(base, length), integer(1), last),
    returnValue(range),
  );
}
