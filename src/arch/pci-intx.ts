/**
 * How interrupt pin A of the PCI functions is wired, as the tables tell it: slots and segments go round a few lines of the
 * interrupt controller, which they share (PCI Local Bus 3.0, 2.2.6). Functions use no other pin.
 */
export const INTX_LINES = 4;

/** @returns the number of the line, from 0 on */
export function intxLine(segment: number, slot: number): number {
  return (segment + slot) % INTX_LINES;
}
