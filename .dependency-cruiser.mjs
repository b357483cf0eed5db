// The layers of src/, top to bottom: each imports only from itself and from those above it in this list.
// docs/architecture.md says what each is for.
const layers = [
  'sys',
  'state',
  'memory',
  'hypervisor',
  'arch',
  'devices',
  'pci',
  'virtio',
  'block',
  'net',
  'config',
  'vmm',
  'api',
  'sdk',
  'threads',
  'cli',
];

export default {
  forbidden: [
    { name: 'no-circular', severity: 'error', from: {}, to: { circular: true } },
    ...layers.map((layer, index) => ({
      name: `layer-${layer}`,
      comment: `src/${layer}/ may import only from: ${layers.slice(0, index + 1).join(', ')}`,
      severity: 'error',
      from: { path: `^src/${layer}/` },
      to: { path: '^src/', pathNot: `^src/(${layers.slice(0, index + 1).join('|')})/` },
    })),
    {
      name: 'koffi-only-in-sys',
      severity: 'error',
      from: { path: '^src/', pathNot: '^src/sys/' },
      to: { path: 'node_modules/koffi' },
    },
    {
      name: 'backends-behind-the-interface',
      comment: 'Only the composition roots name a backend; everything else uses the interfaces of src/hypervisor/.',
      severity: 'error',
      from: { path: '^src/', pathNot: '^src/(hypervisor/(kvm|mshv)|threads|cli)/' },
      to: { path: '^src/hypervisor/(kvm|mshv)/' },
    },
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    tsConfig: { fileName: 'tsconfig.json' },
    tsPreCompilationDeps: true,
    enhancedResolveOptions: { extensions: ['.ts', '.js'], conditionNames: ['import', 'node', 'default'] },
  },
};
