/*
 * vsock-many COUNT, in a guest: takes that many connections to port 7000, all open at once, and only then answers: to each of
 * them the line that it sends.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
/* Needs the one before it, but does not include it. */
#include <linux/vm_sockets.h>
#include <unistd.h>

static int check(int result, const char *what)
{
	if (result >= 0)
		return result;
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	int count = argc == 2 ? atoi(argv[1]) : 0;
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 7000 };
	int server = check(socket(AF_VSOCK, SOCK_STREAM, 0), "socket");
	int *peers = calloc(count, sizeof(int));
	char line[64];

	check(bind(server, (struct sockaddr *)&address, sizeof(address)), "bind");
	check(listen(server, count), "listen");
	puts("listening");
	fflush(stdout);
	for (int i = 0; i < count; i++)
		peers[i] = check(accept(server, NULL, NULL), "accept");
	printf("open: %d\n", count);
	for (int i = 0; i < count; i++) {
		int length = check(read(peers[i], line, sizeof(line)), "read");
		check(write(peers[i], line, length), "write");
	}
	for (int i = 0; i < count; i++) {
		/* The end of it, once its answer has been read. */
		check(read(peers[i], line, sizeof(line)), "read");
		close(peers[i]);
	}
	puts("closed");
	return 0;
}
