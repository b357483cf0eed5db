/** Takes Cloud Hypervisor's events: what happens to the process, its machine and the guest. */
export type EventSink = (
  source: 'vmm' | 'vm' | 'guest' | 'virtio-device',
  event: string,
  properties?: Readonly<Record<string, string>>,
) => void;
