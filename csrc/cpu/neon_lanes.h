// 16 lanes in four NEON registers of 4, and the register tile they fill: 6 rows x 1 panel or 2 x 2, 24 or 16 sums of 32
// registers. The order of float32 operations is that of the AVX2 set, and so are the bits.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#define T2_VECTOR_BITS 128

namespace {

constexpr int kMaxRows = 6;
constexpr int panels_per_tile(int rows) { return rows <= 2 ? 2 : 1; }

// fn(0) to fn(3), unrolled so that arrays of four stay in registers.
template <class Fn>
[[gnu::always_inline]] inline void four(const Fn& fn) {
  fn(0);
  fn(1);
  fn(2);
  fn(3);
}

struct Broadcast {
  float32x4_t v;
  explicit Broadcast(const float* p) : v(vld1q_dup_f32(p)) {}
};

struct Lane16 {
  float32x4_t v[4];
  void zero() {
    four([&](int i) { v[i] = vdupq_n_f32(0.0f); });
  }
  void load(const float* p) {
    four([&](int i) { v[i] = vld1q_f32(p + 4 * i); });
  }
  void store(float* p) const {
    four([&](int i) { vst1q_f32(p + 4 * i, v[i]); });
  }
  void multiply(const float* p) {
    four([&](int i) { v[i] = vmulq_f32(v[i], vld1q_f32(p + 4 * i)); });
  }
  void multiply(const Broadcast& b) {
    four([&](int i) { v[i] = vmulq_f32(v[i], b.v); });
  }
  void scale_and_add(const float* scale, const float* bias) {
    four([&](int i) { v[i] = vfmaq_f32(vld1q_f32(bias + 4 * i), v[i], vld1q_f32(scale + 4 * i)); });
  }
  void step(const Lane16& w, const Broadcast& b) {
    four([&](int i) { v[i] = vfmaq_f32(v[i], w.v[i], b.v); });
  }
  void step(const Lane16& w, const Lane16& x) {
    four([&](int i) { v[i] = vfmaq_f32(v[i], w.v[i], x.v[i]); });
  }
  // Halves are added until one lane is left.
  float sum() const {
    const float32x4_t quad = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(quad), vget_high_f32(quad));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  // out[i] = c[i].sum() for 16 of them.
  static void sums(const Lane16* c, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = c[i].sum();
  }
};

struct PairBroadcast {
  uint32x4_t v;
  explicit PairBroadcast(const uint32_t* p) : v(vld1q_dup_u32(p)) {}
};

struct Pairs16 {
  int16x8_t v[4];
};

struct DotI16 {
  int32x4_t v[4];
  void zero() {
    four([&](int i) { v[i] = vdupq_n_s32(0); });
  }
  void step(const Pairs16& w, const PairBroadcast& b) {
    const int16x8_t x = vreinterpretq_s16_u32(b.v);
    four([&](int i) {
      const int32x4_t low = vmull_s16(vget_low_s16(w.v[i]), vget_low_s16(x));
      v[i] = vaddq_s32(v[i], vpaddq_s32(low, vmull_high_s16(w.v[i], x)));
    });
  }
  void add_to(float* acc, float scale, bool first) const {
    four([&](int i) {
      const float32x4_t a = first ? vdupq_n_f32(0.0f) : vld1q_f32(acc + 4 * i);
      vst1q_f32(acc + 4 * i, vfmaq_f32(a, vcvtq_f32_s32(v[i]), vdupq_n_f32(scale)));
    });
  }
};

struct Quads16 {
  uint8x16_t v[4];
};

// Codes of 4 or 8 bits times bytes. Without the dot product of mixed signs the upper bit of 8 is apart.
template <bool kEightBits>
struct DotBytes {
  int32x4_t v[4];
  void zero() {
    four([&](int i) { v[i] = vdupq_n_s32(0); });
  }
  void step(const Quads16& w, const PairBroadcast& b) {
    const int8x16_t x = vreinterpretq_s8_u32(b.v);
    four([&](int i) {
#if defined(T2_DOT_PRODUCTS)
      v[i] = vusdotq_s32(v[i], w.v[i], x);
#else
      if constexpr (kEightBits) {
        v[i] = vaddq_s32(v[i], dot(vandq_u8(w.v[i], vdupq_n_u8(127)), x));
        v[i] = vaddq_s32(v[i], vshlq_n_s32(dot(vshrq_n_u8(w.v[i], 7), x), 7));
      } else {
        v[i] = vaddq_s32(v[i], dot(w.v[i], x));
      }
#endif
    });
  }
  Lane16 sums() const {
    Lane16 lane;
    four([&](int i) { lane.v[i] = vcvtq_f32_s32(v[i]); });
    return lane;
  }

 private:
  static int32x4_t dot(uint8x16_t codes, int8x16_t x) {  // codes below 128
    const int8x16_t w = vreinterpretq_s8_u8(codes);
    return vpaddq_s32(vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x))), vpaddlq_s16(vmull_high_s8(w, x)));
  }
};

using DotQ4 = DotBytes<false>;
using DotQ8 = DotBytes<true>;

#if defined(T2_DOT_PRODUCTS)
constexpr bool kBf16Products = true;
struct DotBf16 : Lane16 {
  void step(const Pairs16& w, const PairBroadcast& b) {
    const bfloat16x8_t x = vreinterpretq_bf16_u32(b.v);
    four([&](int i) { v[i] = vbfdotq_f32(v[i], vreinterpretq_bf16_s16(w.v[i]), x); });
  }
};

// in: up to 8 rows, one for a pair of columns, [16 terms][2 columns]; out: [8 pairs of terms][16 columns][2 terms].
// Columns past the last row are 0.
inline void transpose_pairs(const void* in, int64_t rows, void* out) {
  auto* pairs = static_cast<uint32_t*>(out);
  for (int r = 0; r < 8; ++r) {
    const auto* row = static_cast<const uint16_t*>(in) + r * 32;
    for (int half = 0; half < 2; ++half) {  // 8 terms of both columns
      const uint16x8x2_t columns = r < rows ? vld2q_u16(row + half * 16) : uint16x8x2_t{};
      uint32_t first[4], second[4];
      vst1q_u32(first, vreinterpretq_u32_u16(columns.val[0]));
      vst1q_u32(second, vreinterpretq_u32_u16(columns.val[1]));
      for (int i = 0; i < 4; ++i) {
        pairs[(half * 4 + i) * 16 + 2 * r] = first[i];
        pairs[(half * 4 + i) * 16 + 2 * r + 1] = second[i];
      }
    }
  }
}
#else
constexpr bool kBf16Products = false;
using DotBf16 = Lane16;  // never used
inline void transpose_pairs(const void*, int64_t, void*) {}
#endif

template <class Lane>
inline void keep(Lane& lane) {
  four([&](int i) { asm volatile("" : "+w"(lane.v[i])); });
}

}  // namespace
