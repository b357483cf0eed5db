/** How what a device holds is given back, what came last first. */
export class Undo {
  /** Of the host. */
  readonly host: (() => void)[] = [];
  /** Of the VM: left out where that goes as a whole. */
  readonly vm: (() => void)[] = [];

  all(): (() => void)[] {
    return [...this.vm.toReversed(), ...this.host.toReversed()];
  }
}
