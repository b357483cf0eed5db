/** The parts of a virtual processor's state that move as a whole (linux/mshv.h, include/hyperv/hvhdk.h). */
/** struct mshv_get_set_vp_state. Buffer and size are page-aligned. */
export const VP_STATE = { type: 0, bufferSize: 4, buffer: 8 } as const;
export const VP_STATE_SIZE = 16;
export const MSHV_VP_STATE = { LAPIC: 0, XSAVE: 1, SIMP: 2, SIEFP: 3, SYNTHETIC_TIMERS: 4 } as const;

/** struct hv_local_interrupt_controller_state. */
export const LAPIC_STATE = {
  apic_id: 0,
  apic_version: 4,
  apic_ldr: 8,
  apic_dfr: 12,
  apic_spurious: 16,
  apic_isr: 20,
  apic_tmr: 52,
  apic_irr: 84,
  apic_esr: 116,
  apic_icr_high: 120,
  apic_icr_low: 124,
  apic_lvt_timer: 128,
  apic_lvt_thermal: 132,
  apic_lvt_perfmon: 136,
  apic_lvt_lint0: 140,
  apic_lvt_lint1: 144,
  apic_lvt_error: 148,
  apic_lvt_cmci: 152,
  apic_error_status: 156,
  apic_initial_count: 160,
  apic_counter_value: 164,
  apic_divide_configuration: 168,
  apic_remote_read: 172,
} as const;
export const LAPIC_STATE_SIZE = 176;

/** struct hv_synthetic_timers_state. */
export const SYNTHETIC_TIMERS_STATE_SIZE = 200;
