/*
 * Loads a kernel for kexec_file_load(2) in a guest, so that it need not have kexec-tools:
 *
 *   kexec-load crash|next KERNEL INITRAMFS CMDLINE
 *   kexec-load start
 *
 * "crash" is what runs after a panic, in memory that crashkernel= has kept for it; "next" is what "start" starts.
 */
#include <fcntl.h>
#include <linux/kexec.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "start") == 0) {
		reboot(RB_KEXEC);
		perror("kexec-load");
		return 1;
	}
	if (argc != 5) {
		fprintf(stderr, "usage: kexec-load crash|next KERNEL INITRAMFS CMDLINE | start\n");
		return 2;
	}
	long flags = strcmp(argv[1], "crash") == 0 ? KEXEC_FILE_ON_CRASH : 0;
	int kernel = open(argv[2], O_RDONLY), initramfs = open(argv[3], O_RDONLY);

	if (kernel < 0 || initramfs < 0 ||
	    syscall(SYS_kexec_file_load, kernel, initramfs, strlen(argv[4]) + 1, argv[4], flags) < 0) {
		perror("kexec-load");
		return 1;
	}
	return 0;
}
