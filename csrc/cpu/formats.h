// Storage formats: every line of the kernels that knows the bits of a number. A new format needs
//   1. here: an entry in DType, a type with to_float, its kDType and a line in with_format (and paired, where two terms
//      of a column should lie side by side);
//   2. its torch dtype in csrc/binding.cpp;
//   3. its torch dtype in t2kernels/packing.py.
// It is then multiplied in float32, through to_float. Faster loads and products of 16-bit pairs are overloads of load()
// below and a Products<T> in matmul_impl.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace t2 {

enum class DType : int { f32, bf16, f16, i8, q8, q4 };

// x, y and bias may have these; a matrix may have any.
constexpr bool is_activation(DType dtype) { return dtype <= DType::f16; }

// Layout of a panel, 16 columns of M: [K][16], or, paired, [ceil(K / 2)][16][2], two terms of a column side by side as
// dot-product instructions take them. Columns past N and an odd last term's partner are zero.
constexpr int64_t kPanel = 16;
constexpr bool paired(DType dtype) { return dtype == DType::bf16 || dtype == DType::i8; }

// A panel in blocks, q4 or q8, is [ceil(K / 32)] blocks of 32 terms, one after the other: 16 scales and 16 minima in
// float16, one for each column, then codes, which stand for scale * code + minimum. Of q8, eight times 64 bytes: byte
// 4 c + i has term i of the next four of column c. Of q4, four times 64 bytes: byte 4 c + i has term i of the next eight
// in its lower half and term 4 + i in its upper half. Codes past K are 0, and so are scales and minima of columns past N.
constexpr bool in_blocks(DType dtype) { return dtype == DType::q8 || dtype == DType::q4; }
constexpr int64_t kBlockTerms = 32;
constexpr int64_t kBlockHead = 4 * kPanel;  // bytes
constexpr int64_t block_bytes(DType dtype) {
  return kBlockHead + kBlockTerms * kPanel / (dtype == DType::q4 ? 2 : 1);
}

}  // namespace t2

// The rest is for files that define lanes first (matmul_impl.h lists them) and T2_VECTOR_BITS: 512 (AVX-512), 256
// (AVX2), 128 (NEON) or 0 (portable).
#if defined(T2_VECTOR_BITS)
namespace {

using t2::DType;
using t2::kBlockHead;
using t2::kBlockTerms;
using t2::kPanel;

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct q8 {  // a byte of a block
  uint8_t bits;
};
struct q4 {
  uint8_t bits;
};

template <class T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<bf16> = DType::bf16;
template <>
constexpr DType kDType<f16> = DType::f16;
template <>
constexpr DType kDType<int8_t> = DType::i8;
template <>
constexpr DType kDType<q8> = DType::q8;
template <>
constexpr DType kDType<q4> = DType::q4;
template <class T>
constexpr bool kInBlocks = t2::in_blocks(kDType<T>);
template <class T>
constexpr int64_t kBlockBytes = t2::block_bytes(kDType<T>);

// fn(T{}) with the type of a matrix, or of activations.
template <class Fn>
void with_format(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::f32: return fn(float{});
    case DType::bf16: return fn(bf16{});
    case DType::f16: return fn(f16{});
    case DType::i8: return fn(int8_t{});
    case DType::q8: return fn(q8{});
    case DType::q4: return fn(q4{});
  }
}
template <class Fn>
void with_activation(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::f32: return fn(float{});
    case DType::bf16: return fn(bf16{});
    default: return fn(f16{});
  }
}

// One number. Rounding is to nearest, ties to even.
inline float to_float(float v) { return v; }
inline float to_float(int8_t v) { return static_cast<float>(v); }
inline float to_float(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, bf16* out) {
  const uint32_t bits = bits_of(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if T2_VECTOR_BITS == 128
inline float to_float(f16 v) {
  __fp16 half;
  std::memcpy(&half, &v, 2);
  return static_cast<float>(half);
}
inline void from_float(float v, f16* out) {
  const auto half = static_cast<__fp16>(v);
  std::memcpy(out, &half, 2);
}
#elif T2_VECTOR_BITS > 0
inline float to_float(f16 v) { return _cvtsh_ss(v.bits); }
inline void from_float(float v, f16* out) { out->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float to_float(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}
inline void from_float(float v, f16* out) {
  const uint32_t bits = bits_of(v), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half);
}
#endif

// Term `term` of column `column` of a block.
inline int code(const q8* block, int64_t column, int64_t term) {
  return block[kBlockHead + term / 4 * 64 + column * 4 + term % 4].bits;
}
inline int code(const q4* block, int64_t column, int64_t term) {
  const int byte = block[kBlockHead + term / 8 * 64 + column * 4 + term % 4].bits;
  return term % 8 < 4 ? byte & 15 : byte >> 4;
}
template <class T>
float to_float(const T* block, int64_t column, int64_t term) {
  const auto* scales = reinterpret_cast<const f16*>(block);
  return to_float(scales[column]) * static_cast<float>(code(block, column, term)) + to_float(scales[kPanel + column]);
}

// 16 numbers: any format, one by one. Non-template overloads below are for what an instruction set does at once.
template <class Number>
inline void fill(Lane16& lane, const Number& number) {
#if T2_VECTOR_BITS == 0
  for (int i = 0; i < kPanel; ++i) lane.v[i] = number(i);
#else
  alignas(64) float wide[kPanel];
  for (int i = 0; i < kPanel; ++i) wide[i] = number(i);
  lane.load(wide);
#endif
}
template <class T>
void load(Lane16& lane, const T* p) {
  fill(lane, [p](int i) { return to_float(p[i]); });
}
// The terms with even or odd index of 16 columns of a paired panel.
template <class T>
void load_even(Lane16& lane, const T* p) {
  fill(lane, [p](int i) { return to_float(p[2 * i]); });
}
template <class T>
void load_odd(Lane16& lane, const T* p) {
  fill(lane, [p](int i) { return to_float(p[2 * i + 1]); });
}
template <class T>
void store(const Lane16& lane, T* p) {
  alignas(64) float wide[kPanel];
  lane.store(wide);
  for (int i = 0; i < kPanel; ++i) from_float(wide[i], p + i);
}
inline void load(Lane16& lane, const float* p) { lane.load(p); }
inline void store(const Lane16& lane, float* p) { lane.store(p); }

#if T2_VECTOR_BITS == 512
inline void load(Lane16& lane, const bf16* p) {
  const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  lane.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(q), 16));
}
inline void load_even(Lane16& lane, const bf16* p) {
  lane.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
inline void load_odd(Lane16& lane, const bf16* p) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  lane.v = _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), upper));
}
inline void store(const Lane16& lane, bf16* p) {
  const __m512i bits = _mm512_castps_si512(lane.v);
  const __m512i lowest = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lowest);
  const __mmask16 nan = _mm512_cmp_ps_mask(lane.v, lane.v, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
inline void load(Lane16& lane, const f16* p) {
  lane.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(const Lane16& lane, f16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(lane.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void load(Quads16& quads, const q8* p) { quads.v = _mm512_loadu_si512(p); }
inline void load_low(Quads16& quads, const q4* p) {
  quads.v = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15));
}
inline void load_high(Quads16& quads, const q4* p) {
  quads.v = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
}
inline void load(Pairs16& pairs, const bf16* p) { pairs.v = _mm512_loadu_si512(p); }
inline void load(Pairs16& pairs, const int8_t* p) {
  pairs.v = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

#elif T2_VECTOR_BITS == 256
inline __m256 widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline void load(Lane16& lane, const bf16* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  lane.lo = widen_bf16(_mm_loadu_si128(q));
  lane.hi = widen_bf16(_mm_loadu_si128(q + 1));
}
inline void load_even(Lane16& lane, const bf16* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  lane.lo = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q), 16));
  lane.hi = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q + 1), 16));
}
// The mask stays in memory: it would take the register that the last accumulator needs.
inline __m256 upper_halves(__m256i v) {
  alignas(32) static const uint32_t mask[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                               0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
  asm("vpand %1, %0, %0" : "+x"(v) : "m"(mask));
  return _mm256_castsi256_ps(v);
}
inline void load_odd(Lane16& lane, const bf16* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  lane.lo = upper_halves(_mm256_loadu_si256(q));
  lane.hi = upper_halves(_mm256_loadu_si256(q + 1));
}
inline __m256i round_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i lowest = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lowest);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
}
inline void store(const Lane16& lane, bf16* p) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(lane.lo), round_to_bf16(lane.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void load(Lane16& lane, const f16* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  lane.lo = _mm256_cvtph_ps(_mm_loadu_si128(q));
  lane.hi = _mm256_cvtph_ps(_mm_loadu_si128(q + 1));
}
inline void store(const Lane16& lane, f16* p) {
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(lane.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(lane.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline void load(Quads16& quads, const q8* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  quads.lo = _mm256_loadu_si256(q);
  quads.hi = _mm256_loadu_si256(q + 1);
}
inline void load_low(Quads16& quads, const q4* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  quads.lo = _mm256_and_si256(_mm256_loadu_si256(q), _mm256_set1_epi8(15));
  quads.hi = _mm256_and_si256(_mm256_loadu_si256(q + 1), _mm256_set1_epi8(15));
}
inline void load_high(Quads16& quads, const q4* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  quads.lo = _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(q), 4), _mm256_set1_epi8(15));
  quads.hi = _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(q + 1), 4), _mm256_set1_epi8(15));
}
inline void load(Pairs16& pairs, const int8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  pairs.lo = _mm256_cvtepi8_epi16(_mm_loadu_si128(q));
  pairs.hi = _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1));
}

#elif T2_VECTOR_BITS == 128
inline uint16x8_t load_halves(const void* p, int i) { return vld1q_u16(static_cast<const uint16_t*>(p) + 8 * i); }
inline void load(Lane16& lane, const bf16* p) {
  for (int i = 0; i < 2; ++i) {
    const uint16x8_t halves = load_halves(p, i);
    lane.v[2 * i] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
    lane.v[2 * i + 1] = vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16));
  }
}
inline void load_even(Lane16& lane, const bf16* p) {
  four([&](int i) { lane.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(load_halves(p, i)), 16)); });
}
inline void load_odd(Lane16& lane, const bf16* p) {
  const uint32x4_t upper = vdupq_n_u32(0xffff0000u);
  four([&](int i) { lane.v[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(load_halves(p, i)), upper)); });
}
inline uint32x4_t round_to_bf16(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t lowest = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), lowest);
  return vbslq_u32(vceqq_f32(v, v), vshrq_n_u32(rounded, 16), vdupq_n_u32(0x7fc0));
}
inline void store(const Lane16& lane, bf16* p) {
  four([&](int i) { vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, vmovn_u32(round_to_bf16(lane.v[i]))); });
}
inline void load(Lane16& lane, const f16* p) {
  for (int i = 0; i < 2; ++i) {
    const float16x8_t halves = vreinterpretq_f16_u16(load_halves(p, i));
    lane.v[2 * i] = vcvt_f32_f16(vget_low_f16(halves));
    lane.v[2 * i + 1] = vcvt_high_f32_f16(halves);
  }
}
inline void store(const Lane16& lane, f16* p) {
  four([&](int i) {
    vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(lane.v[i])));
  });
}
inline uint8x16_t load_bytes(const void* p, int i) { return vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); }
inline void load(Quads16& quads, const q8* p) {
  four([&](int i) { quads.v[i] = load_bytes(p, i); });
}
inline void load_low(Quads16& quads, const q4* p) {
  four([&](int i) { quads.v[i] = vandq_u8(load_bytes(p, i), vdupq_n_u8(15)); });
}
inline void load_high(Quads16& quads, const q4* p) {
  four([&](int i) { quads.v[i] = vshrq_n_u8(load_bytes(p, i), 4); });
}
inline void load(Pairs16& pairs, const bf16* p) {
  four([&](int i) { pairs.v[i] = vreinterpretq_s16_u16(load_halves(p, i)); });
}
inline void load(Pairs16& pairs, const int8_t* p) {
  for (int i = 0; i < 2; ++i) {
    const int8x16_t bytes = vld1q_s8(p + 16 * i);
    pairs.v[2 * i] = vmovl_s8(vget_low_s8(bytes));
    pairs.v[2 * i + 1] = vmovl_high_s8(bytes);
  }
}

#else
inline void load(Quads16& quads, const q8* p) { std::memcpy(quads.v, p, 4 * kPanel); }
inline void load_low(Quads16& quads, const q4* p) {
  for (int i = 0; i < 4 * kPanel; ++i) quads.v[i] = p[i].bits & 15;
}
inline void load_high(Quads16& quads, const q4* p) {
  for (int i = 0; i < 4 * kPanel; ++i) quads.v[i] = p[i].bits >> 4;
}
inline void load(Pairs16& pairs, const int8_t* p) {
  for (int i = 0; i < 2 * kPanel; ++i) pairs.v[i] = p[i];
}
#endif

}  // namespace
#endif
