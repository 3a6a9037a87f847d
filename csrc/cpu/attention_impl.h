// The kernel behind attention.h, compiled once per instruction set after matmul_impl.h, whose lanes it uses.
//
// Tiling. A job is one key head of some rows that look at the same row of keys, one row in a decode step and a few
// tokens of a prompt, with the query heads that share the key head. First come all scores: 16 keys at a time are made
// float32 in L1, every query head takes their dot products in head_dim / 16 steps of 16 lanes, and the lanes of 16 sums
// are added together. Then softmax in place, then the values: kValueHeads query heads x kValueLanes lanes of the output
// stay in registers over all keys that the rows share. Tiles are taken from both ends in turn: later tokens of a prompt
// have more keys.
// Data movement. length * head_dim of keys and of values per job, once; scores stay in L1 or L2.
// Limit. Memory bandwidth in a decode step; in a prompt arithmetic, 2 * head_dim / 16 FMAs a score and as much beside
// them. Jobs are not split, so rows * key heads bound the number of threads of a decode step.

#include "attention.h"

namespace {

// Machine constants.
constexpr int kValueLanes = kMaxRows >= 12 ? 4 : 2;  // bound by registers: 3 x 4 sums, 4 values and a weight of 32
constexpr int kValueHeads = 3;                       // (AVX2: 3 x 2 sums of 2 registers each of 16)
constexpr int64_t kKeysAhead = 16;                   // 2 KiB (16-bit) or 4 KiB of keys of 64 in flight; see kBytesAhead
constexpr int64_t kJobRows = 16, kJobHeads = 12;    // of a job: rows, and rows x query heads that share a key head
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

// sums[heads][lanes * 16] += sum over keys of p[head][key] * v[key].
template <int Heads, int Lanes, class T>
void add_values(const float* p, int64_t p_stride, const T* v, int64_t v_stride, int64_t length, float* sums,
                int64_t sums_stride) {
  Lane16 c[Heads][Lanes];
#pragma GCC unroll 4
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
    for (int l = 0; l < Lanes; ++l) c[h][l].load(sums + h * sums_stride + l * kPanel);
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
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
    for (int l = 0; l < Lanes; ++l) c[h][l].store(sums + h * sums_stride + l * kPanel);
}

template <int Heads, class T>
void add_all_values(const float* p, int64_t p_stride, const T* v, int64_t v_stride, int64_t length, float* sums,
                    int64_t dim) {
  constexpr int64_t kWide = kValueLanes * kPanel;
  int64_t d = 0;
  for (; d + kWide <= dim; d += kWide)
    add_values<Heads, kValueLanes>(p, p_stride, v + d, v_stride, length, sums + d, dim);
  for (; d < dim; d += kPanel) add_values<Heads, 1>(p, p_stride, v + d, v_stride, length, sums + d, dim);
}

template <class T>
void add_values_of_heads(const float* p, int64_t p_stride, const T* v, int64_t v_stride, int64_t length, float* sums,
                         int64_t dim, int64_t heads) {
  if (length <= 0) return;
  for (int64_t h = 0; h < heads; h += kValueHeads, p += kValueHeads * p_stride, sums += kValueHeads * dim) {
    switch (smaller(kValueHeads, heads - h)) {
      case 3: add_all_values<3>(p, p_stride, v, v_stride, length, sums, dim); break;
      case 2: add_all_values<2>(p, p_stride, v, v_stride, length, sums, dim); break;
      default: add_all_values<1>(p, p_stride, v, v_stride, length, sums, dim); break;
    }
  }
}

// scores[head][key] = <query[head], key> for keys in [length, dim] and their float32 copies of kPanel at a time.
template <class T>
void score_keys(const float* query, int64_t heads, const T* key, int64_t key_stride, const T* value,
                int64_t value_stride, int64_t length, int64_t dim, float* wide, float* scores, int64_t stride) {
  for (int64_t j = 0; j < length; j += kPanel) {
    const int64_t count = smaller(kPanel, length - j);
    for (int64_t i = 0; i < count; ++i, key += key_stride, value += value_stride) {
      for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(key + kKeysAhead * key_stride + d);
        __builtin_prefetch(value + d);
      }
      for (int64_t d = 0; d < dim; d += kPanel) {
        Lane16 k;
        load(k, key + d);
        k.store(wide + i * dim + d);
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      Lane16 c[kPanel];
      if (count == kPanel) {
#pragma GCC unroll 16
        for (int i = 0; i < kPanel; ++i) c[i].zero();
        for (int64_t d = 0; d < dim; d += kPanel) {
          Lane16 q;
          q.load(query + h * dim + d);
#pragma GCC unroll 16
          for (int i = 0; i < kPanel; ++i) {
            Lane16 k;
            k.load(wide + i * dim + d);
            c[i].step(k, q);
          }
        }
        Lane16::sums(c, scores + h * stride + j);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        c[0].zero();
        for (int64_t d = 0; d < dim; d += kPanel) {
          Lane16 k, q;
          q.load(query + h * dim + d);
          k.load(wide + i * dim + d);
          c[0].step(k, q);
        }
        scores[h * stride + j + i] = c[0].sum();
      }
    }
  }
}

// Keys from the first to the last that a row may look at.
struct KeyRange {
  int64_t begin, end;
};

KeyRange keys_of(const t2::DecodeAttention& a, int64_t row) {
  KeyRange range{0, a.length};
  if (a.key_ranges != nullptr) range = {a.key_ranges[2 * row], a.key_ranges[2 * row + 1]};
  if (a.allowed == nullptr) return range;
  const uint8_t* allowed = a.allowed + row * a.allowed_row_stride;
  const bool whole = a.allowed_stride == 1;  // then 8 at a time
  const auto none = [&](int64_t from) {
    uint64_t eight;
    std::memcpy(&eight, allowed + from, 8);
    return eight == 0;
  };
  while (whole && range.begin + 8 <= range.end && none(range.begin)) range.begin += 8;
  while (range.begin < range.end && !allowed[range.begin * a.allowed_stride]) ++range.begin;
  while (whole && range.end - 8 >= range.begin && none(range.end - 8)) range.end -= 8;
  while (range.end > range.begin && !allowed[(range.end - 1) * a.allowed_stride]) --range.end;
  return range;
}

// Rows [first, first + rows), at most kJobRows, that look at the same row of keys and values.
template <class T>
void attend_job(const t2::DecodeAttention& a, int64_t first, int64_t rows, int64_t key_head) {
  thread_local Scratch scratch;
  const int64_t group = a.heads / a.key_heads, first_head = key_head * group, dim = a.head_dim, heads = rows * group;
  KeyRange own[kJobRows], any{a.length, 0}, all{0, a.length};  // each row's, those of some row, those of all rows
  for (int64_t r = 0; r < rows; ++r) {
    own[r] = keys_of(a, first + r);
    if (own[r].begin < own[r].end) any = {smaller(any.begin, own[r].begin), larger(any.end, own[r].end)};
    all = {larger(all.begin, own[r].begin), smaller(all.end, own[r].end)};
  }
  const int64_t length = larger(int64_t{0}, any.end - any.begin);
  const int64_t stride = (length + 2 * kPanel - 1) / kPanel * kPanel;  // softmax pads each row's end
  float* query = reinterpret_cast<float*>(scratch.get((heads * (2 * dim + stride + 1) + kPanel * dim) * 4));
  float* sums = query + heads * dim;
  float* scores = sums + heads * dim;
  float* wide = scores + heads * stride;
  float* inverse = wide + kPanel * dim;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t row = first + h / group, head = first_head + h % group;
    widen(static_cast<const T*>(a.query) + row * a.query_strides.row + head * a.query_strides.head, dim,
          query + h * dim);
    for (int64_t d = 0; d < dim; ++d) query[h * dim + d] *= a.scale;
  }
  const int64_t key_row = a.key_rows ? a.key_rows[first] : first;
  const t2::HeadStrides &ks = a.key_strides, &vs = a.value_strides;
  const T* key = static_cast<const T*>(a.keys) + key_row * ks.row + key_head * ks.head;
  const T* value = static_cast<const T*>(a.values) + key_row * vs.row + key_head * vs.head;
  score_keys(query, heads, key + any.begin * ks.key, ks.key, value + any.begin * vs.key, vs.key, length, dim, wide, scores,
             stride);
  std::memset(sums, 0, static_cast<size_t>(heads * dim) * 4);
  for (int64_t h = 0; h < heads; ++h) {
    const KeyRange& range = own[h / group];
    float* p = scores + h * stride + range.begin - any.begin;
    if (a.allowed != nullptr) {
      const uint8_t* allowed = a.allowed + (first + h / group) * a.allowed_row_stride + range.begin * a.allowed_stride;
      for (int64_t j = 0; j < range.end - range.begin; ++j)
        p[j] = allowed[j * a.allowed_stride] ? p[j] : -__builtin_inff();
    }
    inverse[h] = range.begin < range.end ? 1.0f / exponentials(p, range.end - range.begin) : 0.0f;
  }
  // Each row's keys in order: those before and after what all rows look at are added row by row.
  const auto add = [&](int64_t r, int64_t count, int64_t begin, int64_t end) {
    add_values_of_heads(scores + r * group * stride + begin - any.begin, stride, value + begin * vs.key, vs.key,
                        end - begin, sums + r * group * dim, dim, count * group);
  };
  if (all.begin < all.end) {
    for (int64_t r = 0; r < rows; ++r) add(r, 1, own[r].begin, all.begin);
    add(0, rows, all.begin, all.end);
    for (int64_t r = 0; r < rows; ++r) add(r, 1, all.end, own[r].end);
  } else {
    for (int64_t r = 0; r < rows; ++r) add(r, 1, own[r].begin, own[r].end);
  }
  for (int64_t h = 0; h < heads; ++h) {
    T* out = static_cast<T*>(a.out) + ((first + h / group) * a.heads + first_head + h % group) * dim;
    alignas(64) float factor[kPanel];
    for (float& f : factor) f = inverse[h];
    for (int64_t d = 0; d < dim; d += kPanel) {
      Lane16 c;
      c.load(sums + h * dim + d);
      c.multiply(factor);
      store(c, out + d);
    }
  }
}

void attend(const t2::DecodeAttention& a, ParallelFor parallel_for) {
  const int64_t group = a.heads / a.key_heads, most = larger(int64_t{1}, smaller(kJobRows, kJobHeads / group));
  thread_local Scratch scratch;
  int64_t* const starts = reinterpret_cast<int64_t*>(scratch.get((a.rows + 1) * 8));
  int64_t tiles = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    const bool joins = a.key_rows != nullptr && row > 0 && a.key_rows[row] == a.key_rows[row - 1];
    if (!joins || row - starts[tiles - 1] == most) starts[tiles++] = row;
  }
  starts[tiles] = a.rows;
  const int64_t at_least = grain(kAttentionGrain, a.rows * a.length * a.head_dim / tiles);
  parallel(parallel_for, tiles * a.key_heads, at_least, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t turn = job / a.key_heads, tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      with_activation(a.dtype, [&]<class T>(T) {
        attend_job<T>(a, starts[tile], starts[tile + 1] - starts[tile], job % a.key_heads);
      });
    }
  });
}

}  // namespace
