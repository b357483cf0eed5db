/** A process that ends with another one: it reads a pipe or socket to its end, whose other end that one alone holds. */
import fs from 'node:fs';
import net from 'node:net';
import { OptionError } from '../config/option-syntax.js';

/**
 * @param onGone called with the reason when nobody holds the other end any more, however that came
 * @returns what ends the watch
 * @throws OptionError when it is not such a descriptor
 */
export function watchOwner(fd: number, onGone: (reason: string) => void): () => void {
  let reason = 'its owner has gone';
  const socket = open(fd);
  socket.on('error', (error: NodeJS.ErrnoException) => {
    // A socket whose other end had not read all.
    if (error.code !== 'ECONNRESET') reason = `--end-with fd=${fd}: ${error.message}`;
  });
  socket.on('close', () => onGone(reason));
  // What comes means nothing.
  socket.resume();
  return () => socket.removeAllListeners('close').destroy();
}

function open(fd: number): net.Socket {
  try {
    const kind = fs.fstatSync(fd);
    if (!kind.isFIFO() && !kind.isSocket()) throw new Error('it is another kind of file');
    return new net.Socket({ fd, readable: true, writable: false });
  } catch (error) {
    const why = error instanceof Error ? `: ${error.message}` : '';
    throw new OptionError(`--end-with fd=${fd}`, `a descriptor that is open, of a pipe or socket${why}`);
  }
}
