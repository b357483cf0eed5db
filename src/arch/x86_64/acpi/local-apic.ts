/** The MADT's entry of a processor (ACPI 6.5, 5.2.12.2), which is also what a processor's _MAT gives. */
export const LocalApicFlags = { Enabled: 1, OnlineCapable: 2 } as const;
type LocalApicFlags = (typeof LocalApicFlags)[keyof typeof LocalApicFlags];

export function localApic(id: number, apicId: number, flags: LocalApicFlags): number[] {
  return [0, 8, id, apicId, flags, 0, 0, 0];
}
