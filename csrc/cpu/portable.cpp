// Any processor, any compiler: plain C++ that the compiler vectorises as far as its baseline allows.
#include <cstdint>
#include <cstring>

namespace {

constexpr int kMaxRows = 4;
constexpr int panels_per_tile(int rows) { return rows == 1 ? 2 : 1; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &subnormal, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
    float positive;
    std::memcpy(&positive, &magnitude, 4);
    positive += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &positive, 4);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float to_float(float v);
inline float to_float(int8_t v);
struct bf16;
struct f16;
inline float to_float(bf16 v);
inline float to_float(f16 v);
inline void from_float(float v, bf16* out);
inline void from_float(float v, f16* out);

struct Broadcast {
  float v;
  explicit Broadcast(const float* p) : v(*p) {}
};

struct Lane16 {
  float v[16];
  void zero() { std::memset(v, 0, sizeof v); }
  template <class T>
  void load(const T* p) {
    for (int i = 0; i < 16; ++i) v[i] = to_float(p[i]);
  }
  template <class T>
  void load_even(const T* p) {
    for (int i = 0; i < 16; ++i) v[i] = to_float(p[2 * i]);
  }
  template <class T>
  void load_odd(const T* p) {
    for (int i = 0; i < 16; ++i) v[i] = to_float(p[2 * i + 1]);
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < 16; ++i) from_float(v[i], p + i);
  }
  void multiply(const float* p) {
    for (int i = 0; i < 16; ++i) v[i] *= p[i];
  }
  void scale_and_add(const float* scale, const float* bias) {
    for (int i = 0; i < 16; ++i) v[i] = v[i] * scale[i] + bias[i];
  }
  void step(const Lane16& w, const Broadcast& b) {
    for (int i = 0; i < 16; ++i) v[i] += w.v[i] * b.v;
  }
  void step(const Lane16& w, const Lane16& x) {
    for (int i = 0; i < 16; ++i) v[i] += w.v[i] * x.v[i];
  }
  // Halves are added until one lane is left.
  float sum() const {
    float s[16];
    std::memcpy(s, v, sizeof v);
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
  }
};

struct PairBroadcast {
  int16_t v[2];
  explicit PairBroadcast(const uint32_t* p) { std::memcpy(v, p, 4); }
};

struct Pairs16 {
  int16_t v[32];
  void load(const int8_t* p) {
    for (int i = 0; i < 32; ++i) v[i] = p[i];
  }
};

struct DotI16 {
  int32_t v[16];
  void zero() { std::memset(v, 0, sizeof v); }
  void step(const Pairs16& w, const PairBroadcast& b) {
    for (int i = 0; i < 16; ++i) v[i] += w.v[2 * i] * b.v[0] + w.v[2 * i + 1] * b.v[1];
  }
  void add_to(float* acc, float scale, bool first) const {
    for (int i = 0; i < 16; ++i) acc[i] = static_cast<float>(v[i]) * scale + (first ? 0.0f : acc[i]);
  }
};

template <class Lane>
void keep(Lane& lane) {
  asm volatile("" : : "r"(&lane) : "memory");
}

}  // namespace

#include "no_bf16_products.h"
#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kPortable{"portable", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
