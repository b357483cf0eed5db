/** The client of `vmm remote`: its taps may be open descriptors that it has inherited, which go with the request (SCM_RIGHTS). */
import fs from 'node:fs';
import net from 'node:net';
import { OptionError } from '../../config/option-syntax.js';
import { Client } from '../../sdk/client.js';
import { bodyOf, type CallOptions, ConnectionError } from '../../sdk/connection.js';
import type { NetConfig, PciDeviceInfo, ReceiveMigrationData, RestoreConfig } from '../../sdk/types.js';
import type { HostKernel } from '../../sys/host-kernel.js';

export class RemoteClient extends Client {
  constructor(
    socketPath: string,
    private readonly kernel: HostKernel,
  ) {
    super(socketPath);
  }

  override async addNet(device: NetConfig, options?: CallOptions): Promise<PciDeviceInfo | undefined> {
    const { fds = [] } = device;
    if (fds.length === 0) return super.addNet(device, options);
    return (await this.#give('add-net fd=', 'vm.add-net', device, fds, options)) as PciDeviceInfo | undefined;
  }

  override async restore(config: RestoreConfig, options?: CallOptions): Promise<void> {
    const fds = (config.net_fds ?? []).flatMap((network) => network.fds ?? []);
    if (fds.length === 0) return super.restore(config, options);
    await this.#give('restore net_fds=', 'vm.restore', config, fds, options);
  }

  override async receiveMigration(wanted: ReceiveMigrationData, options?: CallOptions): Promise<void> {
    const fds = (wanted.net_fds ?? []).flatMap((network) => network.fds ?? []);
    if (fds.length === 0) return super.receiveMigration(wanted, options);
    await this.#give('receive-migration net_fds=', 'vm.receive-migration', wanted, fds, options);
  }

  /** @param written what comes before the descriptors on the command line @throws OptionError when one is not open */
  async #give(written: string, name: string, body: object, fds: readonly number[], options?: CallOptions) {
    for (const fd of fds) {
      if (!isOpen(fd)) throw new OptionError(`${written}[${fds.join(',')}]`, `open descriptors, not ${fd}`);
    }
    const { status, text } = await this.#exchange(name, JSON.stringify(body), fds, options);
    return bodyOf(status, text);
  }

  /** Streams of Node.js send no descriptors: the request goes by itself, and is small enough for a socket to take at once. */
  async #exchange(name: string, body: string, fds: readonly number[], { signal }: CallOptions = {}) {
    const head = `PUT /api/v1/${name} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: ${Buffer.byteLength(body)}`;
    const request = Buffer.from(`${head}\r\n\r\n${body}`);
    let connection: net.Socket | undefined;
    let answer = '';
    try {
      const fd = this.kernel.connectUnix(this.socketPath);
      connection = new net.Socket({ fd, ...(signal && { signal }) });
      connection.write(request.subarray(this.kernel.sendUnix(fd, request, fds)));
      for await (const part of connection.setEncoding('utf8')) answer += String(part);
    } catch (error) {
      connection?.destroy();
      signal?.throwIfAborted();
      const reason = error instanceof Error ? error.message : String(error);
      throw new ConnectionError(`No vmm answers at ${this.socketPath}: ${reason}`, { cause: error });
    }
    const found = /^HTTP\/1\.1 (\d{3})[^]*?\r\n\r\n([^]*)$/.exec(answer);
    if (found === null) throw new ConnectionError(`No vmm answers at ${this.socketPath}: it hung up`);
    return { status: Number(found[1]), text: found[2] };
  }
}

function isOpen(fd: number): boolean {
  try {
    fs.fstatSync(fd);
    return true;
  } catch {
    return false;
  }
}
