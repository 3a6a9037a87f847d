// AVX2 + FMA + F16C: a register tile of 6 rows x 1 panel (3 x 2, 1 x 4), 12 sums of 8 lanes in 16 registers.
#if defined(__x86_64__)
#include "target.h"
T2_TARGET_BEGIN("avx2,fma,f16c")
#include <immintrin.h>

#include <cstdint>

#define T2_VECTOR_BITS 256

namespace {

constexpr bool kBf16Products = false;
using DotBf16 = struct Lane16;  // never used
inline void transpose_pairs(const void*, int64_t, void*) {}

constexpr int kMaxRows = 6;
constexpr int panels_per_tile(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

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
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void multiply(const float* p) {
    lo = _mm256_mul_ps(lo, _mm256_loadu_ps(p));
    hi = _mm256_mul_ps(hi, _mm256_loadu_ps(p + 8));
  }
  void multiply(const Broadcast& b) {
    lo = _mm256_mul_ps(lo, b.v);
    hi = _mm256_mul_ps(hi, b.v);
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
  // out[i] = c[i].sum() for 16 of them: the same halves are added, those of several lanes side by side.
  static void sums(const Lane16* c, float* out) {
    for (int i = 0; i < 16; i += 8) {
      const __m256 a = twos(fours(c[i], c[i + 4]), fours(c[i + 1], c[i + 5]));
      const __m256 b = twos(fours(c[i + 2], c[i + 6]), fours(c[i + 3], c[i + 7]));
      _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)));
    }
  }

 private:
  static __m256 fours(const Lane16& x, const Lane16& y) {
    const __m256 a = _mm256_add_ps(x.lo, x.hi), b = _mm256_add_ps(y.lo, y.hi);
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  static __m256 twos(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
};

struct PairBroadcast {
  __m256i v;
  explicit PairBroadcast(const uint32_t* p)
      : v(_mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)))) {}
};

struct Pairs16 {
  __m256i lo, hi;
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

struct Quads16 {
  __m256i lo, hi;
};

// Codes of 4 bits times bytes. Sums of pairs: 8 steps of at most 2 x 15 x 127 fit 16 bits.
struct DotQ4 {
  __m256i lo, hi;
  void zero() { lo = hi = _mm256_setzero_si256(); }
  void step(const Quads16& w, const PairBroadcast& b) {
    asm("vpaddw %1, %0, %0" : "+x"(lo) : "x"(_mm256_maddubs_epi16(w.lo, b.v)));
    asm("vpaddw %1, %0, %0" : "+x"(hi) : "x"(_mm256_maddubs_epi16(w.hi, b.v)));
  }
  Lane16 sums() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(lo, ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(hi, ones))};
  }
};

// Codes of 8 bits times bytes. The upper bit is apart, as 2 x 127 x 127 fit 16 bits.
struct DotQ8 {
  __m256i lo, hi;
  void zero() { lo = hi = _mm256_setzero_si256(); }
  void step(const Quads16& w, const PairBroadcast& b) {
    asm("vpaddd %1, %0, %0" : "+x"(lo) : "x"(dot(w.lo, b.v)));
    asm("vpaddd %1, %0, %0" : "+x"(hi) : "x"(dot(w.hi, b.v)));
  }
  Lane16 sums() const { return {_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)}; }

 private:
  static __m256i dot(__m256i w, __m256i x) {
    const __m256i low = _mm256_and_si256(w, _mm256_set1_epi8(127));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 7), _mm256_set1_epi8(1));
    return _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(low, x), _mm256_set1_epi16(1)),
                            _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(128)));
  }
};

inline void keep(Lane16& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }
inline void keep(Pairs16& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }
inline void keep(DotI16& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }
inline void keep(Quads16& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }
inline void keep(DotQ4& lane) { asm volatile("" : "+x"(lane.lo), "+x"(lane.hi)); }

}  // namespace

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kAvx2{"avx2", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
T2_TARGET_END
#endif
