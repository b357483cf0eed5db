/*
 * What runs in the guest of `npm run bench -- restore` and `-- migrate`: it holds so many MiB that are not zeros, and does what it
 * is told, line by line:
 *
 *   ?    answers, by a line
 *   tN   prints a number each N milliseconds, one more each time; 0: no more
 *   lN   writes to N MiB of pages a second, in the first WORKING_SET of them
 *
 * usage: memory-guest MIB
 */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORKING_SET (64 << 20)
/* Milliseconds from one write to the next. */
#define LOAD_PERIOD 10

static char *memory;
static size_t size, at;
static long tick, load, number;

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static void obey(const char *line)
{
	if (*line == '?')
		printf("@@answer\n");
	else if (*line == 't')
		tick = atol(line + 1);
	else if (*line == 'l')
		load = atol(line + 1);
}

/* Whatever has come. */
static void hear(void)
{
	static char line[32];
	static size_t length;
	char bytes[64];
	ssize_t count = read(0, bytes, sizeof bytes);
	if (count <= 0)
		exit(1);
	for (ssize_t i = 0; i < count; i++) {
		if (bytes[i] == '\n') {
			line[length] = 0;
			obey(line);
			length = 0;
		} else if (length < sizeof line - 1) {
			line[length++] = bytes[i];
		}
	}
}

static void dirty(double milliseconds)
{
	size_t set = size < WORKING_SET ? size : WORKING_SET;
	/* What was missed while the machine stood still stays undone. */
	double within = milliseconds < 10 * LOAD_PERIOD ? milliseconds : LOAD_PERIOD;
	for (long left = load * 1.048576 * 1000 / PAGE * within; left > 0; left--) {
		(*(uint64_t *)(memory + at))++;
		at = (at + PAGE) % set;
	}
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	size = atol(argv[1]) << 20;
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	for (size_t word = 0; word < size / 8; word++)
		((uint64_t *)memory)[word] = word * 0x9e3779b97f4a7c15;
	printf("@@READY\n");
	double ticked = now(), written = ticked;
	for (;;) {
		struct pollfd input = { .fd = 0, .events = POLLIN };
		long period = load > 0 && (tick == 0 || tick > LOAD_PERIOD) ? LOAD_PERIOD : tick;
		if (poll(&input, 1, period > 0 ? period : -1) > 0)
			hear();
		double time = now();
		if (load > 0)
			dirty(time - written);
		written = time;
		if (tick > 0 && time - ticked >= tick * 0.9) {
			printf("@@%ld\n", number++);
			ticked = time;
		}
	}
}
