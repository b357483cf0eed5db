/**
 * Lives of a machine that came to nothing: the guest ended in a triple fault before it had touched any device. One such is a reset
 * like any other; some in a row are a file that is no kernel, and the machine would do nothing else for ever. A guest that has
 * printed, looked at its PCI bus or asked for its reset by a port has got somewhere, however short its life was.
 */
const MAX_IN_A_ROW = 3;

/** Exits that are accesses to devices. */
const DEVICE_EXITS = ['PortRead', 'PortWrite', 'MmioRead', 'MmioWrite'] as const;

export class FalseStarts {
  #inARow = 0;

  /**
   * A life has ended in a triple fault.
   *
   * @param exits of all its vCPUs, by kind
   * @returns whether there is no point in another one
   */
  count(exits: Readonly<Record<string, number>>): boolean {
    const nowhere = DEVICE_EXITS.every((kind) => exits[kind] === 0);
    this.#inARow = nowhere ? this.#inARow + 1 : 0;
    return this.#inARow >= MAX_IN_A_ROW;
  }
}
