/* Runs a generated network on a PC without an operating system: started by a multiboot loader in 32-bit mode, it turns on
 * 64-bit mode and AVX-512, reads COUNT images from the loader's first module, and writes the results' bytes to the first
 * serial line. Compile with -DNAME=... -DINPUT=... -DOUTPUT=... -DWORKSPACE=... */
#include <stddef.h>
#include <stdint.h>

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

void PASTE(NAME, _run)(const float *input, float *output, void *workspace);

__asm__("  .section .multiboot, \"a\"\n"
        "  .align 4\n"
        "  .long 0x1badb002, 1, -0x1badb003\n" /* modules on pages */
        "  .bss\n"
        "  .align 4096\n"
        "top: .skip 4096\n"
        "upper: .skip 4096\n"
        "pages: .skip 4 * 4096\n"
        "  .skip 1 << 20\n"
        "stack:\n"
        "  .data\n"
        "  .align 8\n"
        "segments: .quad 0, 0x00209a0000000000, 0x0000920000000000\n"
        "table: .word 23\n"
        "  .long segments\n"
        "  .text\n"
        "  .code32\n"
        "  .globl start\n"
        "start:\n"
        "  cli\n"
        "  mov $stack, %esp\n"
        "  mov %ebx, %edi\n" /* what the loader tells */
        "  xor %ecx, %ecx\n" /* 4 GiB in pages of 2 MiB, where they are */
        "1: mov %ecx, %edx\n"
        "  shl $21, %edx\n"
        "  or $0x83, %edx\n"
        "  mov %edx, pages(, %ecx, 8)\n"
        "  inc %ecx\n"
        "  cmp $2048, %ecx\n"
        "  jne 1b\n"
        "  movl $pages + 0x0003, upper\n"
        "  movl $pages + 0x1003, upper + 8\n"
        "  movl $pages + 0x2003, upper + 16\n"
        "  movl $pages + 0x3003, upper + 24\n"
        "  movl $upper + 3, top\n"
        "  mov $top, %eax\n"
        "  mov %eax, %cr3\n"
        "  mov %cr4, %eax\n"
        "  or $0x40620, %eax\n" /* PAE, OSFXSR, OSXMMEXCPT, OSXSAVE */
        "  mov %eax, %cr4\n"
        "  mov $0xc0000080, %ecx\n"
        "  rdmsr\n"
        "  or $0x100, %eax\n" /* long mode */
        "  wrmsr\n"
        "  mov %cr0, %eax\n"
        "  and $0xfffffff3, %eax\n" /* no emulation, no task switch */
        "  or $0x80000002, %eax\n"  /* paging */
        "  mov %eax, %cr0\n"
        "  lgdt table\n"
        "  ljmp $8, $wide\n"
        "  .code64\n"
        "wide:\n"
        "  mov $16, %eax\n"
        "  mov %eax, %ss\n"
        "  mov %eax, %ds\n"
        "  mov %eax, %es\n"
        "  xor %ecx, %ecx\n"
        "  xor %edx, %edx\n"
        "  mov $0xe7, %eax\n" /* x87, SSE, AVX, AVX-512 */
        "  xsetbv\n"
        "  call work\n"
        "2: hlt\n"
        "  jmp 2b\n");

void *memset(void *to, int value, size_t n)
{
    void *at = to;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t n)
{
    void *at = to;
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n) : : "memory");
    return to;
}

static void out(uint16_t port, unsigned char byte)
{
    __asm__ volatile("outb %0, %1" : : "a"(byte), "Nd"(port));
}

static void put(char c)
{
    unsigned char status;
    do __asm__ volatile("inb %1, %0" : "=a"(status) : "Nd"((uint16_t)0x3fd));
    while (!(status & 0x20)); /* the byte before is still on its way */
    out(0x3f8, (unsigned char)c);
}

static void say(const char *text)
{
    while (*text) put(*text++);
}

static float output[OUTPUT] __attribute__((aligned(64)));
static unsigned char workspace[WORKSPACE] __attribute__((aligned(64)));

__attribute__((used)) void work(const uint32_t *info)
{
    const uint32_t *module = (const uint32_t *)(uintptr_t)info[6];
    const float *input = (const float *)(uintptr_t)module[0], *end = (const float *)(uintptr_t)module[1];
    out(0x3fb, 3); /* eight bits to a byte */
    say("RESULT ");
    for (; end - input >= INPUT; input += INPUT) {
        memset(workspace, 0xff, WORKSPACE);
        PASTE(NAME, _run)(input, output, workspace);
        for (size_t i = 0; i < sizeof output; ++i) {
            const unsigned char byte = ((const unsigned char *)output)[i];
            put("0123456789abcdef"[byte >> 4]);
            put("0123456789abcdef"[byte & 15]);
        }
    }
    say("\nEND\n");
}
