// 16 lanes of AVX-512 F/BW/DQ/VL, and the register tile they fill: 12 rows x 2 panels or 6 x 4, 24 sums of 32
// registers. A 24 x 1 tile would load a broadcast for every FMA, which processors with two of each a cycle can't
// sustain. The order of float32 operations is that of the AVX2 set, and so are the bits.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define T2_VECTOR_BITS 512

namespace {

constexpr int kMaxRows = 12;
constexpr int panels_per_tile(int rows) { return rows <= 6 ? 4 : 2; }

struct Broadcast {
  __m512 v;
  explicit Broadcast(const float* p) : v(_mm512_set1_ps(*p)) {}
};

struct Lane16 {
  __m512 v;
  void zero() { v = _mm512_setzero_ps(); }
  void load(const float* p) { v = _mm512_loadu_ps(p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void multiply(const float* p) { v = _mm512_mul_ps(v, _mm512_loadu_ps(p)); }
  void multiply(const Broadcast& b) { v = _mm512_mul_ps(v, b.v); }
  void scale_and_add(const float* scale, const float* bias) {
    v = _mm512_fmadd_ps(v, _mm512_loadu_ps(scale), _mm512_loadu_ps(bias));
  }
  void step(const Lane16& w, const Broadcast& b) { v = _mm512_fmadd_ps(w.v, b.v, v); }
  void step(const Lane16& w, const Lane16& x) { v = _mm512_fmadd_ps(w.v, x.v, v); }
  // Halves are added until one lane is left.
  float sum() const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // out[i] = c[i].sum() for 16 of them: the same halves are added, those of several lanes side by side.
  static void sums(const Lane16* c, float* out) {
    const __m512 a = twos(fours(c), fours(c + 1)), b = twos(fours(c + 2), fours(c + 3));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)));
  }

 private:
  static __m512 eights(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  static __m512 fours(const Lane16* c) {  // of c[0], c[4], c[8], c[12]
    const __m512 a = eights(c[0].v, c[4].v), b = eights(c[8].v, c[12].v);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static __m512 twos(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
};

struct PairBroadcast {
  __m512i v;
  explicit PairBroadcast(const uint32_t* p) : v(_mm512_set1_epi32(static_cast<int>(*p))) {}
};

struct Pairs16 {
  __m512i v;
};

struct DotI16 {
  __m512i v;
  void zero() { v = _mm512_setzero_si512(); }
  void step(const Pairs16& w, const PairBroadcast& b) {
    // gcc 12 spills the accumulators of the intrinsics.
#if defined(T2_DOT_PRODUCTS)
    asm("vpdpwssd %2, %1, %0" : "+v"(v) : "v"(w.v), "v"(b.v));
#else
    asm("vpaddd %1, %0, %0" : "+v"(v) : "v"(_mm512_madd_epi16(w.v, b.v)));
#endif
  }
  void add_to(float* acc, float scale, bool first) const {
    const __m512 a = first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc);
    _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(scale), a));
  }
};

struct Quads16 {
  __m512i v;
};

// Codes of 4 bits times bytes. Without the dot product, sums of pairs: 8 steps of at most 2 x 15 x 127 fit 16 bits.
struct DotQ4 {
  __m512i v;
  void zero() { v = _mm512_setzero_si512(); }
  void step(const Quads16& w, const PairBroadcast& b) {
#if defined(T2_DOT_PRODUCTS)
    asm("vpdpbusd %2, %1, %0" : "+v"(v) : "v"(w.v), "v"(b.v));
#else
    asm("vpaddw %1, %0, %0" : "+v"(v) : "v"(_mm512_maddubs_epi16(w.v, b.v)));
#endif
  }
  Lane16 sums() const {
#if defined(T2_DOT_PRODUCTS)
    return {_mm512_cvtepi32_ps(v)};
#else
    return {_mm512_cvtepi32_ps(_mm512_madd_epi16(v, _mm512_set1_epi16(1)))};
#endif
  }
};

// Codes of 8 bits times bytes. Without the dot product the upper bit is apart, as 2 x 127 x 127 fit 16 bits.
#if defined(T2_DOT_PRODUCTS)
using DotQ8 = DotQ4;
#else
struct DotQ8 {
  __m512i v;
  void zero() { v = _mm512_setzero_si512(); }
  void step(const Quads16& w, const PairBroadcast& b) {
    const __m512i low = _mm512_and_si512(w.v, _mm512_set1_epi8(127));
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(w.v, 7), _mm512_set1_epi8(1));
    const __m512i one = _mm512_set1_epi16(1), top = _mm512_set1_epi16(128);
    const __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(_mm512_maddubs_epi16(low, b.v), one),
                                         _mm512_madd_epi16(_mm512_maddubs_epi16(high, b.v), top));
    asm("vpaddd %1, %0, %0" : "+v"(v) : "v"(sum));
  }
  Lane16 sums() const { return {_mm512_cvtepi32_ps(v)}; }
};
#endif

#if defined(T2_DOT_PRODUCTS)
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

// in: up to 8 rows, one for a pair of columns, [16 terms][2 columns]; out: [8 pairs of terms][16 columns][2 terms].
// Columns past the last row are 0. The halves of four numbers change places, then 8 x 8 groups of four are transposed.
inline void transpose_pairs(const void* in, int64_t rows, void* out) {
  const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  __m512i a[8], b[8];
  for (int r = 0; r < 8; ++r)
    a[r] = r < rows ? _mm512_shuffle_epi8(_mm512_loadu_si512(static_cast<const char*>(in) + r * 64), halves)
                    : _mm512_setzero_si512();
  for (int r = 0; r < 8; r += 2) {  // groups of rows r and r + 1 side by side
    b[r] = _mm512_unpacklo_epi64(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi64(a[r], a[r + 1]);
  }
  for (int r = 0; r < 8; r += 4)
    for (int odd = 0; odd < 2; ++odd) {
      a[r + odd] = _mm512_shuffle_i64x2(b[r + odd], b[r + odd + 2], 0x88);
      a[r + odd + 2] = _mm512_shuffle_i64x2(b[r + odd], b[r + odd + 2], 0xdd);
    }
  for (int q = 0; q < 4; ++q) {
    const __m512i even = _mm512_shuffle_i64x2(a[q], a[q + 4], 0x88), odd = _mm512_shuffle_i64x2(a[q], a[q + 4], 0xdd);
    _mm512_storeu_si512(static_cast<char*>(out) + q * 64, even);
    _mm512_storeu_si512(static_cast<char*>(out) + (q + 4) * 64, odd);
  }
}
#else
constexpr bool kBf16Products = false;
using DotBf16 = Lane16;  // never used
inline void transpose_pairs(const void*, int64_t, void*) {}
#endif

inline void keep(Lane16& lane) { asm volatile("" : "+v"(lane.v)); }
inline void keep(Pairs16& lane) { asm volatile("" : "+v"(lane.v)); }
inline void keep(DotI16& lane) { asm volatile("" : "+v"(lane.v)); }
inline void keep(Quads16& lane) { asm volatile("" : "+v"(lane.v)); }
inline void keep(DotQ4& lane) { asm volatile("" : "+v"(lane.v)); }

}  // namespace
