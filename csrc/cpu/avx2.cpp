// AVX2 + FMA + F16C: a 6 x 16 register tile, 12 accumulators of 8 lanes.
#if defined(__x86_64__)
#include "x86_target.h"
T2_TARGET_BEGIN("avx2,fma,f16c")
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kMaxRows = 6;
constexpr int panels_per_tile(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }

struct bf16;
struct f16;

struct Broadcast {
  __m256 v;
  explicit Broadcast(const float* p) : v(_mm256_broadcast_ss(p)) {}
};

struct Lane16 {
  __m256 lo, hi;
  void zero() { lo = hi = _mm256_setzero_ps(); }
  void load(const float* p) {
    lo = _mm256_loadu_ps(p);
    hi = _mm256_loadu_ps(p + 8);
  }
  static __m256 widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  void load(const bf16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    lo = widen_bf16(_mm_loadu_si128(q));
    hi = widen_bf16(_mm_loadu_si128(q + 1));
  }
  void load(const f16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    lo = _mm256_cvtph_ps(_mm_loadu_si128(q));
    hi = _mm256_cvtph_ps(_mm_loadu_si128(q + 1));
  }
  void load(const int8_t* p) {
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
    hi = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)));
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void fma(const Lane16& w, const Broadcast& b) {
    lo = _mm256_fmadd_ps(w.lo, b.v, lo);
    hi = _mm256_fmadd_ps(w.hi, b.v, hi);
  }
};

}  // namespace

#include "matmul_impl.h"

namespace t2 {
const Kernels kAvx2{"avx2", &matmul, &reduce_scales};
}
T2_TARGET_END
#endif
