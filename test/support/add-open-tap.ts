/** vm.add-net as Kata and Cloud Hypervisor's own client call it: with a tap that the client has opened. */
import type { ApiAnswer } from './api-client.js';
import type { TestHost } from './host.js';

/** Sends the tap with the first bytes of the request, and is gone when it has the answer. */
export async function addOpenTap(host: TestHost, socket: string, tap: string, config: object): Promise<ApiAnswer> {
  const script = `
    const koffi = require('koffi'), fs = require('node:fs'), net = require('node:net');
    const [path, tap, body] = process.argv.slice(1);
    const libc = koffi.load('libc.so.6');
    const ioctl = libc.func('ioctl', 'int', ['int', 'unsigned long', 'void *']);
    koffi.struct('iovec', { base: 'void *', length: 'size_t' });
    koffi.struct('msghdr', { name: 'void *', nameLength: 'uint32', iovecs: 'iovec *', count: 'size_t',
      control: 'void *', controlLength: 'size_t', flags: 'int' });
    const sendmsg = libc.func('long sendmsg(int fd, const msghdr *message, int flags)');
    const fd = fs.openSync('/dev/net/tun', 'r+');
    const request = Buffer.alloc(40);
    request.write(tap);
    request.writeUInt16LE(0x5002, 16); // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    if (ioctl(fd, 0x400454ca, request) < 0) throw new Error('TUNSETIFF: errno ' + koffi.errno());
    const control = Buffer.alloc(24);
    control.writeUInt32LE(20, 0); // one SCM_RIGHTS
    control.writeUInt32LE(1, 8);
    control.writeUInt32LE(1, 12);
    control.writeInt32LE(fd, 16);
    const client = net.connect(path, () => {
      const base = Buffer.from('PUT /api/v1/vm.add-net HTTP/1.1\\r\\nConnection: close\\r\\n');
      sendmsg(client._handle.fd, { name: null, nameLength: 0, iovecs: [{ base, length: base.length }], count: 1,
        control, controlLength: 24, flags: 0 }, 0);
      client.write('Content-Length: ' + body.length + '\\r\\n\\r\\n' + body);
    });
    let text = '';
    client.on('data', (bytes) => (text += bytes));
    client.on('close', () => console.log(text));`;
  const { stdout, stderr } = await host.run([process.execPath, '-e', script, socket, tap, JSON.stringify(config)]);
  const match = /^HTTP\/1\.1 (\d+) [^]*?\r\n\r\n([^]*)\n$/.exec(stdout);
  if (match === null) throw new Error(`vm.add-net: ${stdout}${stderr}`);
  return { status: Number(match[1]), body: match[2] === '' ? undefined : (JSON.parse(match[2]) as unknown) };
}
