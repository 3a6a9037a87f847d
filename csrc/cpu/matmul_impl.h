// The driver and micro-kernels behind matmul.h, compiled once per instruction set. The including file defines, in an
// anonymous namespace:
//   Lane16                  16 fp32 lanes: zero, load and store (float, bf16, f16), step with a Broadcast, multiply,
//                           scale_and_add; load_even, load_odd take every other one of 32 bfloat16
//   Pairs16, PairBroadcast  16 pairs of 16-bit terms of M, one pair of terms of x
//   DotI16                  16 int32 lanes: zero, step, add_to (accumulators += lanes * scale)
//   DotBf16                 16 fp32 lanes: zero, load, store, step; only used if kBf16Products
//   keep                    makes the compiler believe that a lane's value is used
//   half_to_float, float_to_half
//   kMaxRows                rows of the largest register tile
//   panels_per_tile(rows)   panels that a tile of so many rows spans
//
// Tiling. A thread owns a range of panels. Rows go in blocks of 256, which are scaled, converted to what the arithmetic
// takes (fp32, bf16 pairs, int16 pairs with a scale per kBlock terms) and interleaved tile by tile ([tile][k][rows of
// tile]), so that a micro-kernel reads one stream of broadcasts. Within a group of 8 panels the reduction advances a
// slice at a time: the row block's slice stays in L2, the panels' slice in L1 for all tiles. Accumulators leave
// registers between slices as fp32, which rounds nothing.
// Data movement. Every weight byte is read from memory once per row block and used straight from its storage format by
// every row tile; matrices that are not packed, or packed the other way round, are gathered into fp32 panels first, a
// slice at a time.
// Limit: memory bandwidth for few rows, multiply-adds for many; packing x shows only where M has few columns.

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "matmul.h"

namespace {

using t2::Arithmetic;
using t2::DType;
using t2::kBlock;
using t2::kMaxParts;
using t2::kMaxProducts;
using t2::kPanel;
using t2::Matrix;
using t2::ParallelFor;
using t2::Product;
using t2::RowInput;
using t2::RowOutput;
using t2::Storage;

// std::min would be emitted for this file's instruction set and shared, by the linker, with everyone.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t grain(int64_t enough, int64_t each) { return each <= 0 || each >= enough ? 1 : enough / each; }
inline int64_t even(int64_t k) { return k + (k & 1); }

constexpr int64_t kRowBlock = 256;
constexpr int64_t kSlice = 256;
constexpr int64_t kGroup = 8;
constexpr int64_t kBytesAhead = 6144;  // what one core waits for at a time: latency times its bandwidth, and some

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(int8_t v) { return static_cast<float>(v); }
inline float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(f16 v) { return half_to_float(v.bits); }

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, bf16* out) {
  const uint32_t bits = bits_of(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float v, f16* out) { out->bits = float_to_half(v); }

// Per-thread scratch that grows and stays: a call allocates nothing once warm.
struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
  char* get(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = 0;
      data = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
      if (data == nullptr) std::abort();
      size = bytes;
    }
    return data;
  }
};

template <class Fn>
void parallel(ParallelFor parallel_for, int64_t count, int64_t at_least, const Fn& fn) {
  parallel_for(
      0, count, at_least, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Fn*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// What a micro-kernel prefetches: `start` bytes from the first weight on, `step` bytes further with every load of a
// panel, and from term `turn` on `jump` bytes further still.
struct Ahead {
  int64_t start, step, turn, jump;
};

// Micro-kernels. x: [depth][MR] (fp32) or [depth / 2][MR] (pairs). w: NP panels, w_stride elements apart.
// acc: NP x [rows][16], acc_stride floats apart; `first` starts it from zero.

template <int MR, int NP, class T>
void micro(const float* x, const T* w, int64_t w_stride, int64_t depth, float* acc, int64_t acc_stride, bool first,
           Ahead ahead) {
  Lane16 c[MR][NP];
  const char* next = reinterpret_cast<const char*>(w) + ahead.start;
  int64_t stop = smaller(ahead.turn, depth);
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) {
      if (first) {
        c[r][p].zero();
      } else {
        c[r][p].load(acc + p * acc_stride + r * kPanel);
      }
    }
  }
  if constexpr (std::is_same_v<T, bf16>) {
    for (int64_t k = 0; k < depth; stop = depth, next += ahead.jump) {
      for (; k < stop; k += 2, next += ahead.step) {
        Lane16 v[NP];
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) {
          v[p].load_even(w + p * w_stride + k * kPanel);
          __builtin_prefetch(next + p * w_stride * static_cast<int64_t>(sizeof(*w)));
        }
#pragma GCC unroll 24
        for (int r = 0; r < MR; ++r) {
          const Broadcast b(x + k * MR + r);
#pragma GCC unroll 8
          for (int p = 0; p < NP; ++p) c[r][p].step(v[p], b);
        }
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) v[p].load_odd(w + p * w_stride + k * kPanel);
#pragma GCC unroll 24
        for (int r = 0; r < MR; ++r) {
          const Broadcast b(x + (k + 1) * MR + r);
#pragma GCC unroll 8
          for (int p = 0; p < NP; ++p) c[r][p].step(v[p], b);
        }
      }
    }
  } else {
    for (int64_t k = 0; k < depth; stop = depth, next += ahead.jump) {
      for (; k < stop; ++k, next += ahead.step) {
        Lane16 v[NP];
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) {
          v[p].load(w + p * w_stride + k * kPanel);
          __builtin_prefetch(next + p * w_stride * static_cast<int64_t>(sizeof(*w)));
        }
#pragma GCC unroll 24
        for (int r = 0; r < MR; ++r) {
          const Broadcast b(x + k * MR + r);
#pragma GCC unroll 8
          for (int p = 0; p < NP; ++p) c[r][p].step(v[p], b);
        }
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) c[r][p].store(acc + p * acc_stride + r * kPanel);
  }
}

template <int MR, int NP>
void micro_bf16(const uint32_t* x, const bf16* w, int64_t w_stride, int64_t depth, float* acc, int64_t acc_stride,
                bool first, Ahead ahead) {
  DotBf16 c[MR][NP];
  const char* next = reinterpret_cast<const char*>(w) + ahead.start;
  int64_t stop = smaller(ahead.turn, depth);
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) {
      if (first) {
        c[r][p].zero();
      } else {
        c[r][p].load(acc + p * acc_stride + r * kPanel);
      }
    }
  }
  for (int64_t k = 0; k < depth; stop = depth, next += ahead.jump) {
    for (; k < stop; k += 2, x += MR, next += ahead.step) {
      Pairs16 v[NP];
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) {
        v[p].load(w + p * w_stride + k * kPanel);
        __builtin_prefetch(next + p * w_stride * static_cast<int64_t>(sizeof(*w)));
      }
#pragma GCC unroll 24
      for (int r = 0; r < MR; ++r) {
        const PairBroadcast b(x + r);
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) c[r][p].step(v[p], b);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) c[r][p].store(acc + p * acc_stride + r * kPanel);
  }
}

// One block of at most kBlock terms. scale: the block's activation scales of these rows.
template <int MR, int NP>
void micro_i16(const uint32_t* x, const float* scale, const int8_t* w, int64_t w_stride, int64_t depth, float* acc,
               int64_t acc_stride, bool first, Ahead ahead) {
  DotI16 c[MR][NP];
  const char* next = reinterpret_cast<const char*>(w) + ahead.start;
  int64_t stop = smaller(ahead.turn, depth);
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) c[r][p].zero();
  }
  for (int64_t k = 0; k < depth; stop = depth, next += ahead.jump) {
    for (; k < stop; k += 2, x += MR, next += ahead.step) {
      Pairs16 v[NP];
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) {
        v[p].load(w + p * w_stride + k * kPanel);
        __builtin_prefetch(next + p * w_stride * static_cast<int64_t>(sizeof(*w)));
      }
#pragma GCC unroll 24
      for (int r = 0; r < MR; ++r) {
        const PairBroadcast b(x + r);
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) c[r][p].step(v[p], b);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) c[r][p].add_to(acc + p * acc_stride + r * kPanel, scale[r], first);
  }
}

template <class T>
using MicroFn = void (*)(const float*, const T*, int64_t, int64_t, float*, int64_t, bool, Ahead);
using MicroBf16Fn = void (*)(const uint32_t*, const bf16*, int64_t, int64_t, float*, int64_t, bool, Ahead);
using MicroI16Fn = void (*)(const uint32_t*, const float*, const int8_t*, int64_t, int64_t, float*, int64_t, bool, Ahead);

// The micro-kernel for so many rows: over panels_per_tile(rows) panels if `wide`, else over one.
template <class T, int MR = kMaxRows>
MicroFn<T> micro_for(int64_t rows, bool wide) {
  if constexpr (MR == 0) {
    return nullptr;
  } else {
    if (rows == MR) return wide ? &micro<MR, panels_per_tile(MR), T> : &micro<MR, 1, T>;
    return micro_for<T, MR - 1>(rows, wide);
  }
}

template <int MR = kMaxRows>
MicroBf16Fn micro_bf16_for(int64_t rows, bool wide) {
  if constexpr (MR == 0 || !kBf16Products) {
    return nullptr;
  } else {
    if (rows == MR) return wide ? &micro_bf16<MR, panels_per_tile(MR)> : &micro_bf16<MR, 1>;
    return micro_bf16_for<MR - 1>(rows, wide);
  }
}

template <int MR = kMaxRows>
MicroI16Fn micro_i16_for(int64_t rows, bool wide) {
  if constexpr (MR == 0) {
    return nullptr;
  } else {
    if (rows == MR) return wide ? &micro_i16<MR, panels_per_tile(MR)> : &micro_i16<MR, 1>;
    return micro_i16_for<MR - 1>(rows, wide);
  }
}

// Splits `rows` into the fewest tiles of at most kMaxRows rows, sizes differing by at most one.
struct Tiles {
  int64_t count, small, large_count;
  explicit Tiles(int64_t rows) : count((rows + kMaxRows - 1) / kMaxRows), small(rows / count), large_count(rows % count) {}
  int64_t rows(int64_t tile) const { return small + (tile < large_count ? 1 : 0); }
  int64_t begin(int64_t tile) const { return tile * small + smaller(tile, large_count); }
};

Arithmetic arithmetic(const RowInput& in, const Matrix& m) {
  if (m.storage == Storage::panels && m.dtype == DType::i8) return Arithmetic::i16;
  if (m.storage == Storage::panels && m.dtype == DType::bf16 && kBf16Products && in.round_to_bf16)
    return Arithmetic::bf16;
  return Arithmetic::f32;
}

// The terms [k0, k0 + k) of a row block as one arithmetic wants them; terms are padded with zeros to an even number.
struct PackedRows {
  RowInput in;
  Arithmetic arithmetic;
  int64_t k0, k;
  char* data;    // [tile][even(k)][rows of tile] fp32, or [tile][even(k) / 2][rows of tile] pairs
  float* scale;  // i16: [ceil(k / kBlock)][rows of the block of rows]

  int64_t element_bytes() const { return arithmetic == Arithmetic::f32 ? 4 : 2; }
  int64_t data_bytes(int64_t rows) const { return (rows * even(k) * element_bytes() + 63) / 64 * 64; }
  int64_t scale_bytes(int64_t rows) const {
    return arithmetic == Arithmetic::i16 ? ((k + kBlock - 1) / kBlock * rows * 4 + 63) / 64 * 64 : 0;
  }
  bool same(const PackedRows& other) const {
    return in.data == other.in.data && in.scales == nullptr && other.in.scales == nullptr &&
           in.component_scale == nullptr && other.in.component_scale == nullptr && arithmetic == other.arithmetic &&
           k0 == other.k0 && k == other.k && in.stride == other.in.stride;
  }
  const float* floats(int64_t first_row, int64_t tile_rows, int64_t term) const {
    return reinterpret_cast<const float*>(data) + first_row * even(k) + term * tile_rows;
  }
  const uint32_t* pairs(int64_t first_row, int64_t tile_rows, int64_t term) const {
    return reinterpret_cast<const uint32_t*>(data) + (first_row * even(k) + term * tile_rows) / 2;
  }
};

template <class T>
void widen(const T* x, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + kPanel <= count; k += kPanel) {
    Lane16 v;
    v.load(x + k);
    v.store(out + k);
  }
  for (; k < count; ++k) out[k] = to_float(x[k]);
}

void multiply(float* v, const float* factor, int64_t count) {
  int64_t k = 0;
  for (; k + kPanel <= count; k += kPanel) {
    Lane16 lane;
    lane.load(v + k);
    lane.multiply(factor + k);
    lane.store(v + k);
  }
  for (; k < count; ++k) v[k] *= factor[k];
}

template <class T>
void narrow(const float* v, int64_t count, T* out) {
  int64_t k = 0;
  for (; k + kPanel <= count; k += kPanel) {
    Lane16 lane;
    lane.load(v + k);
    lane.store(out + k);
  }
  for (; k < count; ++k) from_float(v[k], out + k);
}

// Row `row`, scaled, as fp32: out[even(k)].
void scaled_row(const PackedRows& p, int64_t row, float* out) {
  const int64_t start = row * p.in.stride + p.k0;
  switch (p.in.dtype) {
    case DType::f32: widen(static_cast<const float*>(p.in.data) + start, p.k, out); break;
    case DType::bf16: widen(static_cast<const bf16*>(p.in.data) + start, p.k, out); break;
    default: widen(static_cast<const f16*>(p.in.data) + start, p.k, out); break;
  }
  if (p.in.scales) {
    const float* scale = p.in.scales + p.in.slots[row / p.in.rows_per_slot] * p.in.scales_stride + p.k0;
    multiply(out, scale, p.k);
  }
  if (p.in.component_scale) {
    const float* component = p.in.component_scale + p.k0;
    multiply(out, component, p.k);
  }
  if (p.k & 1) out[p.k] = 0.0f;
}

// Rounds at most kBlock values to 16-bit integers times the returned scale, which is NaN if a value is not finite.
float quantize(const float* v, int64_t count, int16_t* out) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t magnitude = bits_of(v[k]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float top;
  std::memcpy(&top, &largest, 4);
  constexpr float kTiny = 1e-33f;  // below, 32767 / top would overflow
  const bool finite = largest < 0x7f800000u;
  const float inverse = finite && top > kTiny ? 32767.0f / top : 0.0f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  for (int64_t k = 0; k < count; ++k) out[k] = static_cast<int16_t>(bits_of(v[k] * inverse + kMagic));
  if (!finite) return __builtin_nanf("");
  return top > kTiny ? top / 32767.0f : 0.0f;
}

void pack_row(const PackedRows& p, int64_t row0, int64_t rows, const Tiles& tiles, int64_t tile, int64_t index) {
  thread_local Scratch scratch;
  const int64_t k = even(p.k), step = tiles.rows(tile), first_row = tiles.begin(tile);
  float* v = reinterpret_cast<float*>(scratch.get(k * 6));
  scaled_row(p, row0 + first_row + index, v);
  if (p.arithmetic == Arithmetic::f32) {
    float* out = reinterpret_cast<float*>(p.data) + first_row * k + index;
    for (int64_t j = 0; j < k; ++j) out[j * step] = v[j];
    return;
  }
  char* pairs = reinterpret_cast<char*>(v + k);
  if (p.arithmetic == Arithmetic::bf16) {
    narrow(v, k, reinterpret_cast<bf16*>(pairs));
  } else {
    int16_t* out = reinterpret_cast<int16_t*>(pairs);
    for (int64_t j = 0; j < k; j += kBlock)
      p.scale[j / kBlock * rows + first_row + index] = quantize(v + j, smaller(kBlock, k - j), out + j);
  }
  uint32_t* out = reinterpret_cast<uint32_t*>(p.data) + first_row * k / 2 + index;
  for (int64_t j = 0; j < k / 2; ++j) std::memcpy(out + j * step, pairs + j * 4, 4);
}

// Gathers terms [k0, k0 + depth) of 16 columns of a matrix that is not packed this way round, as fp32: out[depth][16].
template <class T>
void gather_panel(const Matrix& m, int64_t panel, int64_t k0, int64_t depth, float* out) {
  const T* data = static_cast<const T*>(m.data);
  const int64_t n0 = panel * kPanel;
  const int64_t columns = smaller(kPanel, m.n - n0);
  if (columns < kPanel) std::memset(out, 0, static_cast<size_t>(depth * kPanel) * sizeof(float));
  if (m.storage == Storage::panels_transposed) {
    // Stored panels hold 16 terms of this product side by side: element (n, k) at [k / 16][n][k % 16], or, paired,
    // [k / 16][n / 2][k % 16][n % 2].
    constexpr bool pairs = std::is_same_v<T, bf16> || std::is_same_v<T, int8_t>;
    const int64_t stored = pairs ? even(m.n) : m.n;
    for (int64_t k = 0; k < depth; ++k) {
      const T* w = data + ((k0 + k) / kPanel * stored + n0) * kPanel + (k0 + k) % kPanel * (pairs ? 2 : 1);
      if constexpr (pairs) {
        for (int64_t j = 0; j < columns; ++j) out[k * kPanel + j] = to_float(w[j / 2 * 2 * kPanel + (j & 1)]);
      } else {
        for (int64_t j = 0; j < columns; ++j) out[k * kPanel + j] = to_float(w[j * kPanel]);
      }
    }
    return;
  }
  const T* w = data + n0 * m.stride_n + k0 * m.stride_k;
  if (m.stride_n == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; ++j) out[k * kPanel + j] = to_float(w[k * m.stride_k + j]);
  } else {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < depth; ++k) out[k * kPanel + j] = to_float(w[j * m.stride_n + k * m.stride_k]);
  }
}

// Where weights lie: elements of a panel, bytes of an element, bytes that a micro-kernel loads of a panel at a time.
struct Stream {
  int64_t panel_size, element_bytes, load_bytes;
};

template <class T>
Stream stream_of(const Matrix& m) {
  const bool pairs = t2::paired(m.dtype);
  const int64_t bytes = sizeof(T);
  return {(pairs ? even(m.k) : m.k) * kPanel, bytes, kPanel * bytes * (pairs ? 2 : 1)};
}

// Terms of a slice: all of them for one tile, which keeps its sums in registers, or where a panel fits in L1 anyway.
int64_t slice_of(const Tiles& tiles, int64_t k, const Stream& stream) {
  constexpr int64_t kNearBytes = 20 << 10;
  return tiles.count == 1 || stream.panel_size * stream.element_bytes <= kNearBytes ? k : kSlice;
}

// One tile reads `run` panels at once, to their end `terms` terms from here, and the next run after them.
Ahead stream_ahead(const Stream& stream, int64_t run, int64_t terms) {
  const int64_t term_bytes = kPanel * stream.element_bytes, each = kBytesAhead / run;
  if (term_bytes == 0) return {0, 0, terms, 0};
  const int64_t before_end = terms - each / term_bytes;
  return {each, stream.load_bytes, before_end < 0 ? 0 : even(before_end),
          (run - 1) * stream.panel_size * stream.element_bytes};
}

// Visits every (slice of terms, run of panels, row tile) of one part in the order that keeps slices in cache:
// prepare(panel, panels, k0, depth) once per run, then tile(row, rows, panel, index in run, wide, k0, depth, ahead) for
// each. The tiles of a run share the work of prefetching the next one, so that memory is read at an even pace.
template <class Prepare, class Tile>
void sweep(const Tiles& tiles, int64_t begin, int64_t end, int64_t k, int64_t slice, const Stream& stream,
           const Prepare& prepare, const Tile& tile) {
  const int64_t span = panels_per_tile(static_cast<int>(tiles.rows(0)));
  const int64_t term_bytes = kPanel * stream.element_bytes;
  if (tiles.count == 1 && begin + span < end) {  // nothing is used twice: one run after the other, from end to end
    for (int64_t panel = begin; panel < end; panel += span)
      sweep(tiles, panel, smaller(panel + span, end), k, slice, stream, prepare, tile);
    return;
  }
  for (int64_t k0 = 0; k0 < k; k0 += slice) {
    const int64_t depth = even(smaller(slice, k - k0));
    int64_t run = span;
    for (int64_t panel = begin; panel < end; panel += run) {
      if (panel + span > end) run = 1;
      prepare(panel, run, k0, depth);
      const bool run_follows = panel + run < end, slice_follows = k0 + slice < k;
      const int64_t next_run = run_follows     ? run * stream.panel_size
                               : slice_follows ? (begin - panel) * stream.panel_size + slice * kPanel
                                               : run * stream.panel_size - k0 * kPanel;
      const int64_t share = depth * term_bytes / tiles.count;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t rows = tiles.rows(t), own_span = panels_per_tile(static_cast<int>(rows));
        const bool wide = own_span <= run;
        const Ahead ahead = tiles.count == 1 ? stream_ahead(stream, run, k - k0)
                                             : Ahead{next_run * stream.element_bytes + t * share,
                                                     stream.load_bytes / tiles.count, depth, 0};
        for (int64_t j = 0; j < run; j += wide ? own_span : 1)
          tile(tiles.begin(t), rows, panel, j, wide, k0, depth, ahead);
      }
    }
  }
}

// acc of panels [begin, end), at most kGroup of them, (+)= the row block times one part of the matrix.
// gathered: scratch of kGroup slices.
template <class T>
void multiply_f32(const Matrix& m, const PackedRows& x, const Tiles& tiles, int64_t begin, int64_t end, float* acc,
                  int64_t acc_stride, float* gathered, bool first) {
  const auto out = [&](int64_t panel, int64_t row) { return acc + (panel - begin) * acc_stride + row * kPanel; };
  if constexpr (!std::is_same_v<T, int8_t>) {
    if (m.storage == Storage::panels) {
      const Stream stream = stream_of<T>(m);
      const int64_t panel_size = stream.panel_size;
      const T* w = static_cast<const T*>(m.data);
      sweep(
          tiles, begin, end, m.k, slice_of(tiles, m.k, stream), stream, [](int64_t, int64_t, int64_t, int64_t) {},
          [&](int64_t row, int64_t rows, int64_t panel, int64_t j, bool wide, int64_t k0, int64_t depth, Ahead ahead) {
            if (!t2::paired(m.dtype)) depth = smaller(depth, m.k - k0);
            micro_for<T>(rows, wide)(x.floats(row, rows, k0), w + (panel + j) * panel_size + k0 * kPanel, panel_size,
                                     depth, out(panel + j, row), acc_stride, first && k0 == 0, ahead);
          });
      return;
    }
  }
  sweep(
      tiles, begin, end, m.k, kSlice, Stream{0, 0, 0},
      [&](int64_t panel, int64_t run, int64_t k0, int64_t) {
        for (int64_t j = 0; j < run; ++j)
          gather_panel<T>(m, panel + j, k0, smaller(kSlice, m.k - k0), gathered + j * kSlice * kPanel);
      },
      [&](int64_t row, int64_t rows, int64_t panel, int64_t j, bool wide, int64_t k0, int64_t depth, Ahead ahead) {
        micro_for<float>(rows, wide)(x.floats(row, rows, k0), gathered + j * kSlice * kPanel, kSlice * kPanel,
                                     smaller(depth, m.k - k0), out(panel + j, row), acc_stride, first && k0 == 0, ahead);
      });
}

void multiply_bf16(const Matrix& m, const PackedRows& x, const Tiles& tiles, int64_t begin, int64_t end, float* acc,
                   int64_t acc_stride, bool first) {
  const Stream stream = stream_of<bf16>(m);
  const int64_t panel_size = stream.panel_size;
  const bf16* w = static_cast<const bf16*>(m.data);
  sweep(
      tiles, begin, end, m.k, slice_of(tiles, m.k, stream), stream, [](int64_t, int64_t, int64_t, int64_t) {},
      [&](int64_t row, int64_t rows, int64_t panel, int64_t j, bool wide, int64_t k0, int64_t depth, Ahead ahead) {
        micro_bf16_for<>(rows, wide)(x.pairs(row, rows, k0), w + (panel + j) * panel_size + k0 * kPanel, panel_size,
                                     depth, acc + (panel + j - begin) * acc_stride + row * kPanel, acc_stride,
                                     first && k0 == 0, ahead);
      });
}

void multiply_i16(const Matrix& m, const PackedRows& x, const Tiles& tiles, int64_t block_rows, int64_t begin,
                  int64_t end, float* acc, int64_t acc_stride, bool first) {
  const Stream stream = stream_of<int8_t>(m);
  const int64_t panel_size = stream.panel_size;
  const int8_t* w = static_cast<const int8_t*>(m.data);
  sweep(
      tiles, begin, end, m.k, kBlock, stream, [](int64_t, int64_t, int64_t, int64_t) {},
      [&](int64_t row, int64_t rows, int64_t panel, int64_t j, bool wide, int64_t k0, int64_t depth, Ahead ahead) {
        micro_i16_for<>(rows, wide)(x.pairs(row, rows, k0), x.scale + k0 / kBlock * block_rows + row,
                                    w + (panel + j) * panel_size + k0 * kPanel, panel_size, depth,
                                    acc + (panel + j - begin) * acc_stride + row * kPanel, acc_stride,
                                    first && k0 == 0, ahead);
      });
}

template <class T>
void store_panel(const RowOutput& out, const float* acc, int64_t rows, int64_t row0, int64_t n, int64_t n0) {
  const int64_t columns = smaller(kPanel, n - n0);
  alignas(64) float bias[kPanel] = {};
  alignas(64) float scale[kPanel];
  for (int64_t j = 0; j < kPanel; ++j) scale[j] = out.column_scale && j < columns ? out.column_scale[n0 + j] : 1.0f;
  if (out.bias) {
    switch (out.bias_dtype) {
      case DType::f32: widen(static_cast<const float*>(out.bias) + n0, columns, bias); break;
      case DType::bf16: widen(static_cast<const bf16*>(out.bias) + n0, columns, bias); break;
      default: widen(static_cast<const f16*>(out.bias) + n0, columns, bias); break;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* y = static_cast<T*>(out.data) + (row0 + r) * out.stride + n0;
    Lane16 v;
    v.load(acc + r * kPanel);
    v.scale_and_add(scale, bias);
    if (columns == kPanel) {
      v.store(y);
    } else {
      T whole[kPanel];
      v.store(whole);
      std::memcpy(y, whole, static_cast<size_t>(columns) * sizeof(T));
    }
  }
}

// One row block against panels [begin, end) of a product. x: its packed rows, one per part.
void panel_range(const Product& product, const PackedRows* const* x, int64_t row0, int64_t rows, int64_t begin,
                 int64_t end) {
  thread_local Scratch scratch;
  const int64_t acc_stride = rows * kPanel;
  float* acc = reinterpret_cast<float*>(scratch.get((kGroup * acc_stride + kGroup * kSlice * kPanel) * 4));
  float* gathered = acc + kGroup * acc_stride;
  const Tiles tiles(rows);
  const RowOutput& out = product.out;
  const int64_t n = product.parts[0].n;
  for (int64_t group = begin; group < end; group += kGroup) {
    const int64_t group_end = smaller(group + kGroup, end);
    bool first = true;
    for (int part = 0; part < product.part_count; ++part) {
      const Matrix& m = product.parts[part];
      if (m.k == 0) continue;
      const PackedRows& in = *x[part];
      if (in.arithmetic == Arithmetic::bf16) {
        multiply_bf16(m, in, tiles, group, group_end, acc, acc_stride, first);
      } else if (in.arithmetic == Arithmetic::i16) {
        multiply_i16(m, in, tiles, rows, group, group_end, acc, acc_stride, first);
      } else {
        switch (m.dtype) {
          case DType::f32: multiply_f32<float>(m, in, tiles, group, group_end, acc, acc_stride, gathered, first); break;
          case DType::bf16: multiply_f32<bf16>(m, in, tiles, group, group_end, acc, acc_stride, gathered, first); break;
          case DType::f16: multiply_f32<f16>(m, in, tiles, group, group_end, acc, acc_stride, gathered, first); break;
          default: multiply_f32<int8_t>(m, in, tiles, group, group_end, acc, acc_stride, gathered, first); break;
        }
      }
      first = false;
    }
    if (first) std::memset(acc, 0, static_cast<size_t>(kGroup * acc_stride) * sizeof(float));
    for (int64_t p = group; p < group_end; ++p) {
      const float* a = acc + (p - group) * acc_stride;
      switch (out.dtype) {
        case DType::f32: store_panel<float>(out, a, rows, row0, n, p * kPanel); break;
        case DType::bf16: store_panel<bf16>(out, a, rows, row0, n, p * kPanel); break;
        default: store_panel<f16>(out, a, rows, row0, n, p * kPanel); break;
      }
    }
  }
}

int64_t panels_of(const Product& product) { return (product.parts[0].n + kPanel - 1) / kPanel; }

void matmul(const Product* products, int count, int64_t rows, ParallelFor parallel_for) {
  thread_local Scratch scratch;
  PackedRows packed[kMaxProducts * kMaxParts];
  const PackedRows* x[kMaxProducts][kMaxParts] = {};
  int packs = 0;
  int64_t panels = 0, terms = 0;
  for (int i = 0; i < count; ++i) {
    panels += panels_of(products[i]);
    int64_t k0 = 0;
    for (int part = 0; part < products[i].part_count; ++part) {
      const Matrix& m = products[i].parts[part];
      const PackedRows wanted{products[i].in, arithmetic(products[i].in, m), k0, m.k, nullptr, nullptr};
      int found = 0;
      while (found < packs && !packed[found].same(wanted)) ++found;
      if (found == packs) packed[packs++] = wanted;
      x[i][part] = &packed[found];
      k0 += m.k;
    }
    terms = k0 > terms ? k0 : terms;
  }
  for (int64_t row0 = 0; row0 < rows; row0 += kRowBlock) {
    const int64_t block = smaller(kRowBlock, rows - row0);
    int64_t bytes = 0, pack_terms = 0;
    for (int i = 0; i < packs; ++i) bytes += packed[i].data_bytes(block) + packed[i].scale_bytes(block);
    char* at = scratch.get(bytes);
    for (int i = 0; i < packs; ++i) {
      packed[i].data = at;
      packed[i].scale = reinterpret_cast<float*>(at + packed[i].data_bytes(block));
      at += packed[i].data_bytes(block) + packed[i].scale_bytes(block);
      pack_terms = packed[i].k > pack_terms ? packed[i].k : pack_terms;
    }
    const Tiles tiles(block);
    const auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        const int64_t tile = job / packs;
        for (int64_t r = 0; r < tiles.rows(tile); ++r)
          pack_row(packed[job % packs], row0, block, tiles, tile, r);
      }
    };
    constexpr int64_t kPackGrain = 16384, kMacGrain = 65536;
    parallel(parallel_for, tiles.count * packs, grain(kPackGrain, tiles.rows(0) * pack_terms), pack);
    const auto compute = [&](int64_t begin, int64_t end) {
      for (int i = 0; i < count && begin < end; ++i) {
        const int64_t own = panels_of(products[i]);
        if (begin < own) panel_range(products[i], x[i], row0, block, begin, smaller(end, own));
        begin = begin > own ? begin - own : 0;
        end -= own;
      }
    };
    parallel(parallel_for, panels, grain(kMacGrain, block * terms * kPanel), compute);
  }
}

void reduce_scales(const float* t, const float* h, const float* component_scale, const int64_t* slots,
                   int64_t rows_per_slot, int64_t rows, int64_t k, float* dscales, ParallelFor parallel_for) {
  parallel(parallel_for, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < rows; ++b) {
      float* d = dscales + slots[b / rows_per_slot] * k;
      const float* tb = t + b * k;
      const float* hb = h + b * k;
      for (int64_t j = begin; j < end; ++j) d[j] += tb[j] * hb[j] * (component_scale ? component_scale[j] : 1.0f);
    }
  });
}

// Independent accumulators enough to cover the latency of a multiply-add, few enough to stay in registers.
template <class Lane, class Weights, class X, class T, class V>
void chain(const T* weights, const V* x, int64_t steps) {
  Lane c[kMaxRows];
  Weights w;
  w.load(weights);
  const X b(x);
#pragma GCC unroll 24
  for (int i = 0; i < kMaxRows; ++i) c[i].zero();
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 24
    for (int i = 0; i < kMaxRows; ++i) {
      keep(w);  // no two steps are the same
      c[i].step(w, b);
      keep(c[i]);
    }
  }
}

template <bool bf16_products>
int64_t multiply_adds_of(Arithmetic kind, int64_t steps) {
  alignas(64) static const char zeros[4 * kPanel] = {};
  const auto* x = reinterpret_cast<const float*>(zeros);
  const auto* pairs = reinterpret_cast<const uint32_t*>(zeros);
  if (kind == Arithmetic::f32) {
    chain<Lane16, Lane16, Broadcast>(x, x, steps);
    return kMaxRows * kPanel;
  }
  if (kind == Arithmetic::i16) {
    chain<DotI16, Pairs16, PairBroadcast>(reinterpret_cast<const int8_t*>(zeros), pairs, steps);
    return kMaxRows * kPanel * 2;
  }
  if constexpr (bf16_products) {
    chain<DotBf16, Pairs16, PairBroadcast>(reinterpret_cast<const bf16*>(zeros), pairs, steps);
    return kMaxRows * kPanel * 2;
  }
  return 0;
}

int64_t multiply_adds(Arithmetic kind, int64_t steps) { return multiply_adds_of<kBf16Products>(kind, steps); }

// Eight streams, as many as a one-row product has.
void read(const void* data, int64_t bytes) {
  constexpr int64_t kStreams = 8, kSums = 4;
  const int64_t share = bytes / kStreams / 64 * 64;
  const char* at = static_cast<const char*>(data);
  const float one = 1.0f;
  const Broadcast b(&one);
  Lane16 sums[kSums];
#pragma GCC unroll 4
  for (Lane16& sum : sums) sum.zero();
  for (int64_t i = 0; i < share; i += 64) {
#pragma GCC unroll 8
    for (int64_t s = 0; s < kStreams; ++s) {
      const char* line = at + s * share + i;
      __builtin_prefetch(line + 1024);
      Lane16 v;
      v.load(reinterpret_cast<const float*>(line));
      sums[s % kSums].step(v, b);
    }
  }
#pragma GCC unroll 4
  for (Lane16& sum : sums) keep(sum);
}

}  // namespace
