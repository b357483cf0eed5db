/** A `vmm` on the test host that has a machine or waits for one, and is told what to do over its API. */
import { expect } from '@jest/globals';
import { ApiClient } from './api-client.js';
import { type Backend, KVM } from './backend.js';
import { Guest } from './guest.js';
import type { TestHost } from './host.js';

export class MachineProcess {
  private constructor(
    readonly guest: Guest,
    readonly api: ApiClient,
  ) {}

  /** What {@link MachineProcess.of} needs. Events are in the log. */
  static options(socket: string): string[] {
    return ['--api-socket', socket, '--event-monitor', 'fd=2'];
  }

  static async of(host: TestHost, guest: Guest, socket: string): Promise<MachineProcess> {
    const api = new ApiClient(host, socket);
    await api.listens();
    return new MachineProcess(guest, api);
  }

  /** @param options further ones, of a machine; else it waits for one */
  static open(host: TestHost, socket: string, backend: Backend = KVM, options = ''): Promise<MachineProcess> {
    const words = [...MachineProcess.options(socket), options].join(' ').trim();
    return MachineProcess.of(host, Guest.restore(host, backend, words), socket);
  }

  /** It has ended by itself, or by a signal. */
  async ended(how: { readonly status: number } | { readonly signal: string }): Promise<void> {
    expect(await this.guest.end()).toMatchObject(how);
    await this.api.close();
  }

  async stop(): Promise<void> {
    this.guest.process.kill('SIGTERM');
    await this.ended({ status: 0 });
  }

  /** Until its log tells of an event. @param from where in the log @returns what it says */
  async event(name: string, from = 0): Promise<string> {
    await this.guest.waitForLog(new RegExp(`"event": "${name}"[^}]*}`), from);
    return this.guest.log.slice(this.guest.log.indexOf(`"event": "${name}"`, from));
  }
}
