/*
 * The peer of `npm run bench -- exits`: the same guest code and the same ioctls as the VMM's, in C. Prints the nanoseconds
 * per exit of one run.
 *
 * usage: exits-peer FILE-OF-GUEST-CODE DATA-SEGMENT-BASE EXITS
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CHECK(call) ({ long r = (long)(call); if (r < 0) { perror(#call); exit(1); } r; })

static volatile uint32_t device;

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	long exits = atol(argv[3]);
	int kvm = CHECK(open("/dev/kvm", O_RDWR | O_CLOEXEC));
	int vm = CHECK(ioctl(kvm, KVM_CREATE_VM, 0));
	uint8_t *ram = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = { .memory_size = 0x10000, .userspace_addr = (uintptr_t)ram };
	CHECK(ioctl(vm, KVM_SET_TSS_ADDR, 0xf8000000));
	uint64_t identity = 0xf8003000;
	CHECK(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity));
	CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	int code = CHECK(open(argv[1], O_RDONLY));
	CHECK(read(code, ram + 0x1000, 0x1000));

	int vcpu = CHECK(ioctl(vm, KVM_CREATE_VCPU, 0));
	struct kvm_run *run = mmap(NULL, CHECK(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	struct kvm_sregs sregs;
	CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	sregs.ds.base = strtoul(argv[2], NULL, 0);
	CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs));
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs));

	struct timespec start, end;
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (long done = 0; done < exits; done++) {
		CHECK(ioctl(vcpu, KVM_RUN, 0));
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			if (run->io.direction == KVM_EXIT_IO_OUT)
				device = *((uint8_t *)run + run->io.data_offset);
			else
				*((uint8_t *)run + run->io.data_offset) = device;
			break;
		case KVM_EXIT_MMIO:
			device = run->mmio.data[0];
			break;
		default:
			fprintf(stderr, "exit %u\n", run->exit_reason);
			return 1;
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.1f\n", ((end.tv_sec - start.tv_sec) * 1e9 + (end.tv_nsec - start.tv_nsec)) / exits);
	return 0;
}
