/** Requests to the REST API of a `vmm` on the test host. */
import type { TestHost } from './host.js';

export interface ApiAnswer {
  readonly status: number;
  readonly body: unknown;
}

/** One request, from the machine that runs vmm. */
export async function askApi(
  host: TestHost,
  socket: string,
  method: 'GET' | 'PUT',
  name: string,
  body?: unknown,
): Promise<ApiAnswer> {
  const script = `
    const [socketPath, method, path, body] = process.argv.slice(1);
    require('node:http').request({ socketPath, method, path }, (response) => {
      process.stdout.write(response.statusCode + ' ');
      response.pipe(process.stdout);
    }).end(body);`;
  const words = [socket, method, `/api/v1/${name}`, ...(body === undefined ? [] : [JSON.stringify(body)])];
  const { stdout, stderr } = await host.run([process.execPath, '-e', script, ...words]);
  const match = /^(\d+) ([^]*)$/.exec(stdout);
  if (match === null) throw new Error(`${method} ${name}: ${stderr}`);
  const [, status, text] = match;
  return { status: Number(status), body: text === '' ? undefined : (JSON.parse(text) as unknown) };
}
