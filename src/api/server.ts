/**
 * The REST API: HTTP/1.1 on a Unix socket, under /api/v1, with Cloud Hypervisor's paths, bodies and answers. 200 with a JSON body,
 * 204 without one; an error is a JSON array of strings, from the outermost to the cause.
 */
import http from 'node:http';
import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { HostKernel } from '../sys/host-kernel.js';
import { adoptSocket, bindSocket } from '../vmm/host/unix-socket.js';
import type { Logger } from '../vmm/log/logger.js';
import { causeMessages, RequestError } from '../vmm/machine/machine-error.js';
import { parseBody, refusal, shorten } from './bodies.js';
import { Connection } from './connection.js';
import type { Descriptors } from './descriptors.js';
import { STATUS } from './route.js';
import { type ApiVmm, routes } from './routes.js';

const BASE = '/api/v1/';
/** Calls that have another path as well. */
const ELSEWHERE: Readonly<Record<string, string | undefined>> = { '/openapi.json': 'openapi.json' };
const MAX_BODY_BYTES = 4 * 1024 * 1024;
/** At a time; further ones are closed. Each may hold a body. */
const MAX_CONNECTIONS = 32;
/** Answers that are under way at the end. */
const CLOSE_MILLISECONDS = 2000;

export interface Api {
  /** Refuses further requests and removes the socket; answers that are under way get some time. */
  close(): Promise<void>;
}

export interface ApiOptions {
  /** Of the product. */
  readonly version: string;
  readonly logger: Logger;
  /** How long a client may take for a whole request, and for the next step of taking its answer. */
  readonly patienceMilliseconds?: number;
}

/** What is sent to the client. */
interface Answer {
  readonly status: number;
  /** JSON, or nothing. */
  readonly text: string;
}

function answerTo(error: unknown): Answer {
  const status = error instanceof RequestError ? STATUS[error.kind] : 500;
  return { status, text: JSON.stringify(causeMessages(error)) };
}

async function readBody(request: http.IncomingMessage): Promise<unknown> {
  const chunks: Buffer[] = [];
  let length = 0;
  for await (const chunk of request as AsyncIterable<Buffer>) {
    length += chunk.length;
    // Read to its end, so that the answer finds its way; a client that never ends meets the server's time limit.
    if (length <= MAX_BODY_BYTES) chunks.push(chunk);
  }
  if (length > MAX_BODY_BYTES) throw refusal([], `a body of up to ${MAX_BODY_BYTES} bytes`);
  return length === 0 ? undefined : parseBody(Buffer.concat(chunks).toString());
}

/**
 * @param socket the path where it is made, or the descriptor of one that listens already
 * @throws MachineError when it cannot be made, or does not listen
 */
export async function openApi(
  kernel: HostKernel,
  socket: string | number,
  vmm: ApiVmm,
  options: ApiOptions,
): Promise<Api> {
  const { version, logger, patienceMilliseconds: patience = 30_000 } = options;
  const table = routes(vmm, version, logger);
  /** Requests that are not answered yet. */
  const open = new Set<http.ServerResponse>();
  let onAnswered: () => void = () => undefined;

  async function call(request: http.IncomingMessage, came: Descriptors): Promise<Answer> {
    const { method = '', url = '' } = request;
    let descriptors: readonly number[] = [];
    try {
      const body = await readBody(request);
      descriptors = came.take();
      if (method !== 'GET' && method !== 'PUT') throw refusal([], 'GET or PUT');
      const route = url.startsWith(BASE) ? table.get(url.slice(BASE.length)) : table.get(ELSEWHERE[url] ?? '');
      if (route === undefined) throw new RequestError(`${method} ${shorten(url)} is not served here`, 'unknown');
      if (route.method !== method) throw new RequestError(`${url}: accepted is ${route.method}`, 'invalid');
      if (descriptors.length > 0 && route.takesDescriptors !== true) throw refusal([], 'no descriptors');
      const result = await route.call(body, descriptors);
      return result === undefined ? { status: 204, text: '' } : { status: 200, text: JSON.stringify(result) };
    } catch (error) {
      for (const fd of descriptors) kernel.close(fd);
      logger.info(`API: ${method} ${shorten(url)}: ${causeMessages(error).join(': ')}`);
      return answerTo(error);
    }
  }

  async function serve(request: http.IncomingMessage, response: http.ServerResponse): Promise<void> {
    // That it has been given.
    const connection = request.socket as unknown as Connection;
    const came = connection.begins(request);
    open.add(response);
    response.on('close', () => {
      open.delete(response);
      connection.ends(request);
      if (open.size === 0) onAnswered();
    });
    const { status, text } = await call(request, came);
    if (text !== '') {
      response.setHeader('Content-Type', 'application/json');
      response.setHeader('Content-Length', Buffer.byteLength(text));
    }
    // Node.js takes this back once it has all been taken.
    connection.setTimeout(patience);
    // Cloud Hypervisor's client takes all behind "HTTP/1.1 " for a number, and no chunks: no reason phrase (RFC 9112, 4).
    response.writeHead(status, '');
    response.end(text);
  }

  /** A request that never became one. */
  function refuse(stream: Duplex, reason: string): void {
    const text = JSON.stringify([`accepted is a request of HTTP/1.1: ${shorten(reason)}`]);
    const length = Buffer.byteLength(text);
    const head = ['HTTP/1.1 400 ', 'Content-Type: application/json', `Content-Length: ${length}`, 'Connection: close'];
    // A request before it on the same connection may have been understood, and its answer be on its way.
    if ([...open].some(({ req }) => req.socket === stream && req.complete)) stream.destroy();
    else stream.end(`${head.join('\r\n')}\r\n\r\n${text}`, () => stream.destroy());
  }

  const server = http.createServer(
    {
      requireHostHeader: false,
      requestTimeout: patience,
      headersTimeout: patience,
      connectionsCheckingInterval: Math.min(patience, 1000),
    },
    (request, response) => void serve(request, response),
  );
  server.on('checkExpectation', (request, response) => void serve(request, response));
  server.on('connect', (_request, stream: Duplex) => refuse(stream, 'GET or PUT'));
  server.on('clientError', (error: Error & { reason?: string }, stream) =>
    refuse(stream, error.reason ?? error.message),
  );
  // The server gets no other connections than those that it is given.
  const acceptor = net.createServer({ allowHalfOpen: true, pauseOnConnect: true }, (accepted) => {
    server.emit('connection', new Connection(kernel, accepted));
  });
  acceptor.maxConnections = MAX_CONNECTIONS;
  const bound =
    typeof socket === 'number'
      ? adoptSocket(kernel, `--api-socket fd=${socket}`, socket)
      : bindSocket(kernel, `--api-socket path=${socket}`, socket);
  // It looks after their time from then on.
  server.emit('listening');
  await new Promise<void>((resolve) => acceptor.listen({ fd: bound.listener }, resolve));
  return {
    close: async () => {
      bound.remove();
      const closed = new Promise((resolve) => acceptor.close(resolve));
      const answered = new Promise<void>((resolve) => {
        onAnswered = resolve;
        if (open.size === 0) resolve();
        else setTimeout(resolve, CLOSE_MILLISECONDS).unref();
      });
      await answered;
      server.closeAllConnections();
      server.close();
      await closed;
    },
  };
}
