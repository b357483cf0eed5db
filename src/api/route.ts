/** One call of the API, as the server serves it and as the OpenAPI document says it. */
import type { RequestError } from '../vmm/machine/machine-error.js';
import type { WireName } from './wire.js';

/** The status of each kind of refusal. */
export const STATUS = { invalid: 400, unknown: 404, conflict: 409, busy: 429, failed: 500 } as const satisfies Record<
  RequestError['kind'],
  number
>;

export interface Route {
  readonly method: 'GET' | 'PUT';
  /** For the document. */
  readonly summary: string;
  /** What it takes; undefined: nothing. */
  readonly body?: WireName;
  /** What it answers with 200. */
  readonly answer?: WireName;
  /** When it answers with 204; undefined: never. */
  readonly quiet?: string;
  /** What it may refuse beside mistakes and what failed. */
  readonly refuses: readonly Exclude<RequestError['kind'], 'invalid' | 'failed'>[];
  /** Whether it takes descriptors; others refuse them. */
  readonly takesDescriptors?: boolean;
  /**
   * @param descriptors that came with the request; the machine's once the call has succeeded
   * @returns the answer's body; undefined: none
   * @throws RequestError, or what failed
   */
  call(body: unknown, descriptors: readonly number[]): unknown;
}
