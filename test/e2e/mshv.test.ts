/** The scenarios on the Microsoft hypervisor: this host's, or a simulated one. */
import { mshv } from '../support/backend.js';
import { scenarios } from './scenarios.js';

scenarios(mshv());
