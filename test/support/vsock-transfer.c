/*
 * Moves bytes between a guest and its host over vsock, both ways, and tells a checksum of what it sent and received.
 *
 *   vsock-transfer BYTES           in the guest: receives on port 5000, then sends to port 6000 of the host
 *   vsock-transfer BYTES SOCKET    on the host: the other end, through the Unix sockets SOCKET and SOCKET_6000
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
/* Needs the one before it, but does not include it. */
#include <linux/vm_sockets.h>
#include <sys/un.h>
#include <unistd.h>

enum { BLOCK = 1 << 18, LISTEN_PORT = 5000, CONNECT_PORT = 6000 };

static uint64_t block[BLOCK / 8];

static int check(int result, const char *what)
{
	if (result >= 0)
		return result;
	perror(what);
	exit(1);
}

/* A word at a time: under emulation a real hash would be the slowest part by far. */
static uint64_t add(uint64_t sum, const uint64_t *words, size_t count)
{
	for (size_t i = 0; i < count; i++)
		sum = (sum ^ words[i]) * 0x100000001b3 + (sum >> 29);
	return sum;
}

static uint64_t send_all(int fd, uint64_t bytes, uint64_t seed)
{
	uint64_t sum = 0;

	for (uint64_t done = 0; done < bytes; done += BLOCK) {
		for (size_t i = 0; i < BLOCK / 8; i++)
			block[i] = seed += 0x9e3779b97f4a7c15;
		sum = add(sum, block, BLOCK / 8);
		for (size_t at = 0; at < BLOCK;)
			at += check(write(fd, (char *)block + at, BLOCK - at), "write");
	}
	check(shutdown(fd, SHUT_WR), "shutdown");
	return sum;
}

static uint64_t receive_all(int fd, uint64_t *bytes)
{
	uint64_t sum = 0;
	size_t at = 0;

	for (*bytes = 0;; *bytes += at, at = 0) {
		while (at < BLOCK) {
			int got = check(read(fd, (char *)block + at, BLOCK - at), "read");

			if (got == 0)
				break;
			at += got;
		}
		sum = add(sum, block, at / 8);
		if (at < BLOCK) {
			*bytes += at;
			return sum;
		}
	}
}

static int unix_socket(const char *path, int listens)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = check(socket(AF_UNIX, SOCK_STREAM, 0), "socket");

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	if (listens) {
		unlink(path);
		check(bind(fd, (struct sockaddr *)&address, sizeof(address)), "bind");
		check(listen(fd, 1), "listen");
	} else {
		check(connect(fd, (struct sockaddr *)&address, sizeof(address)), "connect");
	}
	return fd;
}

static void host(uint64_t bytes, const char *path)
{
	char other[128], answer[64] = "";
	uint64_t received;

	snprintf(other, sizeof(other), "%s_%d", path, CONNECT_PORT);
	int listener = unix_socket(other, 1);
	int fd = unix_socket(path, 0);

	dprintf(fd, "CONNECT %d\n", LISTEN_PORT);
	for (size_t at = 0; at < sizeof(answer) - 1; at++) {
		if (check(read(fd, answer + at, 1), "read") == 0 || answer[at] == '\n')
			break;
	}
	if (strncmp(answer, "OK ", 3) != 0) {
		fprintf(stderr, "answered: %s\n", answer);
		exit(1);
	}
	printf("sent %016lx\n", send_all(fd, bytes, 1));
	int from = check(accept(listener, NULL, NULL), "accept");
	uint64_t sum = receive_all(from, &received);

	printf("received %lu %016lx\n", received, sum);
	unlink(other);
}

static void guest(uint64_t bytes)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_port = LISTEN_PORT, .svm_cid = VMADDR_CID_ANY };
	int listener = check(socket(AF_VSOCK, SOCK_STREAM, 0), "socket");
	uint64_t received;

	check(bind(listener, (struct sockaddr *)&address, sizeof(address)), "bind");
	check(listen(listener, 1), "listen");
	printf("guest-ready\n");
	fflush(stdout);
	int fd = check(accept(listener, NULL, NULL), "accept");
	uint64_t sum = receive_all(fd, &received);

	close(fd);
	printf("guest received %lu %016lx\n", received, sum);
	fflush(stdout);
	address.svm_cid = VMADDR_CID_HOST;
	address.svm_port = CONNECT_PORT;
	fd = check(socket(AF_VSOCK, SOCK_STREAM, 0), "socket");
	check(connect(fd, (struct sockaddr *)&address, sizeof(address)), "connect");
	printf("guest sent %016lx\n", send_all(fd, bytes, 2));
	fflush(stdout);
	/* The host closes when it has everything. */
	check(read(fd, block, 1), "read");
}

int main(int argc, char **argv)
{
	if (argc == 2)
		guest(strtoull(argv[1], NULL, 0));
	else if (argc == 3)
		host(strtoull(argv[1], NULL, 0), argv[2]);
	else
		return 2;
	return 0;
}
