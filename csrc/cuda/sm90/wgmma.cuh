// Hopper's warpgroup multiplications (PTX ISA, wgmma.mma_async): D[64, N] += A[64, 16] B[N, 16]^T
// in BF16 or A[64, 32] B[N, 32]^T in E4M3 or INT8, with A in registers or shared memory, B in
// shared memory, and float32 sums, of INT8 int32.
//
// Lane l of warp w of the warpgroup holds, with r = 16 w + l / 4 and c = 2 (l % 4),
//   a[0]: A[r][c, c + 1]     a[1]: A[r + 8][c, c + 1]
//   a[2]: A[r][c + 8, c + 9] a[3]: A[r + 8][c + 8, c + 9]
//   d[4 i + 0, 1]: D[r][8 i + c, 8 i + c + 1]   d[4 i + 2, 3]: D[r + 8][the same]
#pragma once

#include <stdint.h>

namespace zimage_mxfp8::detail {

constexpr int kWarpgroup = 128;  // threads

// Descriptor of B (or A) in shared memory: N (or 64) rows of 128 bytes, written by TMA with its
// swizzle of 128 bytes, aligned to 1024 bytes. One multiplication takes 32 bytes of columns: add 2
// to the descriptor for the next ones.
__device__ inline uint64_t wgmma_descriptor(uint32_t shared_address) {
  constexpr uint64_t kStrideOf8Rows = 1024 >> 4, kSwizzle128 = 1;
  return uint64_t((shared_address & 0x3FFFF) >> 4) | uint64_t{1} << 16 | kStrideOf8Rows << 32 |
         kSwizzle128 << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until all but the last `pending` committed groups have read their operands in shared memory
// and written their sums.
template <int pending>
__device__ void wgmma_wait_pending() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Waits until all committed groups are complete, after which their sums may be read. For the
// compiler each sum is written where its multiplication is issued: without a fence on the registers
// it could move reads of them above the wait.
template <int count>
__device__ void wgmma_wait(float (&sums)[count]) {
  wgmma_wait_pending<0>();
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

template <int count>
__device__ void wgmma_wait(int32_t (&sums)[count]) {
  wgmma_wait_pending<0>();
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

// Wgmma<N>::multiply(d, a, b): D += A B^T.
template <int n>
struct Wgmma;

// WgmmaShared<N>::multiply(d, a, b): D += A B^T with A in shared memory, described as B is.
template <int n>
struct WgmmaShared;

// WgmmaFP8<N>::multiply(d, a, b, add): D += A B^T, or D = A B^T without `add`, with A [64, 32] and
// B [N, 32] in E4M3, both in shared memory.
template <int n>
struct WgmmaFP8;

// WgmmaSharedBits<N>: WgmmaShared with float32 sums in integers. A kernel whose sums of INT8 become
// floats has too few registers for both.
template <int n>
struct WgmmaSharedBits;

// WgmmaInt8<N>: WgmmaFP8 of INT8.
template <int n>
struct WgmmaInt8;

// clang-format off
#define ZM_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ZM_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define ZM_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define ZM_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define ZM_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define ZM_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define ZM_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define ZM_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define ZM_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define ZM_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define ZM_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define ZM_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define ZM_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define ZM_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define ZM_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define ZM_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define ZM_F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                 "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ZM_WGMMA(n, sums, a_registers, descriptor, ...)                                           \
  template <>                                                                                     \
  struct Wgmma<n> {                                                                               \
    static __device__ void multiply(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b) {      \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, {"       \
                   a_registers "}, " descriptor ", 1, 1, 1, 0;"                                   \
                   : __VA_ARGS__                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                         \
    }                                                                                             \
  };
ZM_WGMMA(32, ZM_R0 ", " ZM_R1, "%16, %17, %18, %19", "%20",
         ZM_F8(0), ZM_F8(8))
ZM_WGMMA(64, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3, "%32, %33, %34, %35", "%36",
         ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24))
ZM_WGMMA(128, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7, "%64, %65, %66, %67", "%68",
         ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24), ZM_F8(32), ZM_F8(40), ZM_F8(48), ZM_F8(56))
ZM_WGMMA(192, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11, "%96, %97, %98, %99", "%100",
         ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24), ZM_F8(32), ZM_F8(40), ZM_F8(48), ZM_F8(56), ZM_F8(64), ZM_F8(72), ZM_F8(80), ZM_F8(88))
#define ZM_WGMMA_SHARED(n, sums, a_descriptor, b_descriptor, ...)                                 \
  template <>                                                                                     \
  struct WgmmaShared<n> {                                                                         \
    static __device__ void multiply(float (&d)[n / 2], uint64_t a, uint64_t b) {                  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, "        \
                   a_descriptor ", " b_descriptor ", 1, 1, 1, 0, 0;"                              \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b));                                                             \
    }                                                                                             \
  };
ZM_WGMMA_SHARED(256, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11 ", " ZM_R12 ", " ZM_R13 ", " ZM_R14 ", " ZM_R15, "%128", "%129",
                ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24), ZM_F8(32), ZM_F8(40), ZM_F8(48), ZM_F8(56), ZM_F8(64), ZM_F8(72), ZM_F8(80), ZM_F8(88), ZM_F8(96), ZM_F8(104), ZM_F8(112), ZM_F8(120))
ZM_WGMMA_SHARED(192, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11, "%96", "%97",
                ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24), ZM_F8(32), ZM_F8(40), ZM_F8(48), ZM_F8(56), ZM_F8(64), ZM_F8(72), ZM_F8(80), ZM_F8(88))
ZM_WGMMA_SHARED(32, ZM_R0 ", " ZM_R1, "%16", "%17",
                ZM_F8(0), ZM_F8(8))
ZM_WGMMA_SHARED(64, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3, "%32", "%33",
                ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24))
ZM_WGMMA_SHARED(128, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7, "%64", "%65",
                ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24), ZM_F8(32), ZM_F8(40), ZM_F8(48), ZM_F8(56))
#define ZM_WGMMA_FP8(n, sums, a_descriptor, b_descriptor, adds, ...)                              \
  template <>                                                                                     \
  struct WgmmaFP8<n> {                                                                            \
    static __device__ void multiply(float (&d)[n / 2], uint64_t a, uint64_t b, bool add) {        \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " adds ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" sums "}, "        \
                   a_descriptor ", " b_descriptor ", p, 1, 1; }"                                  \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b), "r"(int{add}));                                              \
    }                                                                                             \
  };
ZM_WGMMA_FP8(64, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3, "%32", "%33", "%34",
             ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24))
ZM_WGMMA_FP8(128, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7, "%64", "%65", "%66",
             ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24), ZM_F8(32), ZM_F8(40), ZM_F8(48), ZM_F8(56))
ZM_WGMMA_FP8(256, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11 ", " ZM_R12 ", " ZM_R13 ", " ZM_R14 ", " ZM_R15, "%128", "%129", "%130",
             ZM_F8(0), ZM_F8(8), ZM_F8(16), ZM_F8(24), ZM_F8(32), ZM_F8(40), ZM_F8(48), ZM_F8(56), ZM_F8(64), ZM_F8(72), ZM_F8(80), ZM_F8(88), ZM_F8(96), ZM_F8(104), ZM_F8(112), ZM_F8(120))
#define ZM_I8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), \
                 "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define ZM_WGMMA_INT8(n, sums, a_descriptor, b_descriptor, adds, ...)                             \
  template <>                                                                                     \
  struct WgmmaInt8<n> {                                                                           \
    static __device__ void multiply(int32_t (&d)[n / 2], uint64_t a, uint64_t b, bool add) {      \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " adds ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" sums "}, "            \
                   a_descriptor ", " b_descriptor ", p; }"                                        \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b), "r"(int{add}));                                              \
    }                                                                                             \
  };
ZM_WGMMA_INT8(64, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3, "%32", "%33", "%34",
              ZM_I8(0), ZM_I8(8), ZM_I8(16), ZM_I8(24))
ZM_WGMMA_INT8(128, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7, "%64", "%65", "%66",
              ZM_I8(0), ZM_I8(8), ZM_I8(16), ZM_I8(24), ZM_I8(32), ZM_I8(40), ZM_I8(48), ZM_I8(56))
ZM_WGMMA_INT8(192, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11, "%96", "%97", "%98",
              ZM_I8(0), ZM_I8(8), ZM_I8(16), ZM_I8(24), ZM_I8(32), ZM_I8(40), ZM_I8(48), ZM_I8(56), ZM_I8(64), ZM_I8(72), ZM_I8(80), ZM_I8(88))
ZM_WGMMA_INT8(256, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11 ", " ZM_R12 ", " ZM_R13 ", " ZM_R14 ", " ZM_R15, "%128", "%129", "%130",
              ZM_I8(0), ZM_I8(8), ZM_I8(16), ZM_I8(24), ZM_I8(32), ZM_I8(40), ZM_I8(48), ZM_I8(56), ZM_I8(64), ZM_I8(72), ZM_I8(80), ZM_I8(88), ZM_I8(96), ZM_I8(104), ZM_I8(112), ZM_I8(120))
#undef ZM_WGMMA_INT8
#define ZM_WGMMA_SHARED_BITS(n, sums, a_descriptor, b_descriptor, ...)                            \
  template <>                                                                                     \
  struct WgmmaSharedBits<n> {                                                                     \
    static __device__ void multiply(int32_t (&d)[n / 2], uint64_t a, uint64_t b) {                \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, "        \
                   a_descriptor ", " b_descriptor ", 1, 1, 1, 0, 0;"                              \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b));                                                             \
    }                                                                                             \
  };
ZM_WGMMA_SHARED_BITS(192, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11, "%96", "%97",
                     ZM_I8(0), ZM_I8(8), ZM_I8(16), ZM_I8(24), ZM_I8(32), ZM_I8(40), ZM_I8(48), ZM_I8(56), ZM_I8(64), ZM_I8(72), ZM_I8(80), ZM_I8(88))
ZM_WGMMA_SHARED_BITS(256, ZM_R0 ", " ZM_R1 ", " ZM_R2 ", " ZM_R3 ", " ZM_R4 ", " ZM_R5 ", " ZM_R6 ", " ZM_R7 ", " ZM_R8 ", " ZM_R9 ", " ZM_R10 ", " ZM_R11 ", " ZM_R12 ", " ZM_R13 ", " ZM_R14 ", " ZM_R15, "%128", "%129",
                     ZM_I8(0), ZM_I8(8), ZM_I8(16), ZM_I8(24), ZM_I8(32), ZM_I8(40), ZM_I8(48), ZM_I8(56), ZM_I8(64), ZM_I8(72), ZM_I8(80), ZM_I8(88), ZM_I8(96), ZM_I8(104), ZM_I8(112), ZM_I8(120))
#undef ZM_WGMMA_SHARED_BITS
#undef ZM_I8
#undef ZM_WGMMA
#undef ZM_WGMMA_SHARED
#undef ZM_WGMMA_FP8
#undef ZM_F8
#undef ZM_R0
#undef ZM_R1
#undef ZM_R2
#undef ZM_R3
#undef ZM_R4
#undef ZM_R5
#undef ZM_R6
#undef ZM_R7
#undef ZM_R8
#undef ZM_R9
#undef ZM_R10
#undef ZM_R11
#undef ZM_R12
#undef ZM_R13
#undef ZM_R14
#undef ZM_R15
// clang-format on

}  // namespace zimage_mxfp8::detail
