// Run-time dispatch without -march: the compiler emits one clone per instruction set and the loader picks one.
#pragma once

// Feature levels, not processor names: `arch=haswell` would match Intel's Haswell alone and leave AMD the baseline.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define PHYX_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PHYX_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define PHYX_MULTIVERSION
#endif

// Inner templates must be inlined into the multiversioned caller, or they keep the baseline instruction set.
#if defined(_MSC_VER)
#define PHYX_INLINE __forceinline
#else
#define PHYX_INLINE inline __attribute__((always_inline))
#endif
