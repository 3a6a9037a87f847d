// The kernel behind attention.h, compiled once per instruction set after matmul_impl.h, whose lanes it uses.
//
// Tiling. A job is one row and one key head with the query heads that share it, so that every key and value is read
// from memory once. First come all scores (a dot product of head_dim / 16 lanes for each key and query head), then
// softmax in place, then the values: up to kValueHeads query heads x kValueLanes lanes of the output stay in registers
// over the whole length.
// Data movement. length * head_dim of keys and of values per job, once; scores stay in L1 or L2.
// Limit. Memory bandwidth. Jobs are not split, so rows * key heads bound the number of threads.

#include "attention.h"

namespace {

// Machine constants.
constexpr int kValueLanes = kMaxRows >= 12 ? 4 : 2;  // bound by registers: 3 x 4 sums, 4 values and a weight of 32
constexpr int kValueHeads = 3;                       // (AVX2: 3 x 2 sums of 2 registers each of 16)
constexpr int64_t kKeysAhead = 16;                   // 2 KiB (16-bit) or 4 KiB of keys of 64 in flight; see kBytesAhead
constexpr int64_t kAttentionGrain = 65536;           // FMAs worth a thread, as kFmaGrain

// e^v for v <= 0, a polynomial after Cody and Waite's reduction; 0 below -87. Multiplications and additions only, so
// that all sets agree to the bit.
inline float exp_nonpositive(float v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = v * kLog2e + kMagic;
  const float n = shifted - kMagic;
  const float r = (v - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t power = (bits_of(shifted) + 127u) << 23;
  float two_to_n;
  std::memcpy(&two_to_n, &power, 4);
  return v < -87.0f ? 0.0f : p * two_to_n;
}

// scores[padded length], the tail past `length` ignored: they become exponentials, the sum of which is returned.
float exponentials(float* scores, int64_t length) {
  const int64_t padded = (length + kPanel - 1) / kPanel * kPanel;
  for (int64_t j = length; j < padded; ++j) scores[j] = -__builtin_inff();
  float top = scores[0];
  for (int64_t j = 1; j < length; ++j) top = scores[j] > top ? scores[j] : top;
  if (top == -__builtin_inff()) top = 0.0f;
  alignas(64) float sums[kPanel] = {};
  for (int64_t j = 0; j < padded; j += kPanel) {
    for (int64_t i = 0; i < kPanel; ++i) {
      const float e = exp_nonpositive(scores[j + i] - top);
      scores[j + i] = e;
      sums[i] += e;
    }
  }
  Lane16 all;
  all.load(sums);
  return all.sum();
}

// out[heads][lanes * 16] = sum over keys of p[head][key] * v[key], times 1 / sum of p.
template <int Heads, int Lanes, class T>
void weigh_values(const float* p, int64_t p_stride, const T* v, int64_t v_stride, int64_t length, const float* inverse,
                  T* out, int64_t out_stride) {
  Lane16 c[Heads][Lanes];
#pragma GCC unroll 4
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
    for (int l = 0; l < Lanes; ++l) c[h][l].zero();
  for (int64_t j = 0; j < length; ++j, v += v_stride) {
    Lane16 w[Lanes];
#pragma GCC unroll 4
    for (int l = 0; l < Lanes; ++l) {
      load(w[l], v + l * kPanel);
      __builtin_prefetch(v + kKeysAhead * v_stride + l * kPanel);
    }
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
      const Broadcast b(p + h * p_stride + j);
#pragma GCC unroll 4
      for (int l = 0; l < Lanes; ++l) c[h][l].step(w[l], b);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < Heads; ++h) {
    alignas(64) float factor[kPanel];
    for (float& f : factor) f = inverse[h];
#pragma GCC unroll 4
    for (int l = 0; l < Lanes; ++l) {
      c[h][l].multiply(factor);
      store(c[h][l], out + h * out_stride + l * kPanel);
    }
  }
}

template <int Heads, class T>
void weigh_all_values(const float* p, int64_t p_stride, const T* v, int64_t v_stride, int64_t length,
                      const float* inverse, T* out, int64_t head_dim) {
  constexpr int64_t kWide = kValueLanes * kPanel;
  int64_t d = 0;
  for (; d + kWide <= head_dim; d += kWide)
    weigh_values<Heads, kValueLanes>(p, p_stride, v + d, v_stride, length, inverse, out + d, head_dim);
  for (; d < head_dim; d += kPanel)
    weigh_values<Heads, 1>(p, p_stride, v + d, v_stride, length, inverse, out + d, head_dim);
}

template <class T>
void attend_job(const t2::DecodeAttention& a, int64_t row, int64_t key_head) {
  thread_local Scratch scratch;
  const int64_t group = a.heads / a.key_heads, first_head = key_head * group, dim = a.head_dim;
  const uint8_t* allowed = a.allowed ? a.allowed + row * a.allowed_row_stride : nullptr;
  int64_t begin = 0;
  while (allowed && begin < a.length && !allowed[begin * a.allowed_stride]) ++begin;
  int64_t end = a.length;
  while (allowed && end > begin && !allowed[(end - 1) * a.allowed_stride]) --end;
  const int64_t length = end - begin, stride = (length + kPanel - 1) / kPanel * kPanel;
  T* out = static_cast<T*>(a.out) + (row * a.heads + first_head) * dim;
  if (length == 0) {
    std::memset(static_cast<void*>(out), 0, static_cast<size_t>(group * dim) * sizeof(T));
    return;
  }
  float* query = reinterpret_cast<float*>(scratch.get((group * (dim + stride + 1)) * 4));
  float* scores = query + group * dim;
  float* inverse = scores + group * stride;
  for (int64_t h = 0; h < group; ++h) {
    const T* q = static_cast<const T*>(a.query) + row * a.query_strides.row + (first_head + h) * a.query_strides.head;
    widen(q, dim, query + h * dim);
    for (int64_t d = 0; d < dim; ++d) query[h * dim + d] *= a.scale;
  }
  const t2::HeadStrides& ks = a.key_strides;
  const int64_t key_row = a.key_rows ? a.key_rows[row] : row;
  const T* key = static_cast<const T*>(a.keys) + key_row * ks.row + key_head * ks.head + begin * ks.key;
  for (int64_t j = 0; j < length; ++j, key += ks.key) {
    const bool visible = allowed == nullptr || allowed[(begin + j) * a.allowed_stride];
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(key + kKeysAhead * ks.key + d);
    }
    for (int64_t h = 0; h < group; ++h) {
      Lane16 c;
      c.zero();
      for (int64_t d = 0; d < dim; d += kPanel) {
        Lane16 k, q;
        load(k, key + d);
        q.load(query + h * dim + d);
        c.step(k, q);
      }
      scores[h * stride + j] = visible ? c.sum() : -__builtin_inff();
    }
  }
  for (int64_t h = 0; h < group; ++h) inverse[h] = 1.0f / exponentials(scores + h * stride, length);
  const t2::HeadStrides& vs = a.value_strides;
  const T* value = static_cast<const T*>(a.values) + key_row * vs.row + key_head * vs.head + begin * vs.key;
  for (int64_t h = 0; h < group; h += kValueHeads) {
    const float* p = scores + h * stride;
    T* y = out + h * dim;
    switch (smaller(kValueHeads, group - h)) {
      case 3: weigh_all_values<3>(p, stride, value, vs.key, length, inverse + h, y, dim); break;
      case 2: weigh_all_values<2>(p, stride, value, vs.key, length, inverse + h, y, dim); break;
      default: weigh_all_values<1>(p, stride, value, vs.key, length, inverse + h, y, dim); break;
    }
  }
}

void attend(const t2::DecodeAttention& a, ParallelFor parallel_for) {
  const int64_t at_least = grain(kAttentionGrain, a.length * a.head_dim);
  parallel(parallel_for, a.rows * a.key_heads, at_least, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / a.key_heads, key_head = job % a.key_heads;
      with_activation(a.dtype, [&]<class T>(T) { attend_job<T>(a, row, key_head); });
    }
  });
}

}  // namespace
