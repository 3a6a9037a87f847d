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
  void load_even(const bf16* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    lo = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q), 16));
    hi = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q + 1), 16));
  }
  // The mask stays in memory: it would take the register that the last accumulator needs.
  static __m256 upper_halves(__m256i v) {
    alignas(32) static const uint32_t mask[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
    asm("vpand %1, %0, %0" : "+x"(v) : "m"(mask));
    return _mm256_castsi256_ps(v);
  }
  void load_odd(const bf16* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    lo = upper_halves(_mm256_loadu_si256(q));
    hi = upper_halves(_mm256_loadu_si256(q + 1));
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  static __m256i round_to_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i lowest = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lowest);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  }
  void store(bf16* p) const {
    const __m256i packed = _mm256_packus_epi32(round_to_bf16(lo), round_to_bf16(hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  void store(f16* p) const {
    auto* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
  }
  void multiply(const float* p) {
    lo = _mm256_mul_ps(lo, _mm256_loadu_ps(p));
    hi = _mm256_mul_ps(hi, _mm256_loadu_ps(p + 8));
  }
  void scale_and_add(const float* scale, const float* bias) {
    lo = _mm256_fmadd_ps(lo, _mm256_loadu_ps(scale), _mm256_loadu_ps(bias));
    hi = _mm256_fmadd_ps(hi, _mm256_loadu_ps(scale + 8), _mm256_loadu_ps(bias + 8));
  }
  void step(const Lane16& w, const Broadcast& b) {
    lo = _mm256_fmadd_ps(w.lo, b.v, lo);
    hi = _mm256_fmadd_ps(w.hi, b.v, hi);
  }
  void step(const Lane16& w, const Lane16& x) {
    lo = _mm256_fmadd_ps(w.lo, x.lo, lo);
    hi = _mm256_fmadd_ps(w.hi, x.hi, hi);
  }
  // Halves are added until one lane is left.
  float sum() const {
    const __m256 eight = _mm256_add_ps(lo, hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

struct PairBroadcast {
  __m256i v;
  explicit PairBroadcast(const uint32_t* p) : v(_mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)))) {}
};

struct Pairs16 {
  __m256i lo, hi;
  void load(const int8_t* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    lo = _mm256_cvtepi8_epi16(_mm_loadu_si128(q));
    hi = _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1));
  }
};

struct DotI16 {
  __m256i lo, hi;
  void zero() { lo = hi = _mm256_setzero_si256(); }
  void step(const Pairs16& w, const PairBroadcast& b) {
    // gcc 12 keeps the sums of the intrinsic in memory.
    asm("vpaddd %1, %0, %0" : "+x"(lo) : "x"(_mm256_madd_epi16(w.lo, b.v)));
    asm("vpaddd %1, %0, %0" : "+x"(hi) : "x"(_mm256_madd_epi16(w.hi, b.v)));
  }
  void add_to(float* acc, float scale, bool first) const {
    const __m256 s = _mm256_set1_ps(scale);
    const __m256 a = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc);
    const __m256 b = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + 8);
    _mm256_storeu_ps(acc, _mm256_fmadd_ps(_mm256_cvtepi32_ps(lo), s, a));
    _mm256_storeu_ps(acc + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(hi), s, b));
  }
};

inline void keep(Lane16& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }
inline void keep(Pairs16& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }
inline void keep(DotI16& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }

}  // namespace

#include "no_bf16_products.h"
#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kAvx2{"avx2", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
T2_TARGET_END
#endif
