/** Memory layouts from the options of `--memory`. */
import { type MemoryConfig, zonesOf } from '../../src/config/memory-config.js';
import { vmConfigSchema } from '../../src/config/vm-config.js';
import type { MemoryRange } from '../../src/memory/guest-memory.js';
import { layoutMemory, type MemoryLayout } from '../../src/vmm/memory/memory-layout.js';

export function memoryOf(options: Partial<MemoryConfig>): MemoryConfig {
  return vmConfigSchema.parse({ payload: { kernel: 'k' }, memory: options }).memory;
}

/** @param windows of the architecture */
export function layoutOf(options: Partial<MemoryConfig>, windows: readonly MemoryRange[]): MemoryLayout {
  return layoutMemory(zonesOf(memoryOf(options)), windows, 2 ** 32);
}
