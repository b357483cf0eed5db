/**
 * The code at the processor's reset vector as real mode reaches it, 0xffff0: it resets the machine.
 *
 * A PC has its firmware there, and kernels still jump to it as their last way to restart. Linux on hardware-reduced ACPI
 * takes no other: it expects EFI to restart such a machine, and without EFI goes on to the BIOS (arch/x86/kernel/reboot.c).
 */
import { PORT_I8042 } from './layout.js';

/** mov al, 0xfe; out 0x64, al; again: hlt; jmp again */
export const RESET_CODE = Uint8Array.of(0xb0, 0xfe, 0xe6, PORT_I8042 + 4, 0xf4, 0xeb, 0xfd);
