/**
 * Waiting on main's own event loop until a socket has something to read, without reading it. Node.js has no call for that; but libuv
 * asks for a buffer when there is something to read, and reads nothing where it gets none of any length (ENOBUFS): once, and for a
 * descriptor of its own, as the stream ends with it.
 */
import net from 'node:net';
import type { HostKernel } from './host-kernel.js';

/** A socket of Node.js has no other way to tell its descriptor. */
export function descriptorOf(socket: net.Socket): number {
  return (socket as unknown as { readonly _handle: { readonly fd: number } })._handle.fd;
}

/**
 * @param then called once when there are bytes, the sender's end, or an error
 * @returns ends the wait
 * @throws SystemError when there is no descriptor left
 */
export function whenReadable(kernel: HostKernel, fd: number, then: () => void): () => void {
  const options: net.SocketConstructorOpts & Pick<net.ConnectOpts, 'onread'> = {
    fd: kernel.duplicate(fd),
    writable: false,
    onread: { buffer: new Uint8Array(0), callback: () => true },
  };
  const waiting = new net.Socket(options);
  waiting.once('error', then);
  return () => {
    waiting
      .off('error', then)
      .on('error', () => undefined)
      .destroy();
  };
}
