/** Host programs that come to the vsock device's socket, and the line with which they say where they want to go. */
import { EPOLL, type HostMapping } from '../../../sys/host-kernel.js';
import type { DeviceContext } from '../../device.js';
import { type Connection, Control, State } from './connection.js';
import type { Connections } from './connections.js';
import { VsockCounter } from './description.js';

/** Connections accepted in one go. */
const ACCEPTS = 64;
/** `CONNECT 4294967295\n` and a little more. */
const LINE_LIMIT = 32;
/** The shortest greeting, `CONNECT 1\n`: what comes behind its end is data, so the rest is read byte by byte. */
const LINE_LEAST = 10;
/** Host ports of connections from the host: from here up. */
const FIRST_PORT = 0x4000_0000;
/** Milliseconds for the guest to answer a request. */
const REQUEST_TIMEOUT = 5000;
const EINTR = 4;
const EAGAIN = 11;
const ECONNABORTED = 103;

export class VsockGreeter {
  readonly #scratch: HostMapping;
  readonly #scratchAddress: number;
  readonly #scratchBytes: Uint8Array;
  #nextPort = 0;

  /**
   * @param listener the device's socket
   * @param again `accept` is to be called again soon: there may be more
   */
  constructor(
    private readonly context: DeviceContext,
    private readonly connections: Connections,
    private readonly listener: number,
    private readonly again: () => void,
  ) {
    this.#scratch = context.kernel.map({ length: 4096, shared: false });
    this.#scratchAddress = Number(this.#scratch.handle.address);
    this.#scratchBytes = new Uint8Array(this.#scratch.view(0, 4096));
  }

  start(): void {
    // Edge-triggered: a listener that cannot be served, for want of descriptors, does not keep the worker busy.
    this.context.loop.watch(this.listener, EPOLL.IN | EPOLL.EDGE, () => this.accept());
  }

  accept(): void {
    const { kernel } = this.context;
    this.connections.waiting = true;
    for (let count = 0; count < ACCEPTS; count++) {
      const fd = kernel.acceptUnix(this.listener);
      if (fd === -EAGAIN) {
        this.connections.waiting = false;
        return;
      }
      if (fd === -EINTR || fd === -ECONNABORTED) continue;
      if (fd < 0) {
        this.connections.startSweep();
        return;
      }
      if (this.connections.makeRoom()) this.connections.open(fd);
      else {
        kernel.close(fd);
        this.context.counters[VsockCounter.refused]++;
      }
    }
    this.again();
  }

  /** Reads the line with which a host program says where it wants to go. */
  greet(connection: Connection): void {
    const { kernel } = this.context;
    while (!connection.line.endsWith('\n')) {
      const wanted = Math.max(LINE_LEAST - connection.line.length, 1);
      const count = kernel.readRaw(connection.fd, this.#scratchAddress, wanted);
      if (count === -EINTR) continue;
      if (count === -EAGAIN) return;
      if (count <= 0 || connection.line.length + count > LINE_LIMIT) {
        this.connections.close(connection);
        return;
      }
      connection.line += Buffer.from(this.#scratchBytes.subarray(0, count)).toString('latin1');
    }
    // Any white space parts the words and ends the line, as in the programs that this protocol comes from.
    const [word, number = ''] = connection.line.trim().split(/\s+/);
    const port = word.toLowerCase() === 'connect' && /^\+?[0-9]+$/.test(number) ? Number(number) : NaN;
    if (!(port < 2 ** 32)) {
      this.context.counters[VsockCounter.refused]++;
      this.connections.close(connection);
      return;
    }
    connection.guestPort = port;
    do {
      connection.hostPort = FIRST_PORT + this.#nextPort;
      this.#nextPort = (this.#nextPort + 1) % FIRST_PORT;
    } while (this.connections.table.find(port, connection.hostPort) !== undefined);
    connection.state = State.Requested;
    connection.control = Control.request;
    this.connections.table.add(connection);
    this.connections.service.add(connection);
    this.connections.watch(connection, 0);
    this.connections.expire(connection, REQUEST_TIMEOUT);
  }

  /** Tells a host program that the guest has accepted. @returns false when it is gone */
  accepted({ fd, hostPort }: Connection): boolean {
    const line = Buffer.from(`OK ${hostPort}\n`);
    this.#scratchBytes.set(line);
    // An empty socket takes it whole, or its other end is gone.
    return this.context.kernel.writeRaw(fd, this.#scratchAddress, line.length) === line.length;
  }

  stop(): void {
    this.context.loop.unwatch(this.listener);
  }

  end(): void {
    this.#scratch.unmap();
  }
}
