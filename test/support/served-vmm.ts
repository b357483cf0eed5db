/** The API of a machine that is made up, on a socket, for tests of its clients. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach } from '@jest/globals';
import { type Api, openApi } from '../../src/api/server.js';
import type { ApiVmm } from '../../src/api/routes.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { fakeVmm } from './fake-vmm.js';

const quiet = () => undefined;
const logger = { error: quiet, warn: quiet, info: quiet, debug: quiet };

/** Anew for each test. */
export class ServedVmm {
  /** Of the test alone. */
  folder = '';
  /** Where it is served, or will be. */
  socket = '';
  /** What it has been asked. */
  asked: unknown[] = [];
  #api: Api | undefined;

  constructor(private readonly kernel = new LinuxKernel()) {
    beforeEach(() => {
      this.folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-served-'));
      this.socket = path.join(this.folder, 'api');
      this.asked = [];
    });
    afterEach(async () => {
      await this.close();
      fs.rmSync(this.folder, { recursive: true });
    });
  }

  /** @param more what it does otherwise */
  async serve(more: Partial<ApiVmm> = {}): Promise<void> {
    const vmm = { ...fakeVmm((what) => this.asked.push(what)), ...more };
    this.#api = await openApi(this.kernel, this.socket, vmm, { version: '1.2.3', logger });
  }

  /** Nobody serves it any more. */
  async close(): Promise<void> {
    await this.#api?.close();
    this.#api = undefined;
  }
}
