// Any processor, any compiler: plain C++ that the compiler vectorises as far as its baseline allows.
#include <cstdint>
#include <cstring>

#define T2_VECTOR_BITS 0

namespace {

constexpr bool kBf16Products = false;
using DotBf16 = struct Lane16;  // never used
inline void transpose_pairs(const void*, int64_t, void*) {}

constexpr int kMaxRows = 4;
constexpr int panels_per_tile(int rows) { return rows == 1 ? 2 : 1; }

struct Broadcast {
  float v;
  explicit Broadcast(const float* p) : v(*p) {}
};

struct Lane16 {
  float v[16];
  void zero() { std::memset(v, 0, sizeof v); }
  void load(const float* p) {  // gcc 12 keeps lanes in memory if this is a memcpy
    for (int i = 0; i < 16; ++i) v[i] = p[i];
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void multiply(const float* p) {
    for (int i = 0; i < 16; ++i) v[i] *= p[i];
  }
  void multiply(const Broadcast& b) {
    for (int i = 0; i < 16; ++i) v[i] *= b.v;
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
  // out[i] = c[i].sum() for 16 of them.
  static void sums(const Lane16* c, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = c[i].sum();
  }
};

struct PairBroadcast {
  int16_t v[2];
  explicit PairBroadcast(const uint32_t* p) { std::memcpy(v, p, 4); }
};

struct Pairs16 {
  int16_t v[32];
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

struct Quads16 {
  uint8_t v[64];
};

struct DotQ4 {
  int32_t v[16];
  void zero() { std::memset(v, 0, sizeof v); }
  void step(const Quads16& w, const PairBroadcast& b) {
    int8_t x[4];
    std::memcpy(x, b.v, 4);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) v[i] += w.v[4 * i + j] * x[j];
  }
  Lane16 sums() const {
    Lane16 lane;
    for (int i = 0; i < 16; ++i) lane.v[i] = static_cast<float>(v[i]);
    return lane;
  }
};

using DotQ8 = DotQ4;

template <class Lane>
void keep(Lane& lane) {
  asm volatile("" : : "r"(&lane) : "memory");
}

}  // namespace

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kPortable{"portable", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
