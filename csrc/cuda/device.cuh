// What the kernels need from the device beyond C++. With T2_EMULATE the first half comes from tests/cuda/emulation.h,
// which gives it the same meaning on the CPU.
#pragma once

#include <cstdint>

namespace t2::cuda {

struct alignas(16) Chunk {
  uint32_t word[4];
};

}  // namespace t2::cuda

#ifdef T2_EMULATE
#include "emulation.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace t2::cuda {

// 16 bytes that nothing reads again, past L1; zeros unless `inside`. Volatile: stays ahead of a barrier that follows
// it.
__device__ __forceinline__ Chunk load_once(const char* p, bool inside) {
  Chunk c;
  asm volatile(
      "{\n"
      ".reg .pred inside;\n"
      "setp.ne.u32 inside, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@inside ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(c.word[0]), "=&r"(c.word[1]), "=&r"(c.word[2]), "=&r"(c.word[3])
      : "l"(p), "r"(static_cast<uint32_t>(inside)));
  return c;
}

// 16 bytes through L1; zeros unless `inside`.
__device__ __forceinline__ Chunk load_cached(const char* p, bool inside) {
  return inside ? *reinterpret_cast<const Chunk*>(p) : Chunk{};
}

// sum[16, 8] += a[16, 16] b[16, 8], bfloat16 pairs, held by a warp as PTX lays out the fragments of mma.m16n8k16.
__device__ __forceinline__ void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t subtract_bf16x2(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xbf80bf80u), "r"(a));  // a + b * -1
  return difference;
}

__device__ __forceinline__ uint32_t f16x2_to_bf16x2(uint32_t pair) {
  const float2 wide = __half22float2(reinterpret_cast<const __half2&>(pair));
  const __nv_bfloat162 narrow = __float22bfloat162_rn(wide);
  return reinterpret_cast<const uint32_t&>(narrow);
}

__device__ __forceinline__ uint16_t to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

__device__ __forceinline__ float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// Waits for every block of a cooperative launch; what they wrote before is visible after. The counter is the driver's,
// one per launch: an atomic add with release, a spin with acquire, and no reset between launches.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

}  // namespace t2::cuda

#endif

namespace t2::cuda {

// Two int8, bytes `Low` and `Low + 1` of a word, as bfloat16, exactly: with v's byte below the byte of 128.0's
// exponent, 128 + (v's low 7 bits) less 128, or, where the sign bit has raised the exponent, less 256.
template <int Low>
__device__ __forceinline__ uint32_t i8x2_to_bf16x2(uint32_t word) {
  const uint32_t pair = __byte_perm(word, 0x43434343u, Low == 0 ? 0x4140 : 0x4342);
  return subtract_bf16x2(pair & 0xff7fff7fu, pair & 0xff80ff80u);
}

}  // namespace t2::cuda
