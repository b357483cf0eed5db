/**
 * The REST API: HTTP/1.1 on a Unix socket, under /api/v1, with Cloud Hypervisor's paths, bodies and answers. 200 with a JSON body,
 * 204 without one; an error is a JSON array of strings, from the outermost to the cause.
 *
 * Built: what a machine that runs can be asked and told. Creating and booting one, hotplug and migration are not.
 */
import http from 'node:http';
import * as z from 'zod/mini';
import type { HostKernel } from '../sys/host-kernel.js';
import type { Machine } from '../vmm/machine/machine.js';
import { causeMessages, RequestError } from '../vmm/machine/machine-error.js';
import { bindSocket } from '../vmm/host/unix-socket.js';

const BASE = '/api/v1/';
const MAX_BODY_BYTES = 4 * 1024 * 1024;
/** At a time; further ones are closed. Each may hold a body. */
const MAX_CONNECTIONS = 32;
const SECTOR = 512;

export interface Api {
  /** Refuses further requests and removes the socket. */
  close(): Promise<void>;
}

/** What of a machine the API uses. */
export type ApiMachine = Pick<
  Machine,
  | 'addDevice'
  | 'counters'
  | 'info'
  | 'pause'
  | 'powerButton'
  | 'removeDevice'
  | 'reset'
  | 'resizeBalloon'
  | 'resizeDisk'
  | 'resizeMemory'
  | 'resizeVcpus'
  | 'resume'
  | 'stop'
>;

/** An answer: its body, or nothing; then what is to happen once it has been sent. */
interface Answer {
  readonly body?: unknown;
  readonly afterwards?: () => void;
}

type Handler = (body: unknown) => Answer | Promise<Answer>;

const bytes = (error: string) => z.int({ error }).check(z.gte(0, { error }));
const ramError = 'desired_ram: accepted is a number of bytes';
const balloonError = 'desired_balloon: accepted is a number of bytes';
const vcpusError = 'desired_vcpus: accepted is a number from 1 on';
const diskSizeError = `desired_size: accepted is a multiple of ${SECTOR} bytes`;

const resizeError = 'accepted is {"desired_vcpus": NUMBER, "desired_ram": BYTES, "desired_balloon": BYTES}';
/** Its clients write out what they do not set. */
const resizeSchema = z.strictObject(
  {
    desired_balloon: z.nullish(bytes(balloonError)),
    desired_vcpus: z.nullish(z.int({ error: vcpusError }).check(z.gte(1, { error: vcpusError }))),
    desired_ram: z.nullish(bytes(ramError)),
  },
  { error: resizeError },
);
const resizeDiskSchema = z.strictObject(
  {
    id: z.string({ error: 'id: accepted is the name of a disk' }),
    desired_size: bytes(diskSizeError).check(
      z.gte(SECTOR, { error: diskSizeError }),
      z.multipleOf(SECTOR, { error: diskSizeError }),
    ),
    shrink: z.nullish(z.boolean({ error: 'shrink: accepted is true or false' })),
  },
  { error: 'accepted is {"id": DISK, "desired_size": BYTES, "shrink": true or false}' },
);

const deviceSchema = z.looseObject({}, { error: 'accepted is the configuration of a device' });
const removeSchema = z.looseObject({ id: z.string({ error: 'id: accepted is the name of a device' }) });

function check<T>(schema: z.ZodMiniType<T>, body: unknown): T {
  const checked = schema.safeParse(body);
  if (checked.success) return checked.data;
  throw new RequestError(checked.error.issues[0].message, 'invalid');
}

function handlers(machine: ApiMachine, version: string): Readonly<Partial<Record<string, Handler>>> {
  const done: Answer = {};
  return {
    'GET vmm.ping': () => ({ body: { build_version: `v${version}`, version, pid: process.pid, features: [] } }),
    'PUT vmm.shutdown': () => ({ afterwards: () => machine.stop('vmm.shutdown') }),
    'GET vm.info': () => ({ body: machine.info() }),
    'GET vm.counters': () => ({ body: machine.counters() }),
    'PUT vm.power-button': () => {
      machine.powerButton();
      return done;
    },
    'PUT vm.reboot': () => {
      machine.reset('vm.reboot');
      return done;
    },
    ...Object.fromEntries(
      (['disk', 'net', 'pmem', 'vsock'] as const).map((kind) => [
        `PUT vm.add-${kind}`,
        async (body: unknown) => ({ body: await machine.addDevice(kind, check(deviceSchema, body)) }),
      ]),
    ),
    'PUT vm.remove-device': async (body) => {
      await machine.removeDevice(check(removeSchema, body).id);
      return done;
    },
    'PUT vm.pause': async () => {
      await machine.pause();
      return done;
    },
    'PUT vm.resume': async () => {
      await machine.resume();
      return done;
    },
    'PUT vm.resize': async (body) => {
      const { desired_balloon: balloon, desired_ram: ram, desired_vcpus: vcpus } = check(resizeSchema, body);
      if (typeof vcpus === 'number') await machine.resizeVcpus(vcpus);
      if (typeof ram === 'number') machine.resizeMemory(ram);
      if (typeof balloon === 'number') machine.resizeBalloon(balloon);
      return done;
    },
    'PUT vm.resize-disk': async (body) => {
      const { id, desired_size: size, shrink } = check(resizeDiskSchema, body);
      await machine.resizeDisk(id, size, shrink ?? false);
      return done;
    },
  };
}

const STATUS = { invalid: 400, unknown: 404, conflict: 409, busy: 429, failed: 500 } as const;

async function readBody(request: http.IncomingMessage): Promise<unknown> {
  const chunks: Buffer[] = [];
  let length = 0;
  for await (const chunk of request as AsyncIterable<Buffer>) {
    length += chunk.length;
    // Read to its end, so that the answer finds its way; a client that never ends meets the server's time limit.
    if (length <= MAX_BODY_BYTES) chunks.push(chunk);
  }
  if (length > MAX_BODY_BYTES) throw new RequestError(`accepted is a body of up to ${MAX_BODY_BYTES} bytes`, 'invalid');
  if (length === 0) return undefined;
  try {
    return JSON.parse(Buffer.concat(chunks).toString());
  } catch {
    throw new RequestError('accepted is a body in JSON', 'invalid');
  }
}

/** @throws MachineError when the socket cannot be made */
export async function openApi(kernel: HostKernel, socket: string, machine: ApiMachine, version: string): Promise<Api> {
  const routes = handlers(machine, version);

  async function answer(request: http.IncomingMessage): Promise<Answer> {
    const { method, url = '' } = request;
    if (method !== 'GET' && method !== 'PUT') throw new RequestError('accepted is GET or PUT', 'invalid');
    const name = url.startsWith(BASE) ? `${method} ${url.slice(BASE.length)}` : '';
    const handler = Object.hasOwn(routes, name) ? routes[name] : undefined;
    if (handler === undefined) throw new RequestError(`${method} ${url} is not served here`, 'unknown');
    return handler(await readBody(request));
  }

  async function serve(request: http.IncomingMessage, response: http.ServerResponse): Promise<void> {
    let status = 204;
    let reply: Answer;
    try {
      reply = await answer(request);
      if (reply.body !== undefined) status = 200;
    } catch (error) {
      status = error instanceof RequestError ? STATUS[error.kind] : 500;
      reply = { body: causeMessages(error) };
    }
    const body = reply.body === undefined ? '' : JSON.stringify(reply.body);
    if (body !== '') {
      response.setHeader('Content-Type', 'application/json');
      response.setHeader('Content-Length', Buffer.byteLength(body));
    }
    // Cloud Hypervisor's client takes all behind "HTTP/1.1 " for a number, and no chunks: no reason phrase (RFC 9112, 4).
    response.writeHead(status, '');
    // Sent, or the client has gone: it was asked for either way.
    response.on('close', () => reply.afterwards?.());
    response.end(body);
  }

  const server = http.createServer((request, response) => void serve(request, response));
  server.maxConnections = MAX_CONNECTIONS;
  const bound = bindSocket(kernel, `--api-socket path=${socket}`, socket);
  await new Promise<void>((resolve) => server.listen({ fd: bound.listener }, resolve));
  return {
    close: async () => {
      bound.remove();
      const closed = new Promise((resolve) => server.close(resolve));
      server.closeAllConnections();
      await closed;
    },
  };
}
