// GCC 12 declares that `ldtilecfg` reads 8 bytes; it reads 64. The compiler then stores llama.cpp's tile configuration
// after the instruction, which faults. Here the instruction reads all of it.
#pragma once
#if defined(__AMX_TILE__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
