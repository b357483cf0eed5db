import { SystemError } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import * as abi from './abi.js';

/** @param name of the request, without MSHV_ @throws HypervisorError with one line for the user */
export function driverRequest<T>(name: string, call: () => T): T {
  try {
    return call();
  } catch (error) {
    if (!(error instanceof SystemError)) throw error;
    throw new HypervisorError(`${abi.MSHV_DEVICE} refuses ${name}: ${error.reason}`, { cause: error });
  }
}
