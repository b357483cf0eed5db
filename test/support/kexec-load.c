/*
 * Loads a kernel for kexec in a guest, so that it need not have kexec-tools:
 *
 *   kexec-load crash|next KERNEL INITRAMFS CMDLINE
 *   kexec-load start
 *
 * "crash" is what runs after a panic, in memory that crashkernel= has kept for it; "next" is what "start" starts.
 *
 * On x86_64 the running kernel does it, by kexec_file_load(2). Debian's arm64 kernels do not have that, but kexec_load(2), where the
 * caller says what lies where: there this program is what kexec-tools would be. The next kernel's devicetree is the running one's
 * with another initramfs and another command line, which may not be longer.
 */
#include <fcntl.h>
#include <linux/kexec.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

#ifdef __aarch64__

#include <endian.h>

#define PAGE 4096
#define MIB (1UL << 20)
/* From the start of RAM on, which is below what a guest of 512 MiB has: kernel, initramfs, devicetree, code. */
#define KERNEL_AT (128 * MIB)
#define INITRAMFS_AT (256 * MIB)
#define FDT_AT (384 * MIB)
#define CODE_AT (385 * MIB)

enum { FDT_BEGIN_NODE = 1, FDT_END_NODE, FDT_PROP, FDT_NOP };

/* It has the kernel entered with the devicetree in x0: ldr x0, [.+24]; ldr x4, [.+28]; x1 to x3 are zero; br x4. */
struct code {
	uint32_t instructions[6];
	uint64_t fdt, kernel;
};

static void *read_all(const char *name, size_t *size)
{
	int file = open(name, O_RDONLY);
	struct stat stat;
	size_t done = 0;
	ssize_t count;

	if (file < 0 || fstat(file, &stat) < 0)
		fail(name);
	char *bytes = malloc(stat.st_size);

	while (bytes && (count = read(file, bytes + done, stat.st_size - done)) > 0)
		done += count;
	if (!bytes || done != (size_t)stat.st_size)
		fail(name);
	close(file);
	*size = done;
	return bytes;
}

static uint64_t ram_start(void)
{
	FILE *file = fopen("/proc/iomem", "r");
	char line[256];
	unsigned long start;

	while (file && fgets(line, sizeof line, file))
		if (strstr(line, ": System RAM") && sscanf(line, "%lx", &start) == 1)
			return start;
	fail("/proc/iomem");
	return 0;
}

/* A number of one cell or of two. */
static void set_number(char *value, uint32_t length, uint64_t number)
{
	uint32_t one = htobe32(number);
	uint64_t two = htobe64(number);

	memcpy(value, length == 8 ? (void *)&two : (void *)&one, length);
}

/* Changes properties of /chosen where they lie. */
static void change_fdt(char *fdt, uint64_t start, uint64_t end, const char *cmdline)
{
	const uint32_t *header = (const uint32_t *)fdt;
	uint32_t *at = (uint32_t *)(fdt + be32toh(header[2]));
	const uint32_t *last = at + be32toh(header[9]) / 4;
	const char *strings = fdt + be32toh(header[3]);
	int changed = 0;

	while (at < last) {
		uint32_t token = be32toh(*at++);

		if (token == FDT_BEGIN_NODE)
			at += strlen((char *)at) / 4 + 1;
		if (token != FDT_PROP)
			continue;
		uint32_t length = be32toh(at[0]);
		const char *name = strings + be32toh(at[1]);
		char *value = (char *)(at + 2);

		at += 2 + (length + 3) / 4;
		if (strcmp(name, "linux,initrd-start") == 0)
			set_number(value, length, start);
		else if (strcmp(name, "linux,initrd-end") == 0)
			set_number(value, length, end);
		else if (strcmp(name, "bootargs") == 0 && strlen(cmdline) < length)
			strncpy(value, cmdline, length);
		else
			continue;
		changed++;
	}
	if (changed != 3) {
		fprintf(stderr, "kexec-load: the devicetree has no place for an initramfs or the command line\n");
		exit(1);
	}
}

static void load(int crash, const char *kernel_name, const char *initramfs_name, const char *cmdline)
{
	size_t kernel_size, initramfs_size, fdt_size;
	char *kernel = read_all(kernel_name, &kernel_size);
	char *initramfs = read_all(initramfs_name, &initramfs_size);
	char *fdt = read_all("/sys/firmware/fdt", &fdt_size);
	uint64_t ram = ram_start(), text_offset, image_size;

	if (crash) {
		fprintf(stderr, "kexec-load: on this architecture there is no place for what runs after a panic\n");
		exit(1);
	}
	/* The header of an Image: Documentation/arm64/booting.rst. */
	memcpy(&text_offset, kernel + 8, 8);
	memcpy(&image_size, kernel + 16, 8);
	uint64_t entry = ram + KERNEL_AT + text_offset, at = ram + INITRAMFS_AT;

	change_fdt(fdt, at, at + initramfs_size, cmdline);
	struct code code = {
		{ 0x580000c0, 0x580000e4, 0xaa1f03e1, 0xaa1f03e2, 0xaa1f03e3, 0xd61f0080 },
		ram + FDT_AT,
		entry,
	};
#define PAGES(bytes) (((bytes) + PAGE - 1) / PAGE * PAGE)
	struct kexec_segment segments[] = {
		{ kernel, kernel_size, (void *)entry, PAGES(image_size) },
		{ initramfs, initramfs_size, (void *)at, PAGES(initramfs_size) },
		{ fdt, fdt_size, (void *)(ram + FDT_AT), PAGES(fdt_size) },
		{ &code, sizeof code, (void *)(ram + CODE_AT), PAGE },
	};

	if (syscall(SYS_kexec_load, ram + CODE_AT, 4, segments, KEXEC_ARCH_AARCH64) < 0)
		fail("kexec_load");
}

#else

static void load(int crash, const char *kernel_name, const char *initramfs_name, const char *cmdline)
{
	int kernel = open(kernel_name, O_RDONLY), initramfs = open(initramfs_name, O_RDONLY);

	if (kernel < 0 || initramfs < 0 ||
	    syscall(SYS_kexec_file_load, kernel, initramfs, strlen(cmdline) + 1, cmdline,
		    crash ? KEXEC_FILE_ON_CRASH : 0) < 0)
		fail("kexec_file_load");
}

#endif

int main(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "start") == 0) {
		reboot(RB_KEXEC);
		fail("kexec-load");
	}
	if (argc != 5) {
		fprintf(stderr, "usage: kexec-load crash|next KERNEL INITRAMFS CMDLINE | start\n");
		return 2;
	}
	load(strcmp(argv[1], "crash") == 0, argv[2], argv[3], argv[4]);
	return 0;
}
