/*
 * From the PVH entry (32-bit, paging off) to the 64-bit C code in the upper half of the address space, with CR4.PCIDE set
 * where the processor has it: a nested KVM of the PVM kind runs only such code on the processor, and emulates all other.
 * No interrupt or exception is ever taken.
 */
#define BASE 0xffffffff80000000
#define PHYS(symbol) (symbol - BASE)

#define PRESENT_WRITABLE 0x3
#define LARGE 0x83
#define LARGE_PAGE 0x200000
#define TABLE_ENTRIES 512

#define CR0_PAGING 0x80000000
#define CR4_PAE 0x20
#define CR4_PCIDE 0x20000
#define MSR_EFER 0xc0000080
#define EFER_LONG_MODE 0x100
#define CPUID_PCID 17

#define STACK_SIZE 0x4000

	/* XEN_ELFNOTE_PHYS32_ENTRY */
	.section .note.xen, "a", @note
	.align 4
	.long 4, 8, 18
	.asciz "Xen"
	.quad PHYS(start)

	.text
	.code32
	.globl start
start:
	cli
	cld
	/* The first GiB, one to one and at BASE; the window of device memory above that is filled on demand. */
	movl $(PHYS(low_directory) + PRESENT_WRITABLE), PHYS(low_pointers)
	movl $(PHYS(low_directory) + PRESENT_WRITABLE), PHYS(high_pointers) + 510 * 8
	movl $(PHYS(window_directory) + PRESENT_WRITABLE), PHYS(high_pointers) + 511 * 8
	movl $(PHYS(low_pointers) + PRESENT_WRITABLE), PHYS(root)
	movl $(PHYS(high_pointers) + PRESENT_WRITABLE), PHYS(root) + 511 * 8
	movl $PHYS(low_directory), %edi
	movl $LARGE, %eax
	movl $TABLE_ENTRIES, %ecx
1:	movl %eax, (%edi)
	addl $LARGE_PAGE, %eax
	addl $8, %edi
	decl %ecx
	jnz 1b

	movl $CR4_PAE, %eax
	movl %eax, %cr4
	movl $PHYS(root), %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	rdmsr
	orl $EFER_LONG_MODE, %eax
	wrmsr
	movl %cr0, %eax
	orl $CR0_PAGING, %eax
	movl %eax, %cr0
	lgdt PHYS(gdt_pointer)
	ljmp $8, $PHYS(start64)

	.code64
start64:
	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movq $upper, %rax
	jmp *%rax
upper:
	movq $(stack + STACK_SIZE), %rsp
	lgdt gdt_pointer_high
	movl $1, %eax
	cpuid
	btl $CPUID_PCID, %ecx
	jnc 1f
	movq %cr4, %rax
	orq $CR4_PCIDE, %rax
	movq %rax, %cr4
1:	xorl %ebp, %ebp
	call guest
2:	hlt
	jmp 2b

	.data
	.align 8
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.word . - gdt - 1
	.long PHYS(gdt)
gdt_pointer_high:
	.word gdt_pointer - gdt - 1
	.quad gdt

	.bss
	.align 4096
	.globl window_directory
root:	.skip 4096
low_pointers: .skip 4096
high_pointers: .skip 4096
low_directory: .skip 4096
window_directory: .skip 4096
stack:	.skip STACK_SIZE

	.section .note.GNU-stack, "", @progbits
