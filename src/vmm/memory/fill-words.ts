/** What main and the thread that reads a machine's memory as it is touched have in common. */
import type { MissingStretch } from './page-server.js';

/** What the thread is started with. The descriptors are its own, and closed when it ends. */
export interface FillData {
  readonly words: SharedArrayBuffer;
  /** Of `openFaults`. */
  readonly faults: number;
  readonly stretches: readonly MissingStretch[];
}

export const FillWord = {
  /** 1: the thread is to end. */
  ends: 0,
  /** A `FillPhase`. */
  phase: 1,
  /** 1: its descriptors are closed. */
  closed: 2,
  words: 3,
} as const;

/** Nothing of the machine runs yet: what is missing may read as zeros; it does, and must not; not all can be had any more. */
export const FillPhase = { stands: 0, runs: 1, failed: 2 } as const;

export type FillMessage =
  | { readonly kind: 'ready' | 'filled' }
  | { readonly kind: 'progress'; readonly done: string; readonly total: string }
  | { readonly kind: 'failed'; readonly reason: string };
