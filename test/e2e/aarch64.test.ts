/** The scenarios on KVM of aarch64. */
import { ARM } from '../support/backend.js';
import { scenarios } from './scenarios.js';

scenarios(ARM);
