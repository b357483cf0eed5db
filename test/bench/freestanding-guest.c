/*
 * The guest of `npm run bench -- freestanding`: measures exits, and round trips of a virtio block device, in cycles of the
 * time stamp counter. No kernel is needed, nor interrupts. Every byte that it writes to the disk it reads back and compares.
 *
 * Prints on COM1, one a line: `RESULT name cycles-per-operation`, `NODISK` where no disk is there, `ERROR text`, and `DONE`
 * at the end; then powers the machine off.
 */
#include <stdint.h>

#define BASE 0xffffffff80000000ull
#define WINDOW 0xffffffffc0000000ull
#define LARGE_PAGE 0x200000ull
#define WINDOW_PAGES 512

#define EXITS 20000
#define WARM_UP 200
#define SECTOR 512
#define BLOCK 4096
#define SECTORS 4096 /* the part of the disk that is used */
#define REQUESTS 4096
#define WARM_UP_REQUESTS (2 * REQUESTS) /* so that nothing is still being compiled */
#define CHAIN 3 /* descriptors of a request: header, data, status */
#define MAX_DEPTH 32
#define QUEUE 128

static inline void out8(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t value;
	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline void out32(uint16_t port, uint32_t value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint32_t in32(uint16_t port)
{
	uint32_t value;
	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline uint64_t cycles(void)
{
	uint32_t low, high;
	asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/* ---- Output ---- */

#define COM1 0x3f8

static void put(const char *text)
{
	for (; *text; text++) {
		while (!(in8(COM1 + 5) & 0x20))
			;
		out8(COM1, *text);
	}
}

static void put_number(uint64_t value)
{
	char digits[21];
	char *at = digits + 20;
	*at = 0;
	do
		*--at = '0' + value % 10;
	while (value /= 10);
	put(at);
}

static void result(const char *name, uint64_t total, uint32_t operations)
{
	put("RESULT ");
	put(name);
	put(" ");
	put_number(total / operations);
	put("\n");
}

static _Noreturn void power_off(void)
{
	out8(0x600, 5 << 2 | 1 << 5); /* ACPI sleep control: S5 */
	/* Elsewhere a reset ends the run. */
	out8(0xcf9, 0x02);
	out8(0xcf9, 0x06);
	out8(0x64, 0xfe);
	for (;;)
		asm volatile("cli; hlt");
}

static _Noreturn void fail(const char *what)
{
	put("ERROR ");
	put(what);
	put("\n");
	power_off();
}

/* ---- Device memory ---- */

extern volatile uint64_t window_directory[WINDOW_PAGES];
static uint32_t window_used;

/* @return where `length` bytes of device memory at a guest physical address can be accessed */
static volatile uint8_t *map(uint64_t address, uint64_t length)
{
	uint64_t offset = address % LARGE_PAGE;
	uint64_t at = WINDOW + window_used * LARGE_PAGE + offset;
	for (uint64_t page = address - offset; page < address + length; page += LARGE_PAGE) {
		if (window_used == WINDOW_PAGES)
			fail("the window of device memory is full");
		window_directory[window_used++] = page | 0x9b; /* present, writable, uncached, large */
	}
	return (volatile uint8_t *)at;
}

/* ---- PCI ---- */

#define PCI_COMMAND 0x04
#define PCI_STATUS_CAPABILITIES (1u << 20)
#define PCI_MEMORY_AND_MASTER 0x6
#define PCI_BAR0 0x10
#define PCI_CAPABILITIES 0x34
#define PCI_VENDOR_CAPABILITY 0x09
#define VIRTIO_BLK 0x10421af4u

/* Where a BAR goes that nobody assigned: below the IOAPIC, where no machine has anything else. */
static uint32_t next_bar = 0xe0000000;

static uint32_t pci_read(uint32_t slot, uint32_t offset)
{
	out32(0xcf8, 0x80000000u | slot << 11 | (offset & 0xfc));
	return in32(0xcfc);
}

static void pci_write(uint32_t slot, uint32_t offset, uint32_t value)
{
	out32(0xcf8, 0x80000000u | slot << 11 | (offset & 0xfc));
	out32(0xcfc, value);
}

/* @return the address of a memory BAR, which is assigned if nobody has yet; 0 where there is none */
static uint64_t pci_bar(uint32_t slot, uint32_t index)
{
	uint32_t offset = PCI_BAR0 + 4 * index;
	uint32_t low = pci_read(slot, offset);
	int wide = (low & 0x7) == 0x4;
	uint64_t address = (low & ~0xfu) | (wide ? (uint64_t)pci_read(slot, offset + 4) << 32 : 0);
	if (low & 1)
		return 0;
	if (address)
		return address;
	pci_write(slot, offset, 0xffffffff);
	uint32_t size = ~(pci_read(slot, offset) & ~0xfu) + 1;
	if (!size)
		return 0;
	next_bar = (next_bar + size - 1) & ~(size - 1);
	pci_write(slot, offset, next_bar);
	if (wide)
		pci_write(slot, offset + 4, 0);
	next_bar += size;
	return next_bar - size;
}

/* ---- The virtio block device ---- */

#define FEATURE_FLUSH (1u << 9)	   /* without it every write would be a synchronous one */
#define FEATURE_VERSION_1 (1u << 0) /* of the upper word */
#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define DESCRIPTOR_NEXT 1
#define DESCRIPTOR_WRITE 2
#define NO_INTERRUPT 1
#define NO_NOTIFY 1
#define NO_VECTOR 0xffff
#define REQUEST_READ 0
#define REQUEST_WRITE 1

struct common {
	uint32_t device_feature_select, device_feature, driver_feature_select, driver_feature;
	uint16_t config_vector, num_queues;
	uint8_t status, generation;
	uint16_t queue_select, queue_size, queue_vector, queue_enable, queue_notify_offset;
	uint32_t queue_descriptors[2], queue_driver[2], queue_device[2];
};

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags, next;
};

struct header {
	uint32_t type, reserved;
	uint64_t sector;
};

static struct descriptor descriptors[QUEUE] __attribute__((aligned(4096)));
static struct {
	uint16_t flags, index, ring[QUEUE];
} available __attribute__((aligned(4096)));
static volatile struct {
	uint16_t flags, index;
	struct {
		uint32_t id, length;
	} ring[QUEUE];
} used __attribute__((aligned(4096)));
/* By the first descriptor of the request. */
static struct header headers[CHAIN * MAX_DEPTH];
static volatile uint8_t statuses[CHAIN * MAX_DEPTH];
static uint64_t written[SECTORS][SECTOR / 8] __attribute__((aligned(4096)));
static uint64_t read[SECTORS][SECTOR / 8] __attribute__((aligned(4096)));

static volatile struct common *common;
static volatile uint16_t *notify;
static volatile uint64_t *capacity;
static uint16_t taken;

static uint64_t physical(const volatile void *pointer)
{
	return (uint64_t)pointer - BASE;
}

static int find_disk(uint32_t *slot)
{
	for (*slot = 0; *slot < 32; ++*slot)
		if (pci_read(*slot, 0) == VIRTIO_BLK)
			return 1;
	return 0;
}

static void set_address(volatile uint32_t *pair, const volatile void *pointer)
{
	pair[0] = (uint32_t)physical(pointer);
	pair[1] = 0;
}

static void start_disk(uint32_t slot)
{
	volatile uint8_t *notify_area = 0;
	uint32_t multiplier = 0;
	uint32_t state = pci_read(slot, PCI_COMMAND);
	if (!(state & PCI_STATUS_CAPABILITIES))
		fail("the disk has no capabilities");
	for (uint32_t at = pci_read(slot, PCI_CAPABILITIES) & 0xfc; at; ) {
		uint32_t head = pci_read(slot, at);
		uint32_t kind = head >> 24;
		if ((head & 0xff) == PCI_VENDOR_CAPABILITY && (kind == 1 || kind == 2 || kind == 4)) {
			uint64_t bar = pci_bar(slot, pci_read(slot, at + 4) & 0xff);
			if (!bar)
				fail("a structure of the disk is in no memory BAR");
			volatile uint8_t *area = map(bar + pci_read(slot, at + 8), pci_read(slot, at + 12));
			if (kind == 1)
				common = (volatile struct common *)area;
			else if (kind == 4)
				capacity = (volatile uint64_t *)area;
			else {
				notify_area = area;
				multiplier = pci_read(slot, at + 16);
			}
		}
		at = head >> 8 & 0xfc;
	}
	if (!common || !notify_area || !capacity)
		fail("a structure of the disk is missing");
	pci_write(slot, PCI_COMMAND, (state & 0xffff) | PCI_MEMORY_AND_MASTER);

	common->status = 0;
	while (common->status)
		;
	common->status = STATUS_ACKNOWLEDGE;
	common->status = STATUS_ACKNOWLEDGE | STATUS_DRIVER;
	common->device_feature_select = 0;
	uint32_t flush = common->device_feature & FEATURE_FLUSH;
	common->device_feature_select = 1;
	if (!(common->device_feature & FEATURE_VERSION_1))
		fail("the disk is none of virtio 1");
	common->driver_feature_select = 0;
	common->driver_feature = flush;
	common->driver_feature_select = 1;
	common->driver_feature = FEATURE_VERSION_1;
	common->status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
	if (!(common->status & STATUS_FEATURES_OK))
		fail("the disk refuses the features");
	if (*capacity < SECTORS)
		fail("the disk is too small");

	common->config_vector = NO_VECTOR;
	common->queue_select = 0;
	if (common->queue_size < QUEUE)
		fail("the queue of the disk is too short");
	common->queue_size = QUEUE;
	common->queue_vector = NO_VECTOR;
	set_address(common->queue_descriptors, descriptors);
	set_address(common->queue_driver, &available);
	set_address(common->queue_device, &used);
	available.flags = NO_INTERRUPT;
	notify = (volatile uint16_t *)(notify_area + (uint64_t)common->queue_notify_offset * multiplier);
	common->queue_enable = 1;
	common->status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;
}

static void kick(void)
{
	__sync_synchronize();
	if (!(used.flags & NO_NOTIFY))
		*notify = 0;
}

/* Appends the request whose first descriptor is given. */
static inline void submit(uint32_t first)
{
	available.ring[available.index % QUEUE] = first;
	__atomic_store_n(&available.index, available.index + 1, __ATOMIC_RELEASE);
}

/*
 * Sends requests to one block after the other, `depth` of them in flight. Little is done for each: where a KVM emulates the
 * guest, its every instruction is slow.
 *
 * @return the cycles that it took
 */
static uint64_t transfer(uint32_t type, uint32_t requests, uint32_t depth)
{
	uint64_t area = physical(type == REQUEST_WRITE ? written : read);
	uint16_t direction = type == REQUEST_WRITE ? 0 : DESCRIPTOR_WRITE;
	for (uint32_t tag = 0; tag < depth; tag++) {
		struct descriptor *chain = descriptors + CHAIN * tag;
		uint16_t first = CHAIN * tag;
		headers[first].type = type;
		statuses[first] = 0xff;
		chain[0] = (struct descriptor){ physical(&headers[first]), sizeof(struct header), DESCRIPTOR_NEXT, first + 1 };
		chain[1] = (struct descriptor){ 0, BLOCK, DESCRIPTOR_NEXT | direction, first + 2 };
		chain[2] = (struct descriptor){ physical(&statuses[first]), 1, DESCRIPTOR_WRITE, 0 };
	}

	uint32_t sector = 0, sent = 0, done = 0;
	uint8_t problems = 0;
	uint64_t start = cycles();
	for (; sent < depth; sent++) {
		headers[CHAIN * sent].sector = sector;
		descriptors[CHAIN * sent + 1].address = area + sector * SECTOR;
		sector += BLOCK / SECTOR;
		submit(CHAIN * sent);
	}
	kick();
	while (done < requests) {
		uint16_t until = __atomic_load_n(&used.index, __ATOMIC_ACQUIRE);
		uint32_t before = sent;
		if (until == taken) {
			asm volatile("pause");
			continue;
		}
		for (; taken != until; taken++, done++) {
			uint32_t first = used.ring[taken % QUEUE].id;
			if (first >= CHAIN * depth)
				fail("the disk completes what it was not asked for");
			problems |= statuses[first];
			if (sent == requests)
				continue;
			headers[first].sector = sector;
			descriptors[first + 1].address = area + sector * SECTOR;
			sector = (sector + BLOCK / SECTOR) % SECTORS;
			submit(first);
			sent++;
		}
		if (sent != before)
			kick();
	}
	start = cycles() - start;
	if (problems)
		fail("a request of the disk failed");
	return start;
}

/* ---- Contents: in each sector one word over and over ---- */

static uint64_t seed;

static uint64_t word_of(uint32_t sector)
{
	return seed + sector * 0x9e3779b97f4a7c15ull;
}

static void fill(uint64_t *at, uint64_t word, uint64_t words)
{
	asm volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(word) : "memory");
}

static void check(uint32_t sectors)
{
	for (uint32_t sector = 0; sector < sectors; sector++) {
		const uint64_t *at = read[sector];
		uint64_t words = SECTOR / 8;
		int same;
		asm volatile("repe scasq" : "+D"(at), "+c"(words), "=@ccz"(same) : "a"(word_of(sector)) : "memory");
		if (!same)
			fail("what the disk returns is not what was written");
	}
}

/* ---- What is measured ---- */

static void measure_writes(const char *name, uint32_t warm_up)
{
	/* so that what an earlier transfer or run has written does not pass */
	seed = cycles();
	for (uint32_t sector = 0; sector < SECTORS; sector++)
		fill(written[sector], word_of(sector), SECTOR / 8);
	transfer(REQUEST_WRITE, warm_up, 1);
	result(name, transfer(REQUEST_WRITE, REQUESTS, 1), REQUESTS);
}

static void measure_reads(const char *name, uint32_t warm_up, uint32_t depth)
{
	fill(read[0], 0, sizeof(read) / 8); /* also brings the pages in */
	transfer(REQUEST_READ, warm_up, depth);
	result(name, transfer(REQUEST_READ, REQUESTS, depth), REQUESTS);
	check(SECTORS);
}

static void measure_disk(void)
{
	uint64_t start;
	for (uint32_t n = 0; n < WARM_UP; n++)
		(void)common->num_queues;
	start = cycles();
	for (uint32_t n = 0; n < EXITS; n++)
		(void)common->num_queues;
	result("mmio-read", cycles() - start, EXITS);

	for (uint32_t n = 0; n < WARM_UP; n++)
		*notify = 0;
	start = cycles();
	for (uint32_t n = 0; n < EXITS; n++)
		*notify = 0;
	result("notify", cycles() - start, EXITS);

	measure_writes("first-write-1", WARM_UP);
	measure_reads("first-read-1", WARM_UP, 1);
	measure_reads("first-read-32", WARM_UP, MAX_DEPTH);
	measure_writes("write-1", WARM_UP_REQUESTS);
	measure_reads("read-1", WARM_UP_REQUESTS, 1);
	measure_reads("read-32", WARM_UP_REQUESTS, MAX_DEPTH);
}

static void measure_ports(void)
{
	uint64_t start;
	for (uint32_t n = 0; n < WARM_UP; n++)
		out8(0x80, 0);
	start = cycles();
	for (uint32_t n = 0; n < EXITS; n++)
		out8(0x80, 0);
	result("port-write", cycles() - start, EXITS);

	out8(0x70, 0x0f); /* a byte of plain memory */
	for (uint32_t n = 0; n < WARM_UP; n++)
		in8(0x71);
	start = cycles();
	for (uint32_t n = 0; n < EXITS; n++)
		in8(0x71);
	result("port-read", cycles() - start, EXITS);
}

/* Plain code: a figure of hundreds and more tells that the KVM emulates it. */
static void measure_code(void)
{
	uint64_t start = cycles();
	for (uint32_t n = 0; n < EXITS; n++)
		asm volatile("" : "+r"(n));
	result("loop", cycles() - start, EXITS);
}

_Noreturn void guest(void)
{
	uint32_t slot;
	measure_code();
	measure_ports();
	if (find_disk(&slot)) {
		start_disk(slot);
		measure_disk();
	} else
		put("NODISK\n");
	put("DONE\n");
	power_off();
}
