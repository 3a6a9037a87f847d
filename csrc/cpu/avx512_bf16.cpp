// AVX-512 with dot products of bfloat16 (BF16) and of 16-bit integers (VNNI): twice the multiply-adds of fp32.
#if defined(__x86_64__)
#include "x86_target.h"
T2_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define T2_VNNI
#include "avx512_lanes.h"

namespace {

constexpr bool kBf16Products = true;

struct DotBf16 {
  __m512 v;
  void zero() { v = _mm512_setzero_ps(); }
  void load(const float* p) { v = _mm512_loadu_ps(p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void step(const Pairs16& w, const PairBroadcast& b) {
    v = _mm512_dpbf16_ps(v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(b.v));
  }
};

inline void keep(DotBf16& lane) { asm volatile("" : "+v"(lane.v)); }

}  // namespace

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kAvx512Bf16{"avx512_bf16", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
T2_TARGET_END
#endif
