/** The header of vsock packets (virtio 1.3, 5.10.6). */

export const HEADER_BYTES = 44;
/** 5.10.4 */
export const HOST_CID = 2;
/**
 * Bytes of data in one packet at most, as Linux has it. A guest could otherwise make one packet cost as much as it has
 * memory.
 */
export const MAX_PACKET = 0x1_0000;

export const PacketType = { stream: 1 } as const;

export const Op = {
  request: 1,
  response: 2,
  reset: 3,
  shutdown: 4,
  data: 5,
  creditUpdate: 6,
  creditRequest: 7,
} as const;

/** Flags of a SHUTDOWN: what its sender will do no more. */
export const Shutdown = { receive: 1, send: 2, both: 3 } as const;

/** The place of each field. */
const At = {
  sourceCid: 0,
  targetCid: 8,
  sourcePort: 16,
  targetPort: 20,
  length: 24,
  type: 28,
  op: 30,
  flags: 32,
  bufferSize: 36,
  forwarded: 40,
} as const;

/** One header, used over and over. CIDs are halves, as they have 64 bits. */
export class PacketHeader {
  readonly bytes = new Uint8Array(HEADER_BYTES);
  readonly #view = new DataView(this.bytes.buffer);

  get sourceCidLow(): number {
    return this.#view.getUint32(At.sourceCid, true);
  }
  get sourceCidHigh(): number {
    return this.#view.getUint32(At.sourceCid + 4, true);
  }
  get targetCidLow(): number {
    return this.#view.getUint32(At.targetCid, true);
  }
  get targetCidHigh(): number {
    return this.#view.getUint32(At.targetCid + 4, true);
  }
  get sourcePort(): number {
    return this.#view.getUint32(At.sourcePort, true);
  }
  get targetPort(): number {
    return this.#view.getUint32(At.targetPort, true);
  }
  get length(): number {
    return this.#view.getUint32(At.length, true);
  }
  get type(): number {
    return this.#view.getUint16(At.type, true);
  }
  get op(): number {
    return this.#view.getUint16(At.op, true);
  }
  get flags(): number {
    return this.#view.getUint32(At.flags, true);
  }
  /** buf_alloc: bytes that the sender can hold for the connection. */
  get bufferSize(): number {
    return this.#view.getUint32(At.bufferSize, true);
  }
  /** fwd_cnt: bytes that the sender's reader has taken, modulo 2^32. */
  get forwarded(): number {
    return this.#view.getUint32(At.forwarded, true);
  }

  setSource(cidLow: number, cidHigh: number, port: number): void {
    this.#view.setUint32(At.sourceCid, cidLow, true);
    this.#view.setUint32(At.sourceCid + 4, cidHigh, true);
    this.#view.setUint32(At.sourcePort, port, true);
  }

  setTarget(cidLow: number, cidHigh: number, port: number): void {
    this.#view.setUint32(At.targetCid, cidLow, true);
    this.#view.setUint32(At.targetCid + 4, cidHigh, true);
    this.#view.setUint32(At.targetPort, port, true);
  }

  setBody(type: number, op: number, flags: number, length: number): void {
    this.#view.setUint16(At.type, type, true);
    this.#view.setUint16(At.op, op, true);
    this.#view.setUint32(At.flags, flags, true);
    this.#view.setUint32(At.length, length, true);
  }

  setCredit(bufferSize: number, forwarded: number): void {
    this.#view.setUint32(At.bufferSize, bufferSize, true);
    this.#view.setUint32(At.forwarded, forwarded, true);
  }
}

/** Resets that wait for a buffer of the guest's, of packets that have no connection. A ring that is never grown. */
export class ResetList {
  /** Words of an entry: type, source CID's halves and port, target port. */
  static readonly #words = 5;
  readonly #entries: Uint32Array;
  #first = 0;
  #count = 0;

  constructor(private readonly capacity: number) {
    this.#entries = new Uint32Array(capacity * ResetList.#words);
  }

  get isEmpty(): boolean {
    return this.#count === 0;
  }

  get isFull(): boolean {
    return this.#count === this.capacity;
  }

  /** Takes in the answer to a packet; the list is not full. */
  add(to: PacketHeader): void {
    const at = ((this.#first + this.#count++) % this.capacity) * ResetList.#words;
    const entries = this.#entries;
    // The guest heeds only a reset of its socket's own type.
    entries[at] = to.type;
    entries[at + 1] = to.targetCidLow;
    entries[at + 2] = to.targetCidHigh;
    entries[at + 3] = to.targetPort;
    entries[at + 4] = to.sourcePort;
  }

  /** Fills a header with the oldest, whose target CID the caller knows, and forgets it; the list is not empty. */
  take(header: PacketHeader, cidLow: number, cidHigh: number): void {
    const at = this.#first * ResetList.#words;
    const entries = this.#entries;
    header.setSource(entries[at + 1], entries[at + 2], entries[at + 3]);
    header.setTarget(cidLow, cidHigh, entries[at + 4]);
    header.setBody(entries[at], Op.reset, 0, 0);
    header.setCredit(0, 0);
    this.#first = (this.#first + 1) % this.capacity;
    this.#count--;
  }

  clear(): void {
    this.#count = 0;
  }
}
