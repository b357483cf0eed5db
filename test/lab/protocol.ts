/**
 * The frames between the host and the agent in a lab: length of what follows, type, id of the command, payload. One port
 * carries many commands at once.
 */

export const Frame = {
  /** Host: forget everything, kill what runs. Agent: done, ready. */
  Hello: 0,
  /** Host: a {@link SpawnRequest}. Agent: the process id. */
  Spawn: 1,
  /** Host: standard input. Agent: standard output. */
  Data: 2,
  /** Agent: standard error. */
  ErrorData: 3,
  /** Host: end of standard input. */
  End: 4,
  /** Host: a signal's name. */
  Signal: 5,
  /** Agent: an {@link ExitReport}. */
  Exit: 6,
  /** Both ways. */
  Ping: 7,
} as const;
export type Frame = (typeof Frame)[keyof typeof Frame];

export interface SpawnRequest {
  readonly argv: readonly string[];
  readonly cwd: string;
  readonly env: Readonly<Record<string, string>>;
}

export interface ExitReport {
  readonly status: number | null;
  readonly signal: string | null;
  /** The command could not be started. */
  readonly error?: string;
}

const HEADER = 9;

export function encodeFrame(type: Frame, id: number, payload: Uint8Array | string = ''): Buffer {
  const body = Buffer.from(payload as string);
  const header = Buffer.alloc(HEADER);
  header.writeUInt32LE(body.length + 5, 0);
  header[4] = type;
  header.writeUInt32LE(id, 5);
  return Buffer.concat([header, body]);
}

/** Puts frames together from whatever pieces they arrive in. */
export class FrameReader {
  #waiting: Buffer = Buffer.alloc(0);

  constructor(private readonly onFrame: (type: Frame, id: number, payload: Buffer) => void) {}

  /** The other end is gone: the rest of its last frame will not come. */
  reset(): void {
    this.#waiting = Buffer.alloc(0);
  }

  push(bytes: Buffer): void {
    this.#waiting = this.#waiting.length === 0 ? bytes : Buffer.concat([this.#waiting, bytes]);
    while (this.#waiting.length >= HEADER) {
      const end = 4 + this.#waiting.readUInt32LE(0);
      if (this.#waiting.length < end) return;
      const frame = this.#waiting.subarray(0, end);
      this.#waiting = this.#waiting.subarray(end);
      this.onFrame(frame[4] as Frame, frame.readUInt32LE(5), frame.subarray(HEADER));
    }
  }
}
