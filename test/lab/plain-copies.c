/*
 * memcpy and memmove by 64-bit words, preloaded in an Arm lab. Of what a store by SVE overwrites, QEMU 7.2 forgets the translated
 * code at its first byte alone (probe_access_flags in accel/tcg/cputlb.c, set right in later versions). glibc copies by SVE, V8 copies
 * the code that it has made by glibc, and QEMU went on with what had been there before. Guests keep SVE.
 */
#include <stddef.h>
#include <stdint.h>

static uint64_t load(const unsigned char *at) {
  uint64_t word;
  __builtin_memcpy(&word, at, sizeof word);
  return word;
}

static void store(unsigned char *at, uint64_t word) { __builtin_memcpy(at, &word, sizeof word); }

void *memmove(void *to, const void *from, size_t count) {
  unsigned char *target = to;
  const unsigned char *source = from;
  if ((uintptr_t)target - (uintptr_t)source >= count) {
    for (; count >= 8; count -= 8, target += 8, source += 8) store(target, load(source));
    for (; count > 0; count--) *target++ = *source++;
  } else {
    for (; count >= 8; count -= 8) store(target + count - 8, load(source + count - 8));
    for (; count > 0; count--) target[count - 1] = source[count - 1];
  }
  return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t count) { return memmove(to, from, count); }
