/*
 * The peer of a clone in `npm run bench -- restore`: a process that waits, as ours does, and when it is told so makes a machine by the
 * ioctls and mappings that were seen of ours (test/bench/clone-script.ts), with a thread for each vCPU and a serial port that is just
 * enough for a guest to print.
 *
 * usage: fork-peer SCRIPT
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <x86intrin.h>

#define CHECK(call) ({ long r = (long)(call); if (r < 0) { perror(#call); exit(1); } r; })

/* As clone-script.ts writes them. */
struct step {
	uint32_t kind, target, request, length;
	uint64_t value;
	uint8_t data[];
};
enum { VALUE, BUFFER, MEMORY, EVENT, COUNTER };
struct memory {
	uint64_t slot, address, size;
	char path[];
};

#define MAX_VCPUS 256
#define MAX_EVENTS 4096
#define SERIAL 0x3f8
#define SERIAL_IRQ 4
#define THR 0
#define IER 1
#define IIR 2
#define LSR 5
#define IER_THRI 2
#define IIR_NONE 1
#define IIR_THRI 2
#define LSR_EMPTY 0x60

static int kvm, vm, vcpus, vcpu[MAX_VCPUS], events[MAX_EVENTS];
static struct kvm_run *run[MAX_VCPUS];
static long run_size;

static uint8_t enabled, identification = IIR_NONE;

static void pulse(void)
{
	identification = IIR_THRI;
	for (int level = 1; level >= 0; level--) {
		struct kvm_irq_level line = { .irq = SERIAL_IRQ, .level = level };
		CHECK(ioctl(vm, KVM_IRQ_LINE, &line));
	}
}

static void port(uint16_t number, int out, uint8_t *data)
{
	unsigned offset = number - SERIAL;
	if (offset > 7) {
		if (!out)
			*data = 0xff;
		return;
	}
	if (out && offset == THR)
		CHECK(write(1, data, 1));
	if (out && offset == IER)
		enabled = *data;
	if (out && offset <= IER && enabled & IER_THRI)
		pulse();
	if (out)
		return;
	*data = 0;
	if (offset == IER)
		*data = enabled;
	if (offset == LSR)
		*data = LSR_EMPTY;
	if (offset == IIR) {
		*data = identification;
		identification = IIR_NONE;
	}
}

static void *spend(void *index)
{
	long id = (long)index;
	struct kvm_run *state = run[id];
	for (;;) {
		CHECK(ioctl(vcpu[id], KVM_RUN, 0));
		if (state->exit_reason == KVM_EXIT_IO) {
			uint8_t *data = (uint8_t *)state + state->io.data_offset;
			for (uint32_t i = 0; i < state->io.count; i++, data += state->io.size)
				port(state->io.port, state->io.direction == KVM_EXIT_IO_OUT, data);
		} else if (state->exit_reason == KVM_EXIT_MMIO) {
			if (!state->mmio.is_write)
				memset(state->mmio.data, 0xff, state->mmio.len);
		} else {
			fprintf(stderr, "exit %u\n", state->exit_reason);
			exit(1);
		}
	}
}

static void map(struct memory *memory)
{
	int file = CHECK(open(memory->path, O_RDONLY | O_CLOEXEC));
	void *bytes = mmap(NULL, memory->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
	struct kvm_userspace_memory_region region = {
		.slot = memory->slot,
		.guest_phys_addr = memory->address,
		.memory_size = memory->size,
		.userspace_addr = (uintptr_t)bytes,
	};
	CHECK(bytes == MAP_FAILED ? -1 : ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static void take(struct step *step)
{
	int fd = step->target == 0 ? kvm : step->target == 1 ? vm : vcpu[step->target - 2];
	int32_t *event = (int32_t *)(step->data + step->value);
	long result;
	switch (step->kind) {
	case VALUE:
		result = ioctl(fd, step->request, step->value);
		if (step->request == KVM_CREATE_VM)
			vm = CHECK(result);
		if (step->request == KVM_GET_VCPU_MMAP_SIZE)
			run_size = CHECK(result);
		if (step->request == KVM_CREATE_VCPU)
			vcpu[vcpus++] = CHECK(result);
		break;
	case BUFFER:
		/* What is only asked for may be refused. */
		ioctl(fd, step->request, step->data);
		break;
	case MEMORY:
		map((struct memory *)step->data);
		break;
	case COUNTER: {
		/* The guest's counter goes on from where it was: so far is it from this host's. */
		uint64_t offset = step->value - __rdtsc();
		((struct kvm_device_attr *)step->data)->addr = (uintptr_t)&offset;
		CHECK(ioctl(fd, step->request, step->data));
		break;
	}
	case EVENT:
		if (events[*event] == 0)
			events[*event] = CHECK(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
		*event = events[*event];
		CHECK(ioctl(fd, step->request, step->data));
		break;
	}
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	kvm = CHECK(open("/dev/kvm", O_RDWR | O_CLOEXEC));
	char line[2];
	if (fgets(line, sizeof line, stdin) == NULL)
		return 1;
	int file = CHECK(open(argv[1], O_RDONLY | O_CLOEXEC));
	struct stat facts;
	CHECK(fstat(file, &facts));
	uint8_t *script = malloc(facts.st_size);
	for (long at = 0; at < facts.st_size;)
		at += CHECK(read(file, script + at, facts.st_size - at));
	for (long at = 0; at < facts.st_size;) {
		struct step *step = (struct step *)(script + at);
		take(step);
		at += (sizeof *step + step->length + 7) & ~7l;
	}
	for (long id = 0; id < vcpus; id++) {
		pthread_t thread;
		run[id] = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu[id], 0);
		CHECK(run[id] == MAP_FAILED ? -1 : 0);
		if (pthread_create(&thread, NULL, spend, (void *)id) != 0)
			return 1;
	}
	pause();
}
