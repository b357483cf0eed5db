/** The scenarios on KVM. */
import { KVM } from '../support/backend.js';
import { scenarios } from './scenarios.js';

scenarios(KVM);
