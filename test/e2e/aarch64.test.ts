/** The scenarios on KVM of aarch64, whose machine is told to the kernel by a devicetree or by ACPI. */
import { ARM } from '../support/backend.js';
import { bareGuest } from './arm-bare-guest.js';
import { savedGuest } from './arm-saved-guest.js';
import { PLAIN, scenarios } from './scenarios.js';

// ACPI has no clock: docs/user-guide.md.
const host = scenarios(ARM, [PLAIN, { name: ', by ACPI', cmdline: 'acpi=force', flavours: ['cloud'], clock: false }]);
bareGuest(host);
savedGuest(host);
