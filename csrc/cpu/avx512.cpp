// AVX-512 F/BW/DQ/VL: 12 x 32 and narrower register tiles of 16-lane accumulators. The order of operations is that of
// the AVX2 set, and so are the bits.
#if defined(__x86_64__)
#include "x86_target.h"
T2_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kMaxRows = 12;
constexpr int panels_per_tile(int rows) { return rows == 1 ? 8 : rows <= 6 ? 4 : 2; }

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }

struct bf16;
struct f16;

struct Broadcast {
  __m512 v;
  explicit Broadcast(const float* p) : v(_mm512_set1_ps(*p)) {}
};

struct Lane16 {
  __m512 v;
  void zero() { v = _mm512_setzero_ps(); }
  void load(const float* p) { v = _mm512_loadu_ps(p); }
  void load(const bf16* p) {
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(q), 16));
  }
  void load(const f16* p) { v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  void load(const int8_t* p) {
    v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void fma(const Lane16& w, const Broadcast& b) { v = _mm512_fmadd_ps(w.v, b.v, v); }
};

}  // namespace

#include "matmul_impl.h"

namespace t2 {
const Kernels kAvx512{"avx512", &matmul, &reduce_scales};
}
T2_TARGET_END
#endif
