/** Errors as the driver answers them: negated errnos. */
import os from 'node:os';
import { HV_STATUS } from '../../../src/hypervisor/mshv/abi.js';

export const {
  EAGAIN,
  EBADF,
  EBUSY,
  E2BIG,
  EEXIST,
  EFAULT,
  EINTR,
  EINVAL,
  EIO,
  ENODEV,
  ENOENT,
  ENOMEM,
  ENOTTY,
  EOPNOTSUPP,
} = os.constants.errno;

const INVALID: readonly number[] = [
  HV_STATUS.INVALID_HYPERCALL_CODE,
  HV_STATUS.INVALID_HYPERCALL_INPUT,
  HV_STATUS.INVALID_PARAMETER,
  HV_STATUS.INVALID_PARTITION_ID,
  HV_STATUS.INVALID_VP_INDEX,
];

/** As hv_result_to_errno of the kernel, which leaves most to EIO. @returns 0 or the negated errno */
export function errnoOfStatus(status: number): number {
  if (status === HV_STATUS.SUCCESS) return 0;
  if (status === HV_STATUS.INSUFFICIENT_MEMORY) return -ENOMEM;
  return INVALID.includes(status) ? -EINVAL : -EIO;
}
