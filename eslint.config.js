import js from '@eslint/js';
import tseslint from 'typescript-eslint';

export default tseslint.config(
  { ignores: ['dist/', 'node_modules/', '.cache/', 'coverage/'] },
  js.configs.recommended,
  {
    files: ['**/*.ts'],
    extends: [tseslint.configs.strictTypeChecked],
    languageOptions: { parserOptions: { projectService: true } },
    rules: {
      '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true, allowBoolean: true }],
      '@typescript-eslint/consistent-type-imports': 'error',
      // Typed arrays and register files are indexed on every line; the compiler's own indexing rules are enough.
      '@typescript-eslint/no-non-null-assertion': 'off',
      // `for (;;)` and `while (true)` are how a run loop is written.
      '@typescript-eslint/no-unnecessary-condition': ['error', { allowConstantLoopConditions: true }],
      '@typescript-eslint/no-confusing-void-expression': ['error', { ignoreArrowShorthand: true }],
    },
  },
  {
    files: ['**/*.{js,mjs}'],
    languageOptions: { globals: { process: 'readonly', console: 'readonly', URL: 'readonly', Buffer: 'readonly' } },
  },
  {
    // koffi is the one door to the host kernel; see docs/architecture.md.
    files: ['src/**/*.ts'],
    ignores: ['src/sys/**'],
    rules: { 'no-restricted-imports': ['error', { paths: ['koffi'] }] },
  },
);
