/** The shape of a machine's processors, as the command line gives it: how many of each level are in the one above. */
export interface Topology {
  readonly threadsPerCore: number;
  readonly coresPerDie: number;
  readonly diesPerPackage: number;
  readonly packages: number;
}

/** One package of single-threaded cores: what most guests expect when nothing is said. */
export function defaultTopology(vcpus: number): Topology {
  return { threadsPerCore: 1, coresPerDie: vcpus, diesPerPackage: 1, packages: 1 };
}
