/** Requests to a `vmm` over its API's socket. */
import http from 'node:http';

/** The process refused what it was asked, or failed at it. */
export class ApiError extends Error {
  override readonly name = 'ApiError';

  /**
   * @param status of HTTP: 400 a mistake, 404 what is not there, 409 taken, 429 perhaps later, 500 failed
   * @param causes in words, from the outermost to the cause
   */
  constructor(
    readonly status: number,
    readonly causes: readonly string[],
  ) {
    super(causes.join(': '));
  }
}

/** Nobody answers: there is no such process, or it has ended meanwhile. */
export class ConnectionError extends Error {
  override readonly name = 'ConnectionError';
}

export interface CallOptions {
  /** Gives up waiting for the answer; what was asked may be done all the same. */
  readonly signal?: AbortSignal | undefined;
}

const OK = 200;
const NO_CONTENT = 204;

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw new ConnectionError(`The answer is no JSON: ${text.slice(0, 160)}`);
  }
}

/**
 * One request on a connection of its own.
 *
 * @param name of the call, such as `vm.info`
 * @returns the answer's body; undefined: none
 * @throws ApiError, ConnectionError, or the signal's reason
 */
export async function request(
  socketPath: string,
  method: 'GET' | 'PUT',
  name: string,
  body?: unknown,
  { signal }: CallOptions = {},
): Promise<unknown> {
  signal?.throwIfAborted();
  const answer = new Promise<{ status: number; text: string }>((resolve, reject) => {
    const fail = (error: Error) => {
      reject(new ConnectionError(`No vmm answers at ${socketPath}: ${error.message}`, { cause: error }));
    };
    const call = http.request({ socketPath, method, path: `/api/v1/${name}`, agent: false, signal }, (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (part) => (text += String(part)));
      response.on('end', () => resolve({ status: response.statusCode ?? 0, text }));
      response.on('error', fail);
    });
    call.on('error', fail);
    call.end(body === undefined ? undefined : JSON.stringify(body));
  });
  const { status, text } = await answer.catch((error: unknown) => {
    signal?.throwIfAborted();
    throw error;
  });
  return bodyOf(status, text);
}

/** @throws ApiError for a refusal */
export function bodyOf(status: number, text: string): unknown {
  if (status === OK) return parse(text);
  if (status === NO_CONTENT) return undefined;
  const causes = parse(text);
  throw new ApiError(status, Array.isArray(causes) ? causes.map(String) : [text]);
}
