/** What the API serves, without a machine. */
import type { ApiVmm } from '../../src/api/routes.js';
import type { VmConfig } from '../../src/config/vm-config.js';
import { RequestError } from '../../src/vmm/machine/machine-error.js';

/**
 * Tells what it is asked; the disk `none` is not there, `stuck` cannot be resized, and `slow` takes until it is let go.
 *
 * @param asked told of each call
 */
export function fakeVmm(asked: (what: unknown) => void, release: Promise<void> = Promise.resolve()): ApiVmm {
  const say = (what: unknown) => {
    asked(what);
    return Promise.resolve();
  };
  const disks = [{ path: 'd', image_type: 'qcow2', _disable_aio: false }];
  const config = { payload: { kernel: 'k' }, disks, net: [] } as unknown as VmConfig;
  return {
    ended: new Promise(() => undefined),
    runs: true,
    create: (created) => say({ create: created }),
    boot: () => say('boot'),
    shutdown: () => say('shutdown'),
    delete: () => say('delete'),
    reboot: () => say('reboot'),
    pause: () => say('pause'),
    resume: () => say('resume'),
    addDevice: async (kind, device) => {
      await say({ add: kind, device });
      return kind === 'vsock' ? undefined : { id: `_${kind}7`, bdf: '0000:00:07.0' };
    },
    removeDevice: (id) => say({ remove: id }),
    shutdownVmm: say,
    info: () => ({ config, state: 'Running', memory_actual_size: 5, device_tree: {} }),
    counters: () => ({ _disk0: { read_ops: 1 } }),
    coredump: (file) => say({ coredump: file }),
    snapshot: (folder, resume) => say({ snapshot: folder, resume }),
    restore: (wanted, descriptors) => say({ restore: wanted, descriptors: [...descriptors] }),
    fork: (wanted) => say({ fork: wanted }),
    sendMigration: (wanted) => say({ send: wanted }),
    cancelMigration: () => say('cancel-migration'),
    receiveMigration: (wanted, descriptors) => say({ receive: wanted, descriptors: [...descriptors] }),
    nmi: () => {
      asked('nmi');
    },
    powerButton: () => {
      asked('power-button');
    },
    logCounters: () => undefined,
    resize: (wanted) => say({ resize: wanted }),
    resizeZone: (id, size) => say({ zone: id, size }),
    resizeDisk: async (id, size, shrink) => {
      if (id === 'none') throw new RequestError('The machine has no disk none', 'unknown');
      if (id === 'stuck') throw new RequestError('No space', 'failed');
      if (id === 'slow') await release;
      await say({ id, size, shrink });
    },
  };
}
