// The driver and micro-kernels behind matmul.h, compiled once per instruction set. The including file defines, in an
// anonymous namespace:
//   Lane16                       16 fp32 lanes: zero, load (from each storage type), store, fma with a broadcast
//   half_to_float, float_to_half
//   kMaxRows                     rows of the largest register tile
//   panels_per_tile(rows)        panels that a tile of so many rows spans
//
// Tiling. A thread owns a range of panels. Rows go in blocks of 256, converted to fp32, multiplied by their scale row
// and interleaved tile by tile ([tile][k][rows of tile]), so that a micro-kernel reads one stream of broadcasts. Within
// a group of 8 panels the reduction advances 256 terms at a time: the row block (256 KB) stays in L2, a panel's
// slice (16 KB) in L1. Accumulators leave registers between slices as fp32, which rounds nothing.
// Data movement. Up to kMaxRows rows every weight byte is read once from memory and used straight from it; above, a
// slice is widened to fp32 once and used by all row tiles. Limit: memory bandwidth for few rows, fp32 FMA for many.

#include <cstdlib>
#include <cstring>

#include "matmul.h"

namespace {

using t2::DType;
using t2::kPanel;
using t2::Matrix;
using t2::ParallelFor;
using t2::RowInput;
using t2::RowOutput;
using t2::Storage;

// std::min would be emitted for this file's instruction set and shared, by the linker, with everyone.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t grain(int64_t enough, int64_t each) { return each <= 0 || each >= enough ? 1 : enough / each; }

constexpr int64_t kRowBlock = 256;
constexpr int64_t kSlice = 256;
constexpr int64_t kGroup = 8;

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

inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float v, f16* out) { out->bits = float_to_half(v); }

// Per-thread scratch that grows and stays: a call allocates nothing once warm.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
  float* get(int64_t wanted) {
    if (wanted > size) {
      std::free(data);
      size = 0;
      data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((wanted * 4 + 63) / 64 * 64)));
      if (data == nullptr) std::abort();
      size = wanted;
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

// x: [depth][MR]. w: NP panels, w_stride elements apart. acc: NP x [rows][16], acc_stride floats apart.
template <int MR, int NP, class T>
void micro(const float* x, const T* w, int64_t w_stride, int64_t depth, float* acc, int64_t acc_stride, bool first) {
  Lane16 c[MR][NP];
#pragma GCC unroll 16
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
  for (int64_t k = 0; k < depth; ++k) {
    Lane16 v[NP];
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) v[p].load(w + p * w_stride + k * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Broadcast b(x + k * MR + r);
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) c[r][p].fma(v[p], b);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) c[r][p].store(acc + p * acc_stride + r * kPanel);
  }
}

template <class T>
using MicroFn = void (*)(const float*, const T*, int64_t, int64_t, float*, int64_t, bool);

template <class T, int MR = kMaxRows>
MicroFn<T> micro_for(int64_t rows, bool wide) {
  if constexpr (MR == 0) {
    return nullptr;
  } else {
    if (rows == MR) return wide ? &micro<MR, panels_per_tile(MR), T> : &micro<MR, 1, T>;
    return micro_for<T, MR - 1>(rows, wide);
  }
}

// Splits `rows` into the fewest tiles of at most kMaxRows rows, sizes differing by at most one.
struct Tiles {
  int64_t count, small, large_count;
  explicit Tiles(int64_t rows) : count((rows + kMaxRows - 1) / kMaxRows), small(rows / count), large_count(rows % count) {}
  int64_t rows(int64_t tile) const { return small + (tile < large_count ? 1 : 0); }
  int64_t begin(int64_t tile) const { return tile * small + smaller(tile, large_count); }
};

template <class T>
void interleave_row(const RowInput& in, int64_t row, int64_t depth, float* out, int64_t step) {
  const T* x = static_cast<const T*>(in.data) + row * in.stride;
  const float* scale = in.scales ? in.scales + in.slots[row / in.rows_per_slot] * in.scales_stride : nullptr;
  const float* component = in.component_scale;
  for (int64_t k = 0; k < depth; ++k) {
    float v = to_float(x[k]);
    if (scale) v *= scale[k];
    if (component) v *= component[k];
    out[k * step] = v;
  }
}

void interleave(const RowInput& in, int64_t row, int64_t depth, float* out, int64_t step) {
  switch (in.dtype) {
    case DType::f32: return interleave_row<float>(in, row, depth, out, step);
    case DType::bf16: return interleave_row<bf16>(in, row, depth, out, step);
    default: return interleave_row<f16>(in, row, depth, out, step);
  }
}

// Widens terms [k0, k0 + depth) of one panel to fp32: out[depth][16].
template <class T>
void gather_panel(const Matrix& m, int64_t panel, int64_t k0, int64_t depth, float* out) {
  const T* data = static_cast<const T*>(m.data);
  const int64_t n0 = panel * kPanel;
  const int64_t columns = smaller(kPanel, m.n - n0);
  if (m.storage == Storage::panels) {
    const T* w = data + (panel * m.k + k0) * kPanel;
    for (int64_t k = 0; k < depth; ++k) {
      Lane16 v;
      v.load(w + k * kPanel);
      v.store(out + k * kPanel);
    }
    return;
  }
  if (columns < kPanel) std::memset(out, 0, static_cast<size_t>(depth * kPanel) * sizeof(float));
  if (m.storage == Storage::panels_transposed) {
    // 16 output columns of one stored panel are 256 consecutive elements, [column][term].
    for (int64_t k = 0; k < depth; ++k) {
      const T* w = data + ((k0 + k) / kPanel * m.n + n0) * kPanel + (k0 + k) % kPanel;
      for (int64_t j = 0; j < columns; ++j) out[k * kPanel + j] = to_float(w[j * kPanel]);
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

template <class T>
void store_panel(const RowOutput& out, const float* acc, int64_t rows, int64_t row0, int64_t n, int64_t n0) {
  const int64_t columns = smaller(kPanel, n - n0);
  float bias[kPanel] = {};
  float scale[kPanel];
  for (int64_t j = 0; j < columns; ++j) {
    scale[j] = out.column_scale ? out.column_scale[n0 + j] : 1.0f;
    if (!out.bias) continue;
    switch (out.bias_dtype) {
      case DType::f32: bias[j] = static_cast<const float*>(out.bias)[n0 + j]; break;
      case DType::bf16: bias[j] = to_float(static_cast<const bf16*>(out.bias)[n0 + j]); break;
      default: bias[j] = to_float(static_cast<const f16*>(out.bias)[n0 + j]); break;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* y = static_cast<T*>(out.data) + (row0 + r) * n + n0;
    for (int64_t j = 0; j < columns; ++j) from_float(acc[r * kPanel + j] * scale[j] + bias[j], y + j);
  }
}

// One row block against panels [begin, end). x: the interleaved row block.
template <class T>
void panel_range(const Matrix& m, const RowOutput& out, const float* x, int64_t row0, int64_t rows, int64_t begin,
                 int64_t end) {
  thread_local Scratch scratch;
  float* acc = scratch.get(kGroup * rows * kPanel + kSlice * kPanel);
  float* wide = acc + kGroup * rows * kPanel;
  const int64_t acc_stride = rows * kPanel;
  const Tiles tiles(rows);
  const bool direct = m.storage == Storage::panels && tiles.count == 1;
  for (int64_t group = begin; group < end; group += kGroup) {
    const int64_t group_end = smaller(group + kGroup, end);
    if (direct) {
      const int64_t span = panels_per_tile(static_cast<int>(rows));
      const T* w = static_cast<const T*>(m.data);
      int64_t p = group;
      for (; p + span <= group_end; p += span)
        micro_for<T>(rows, true)(x, w + p * m.k * kPanel, m.k * kPanel, m.k, acc + (p - group) * acc_stride, acc_stride,
                                 true);
      for (; p < group_end; ++p)
        micro_for<T>(rows, false)(x, w + p * m.k * kPanel, 0, m.k, acc + (p - group) * acc_stride, 0, true);
    } else {
      for (int64_t k0 = 0; k0 < m.k; k0 += kSlice) {
        const int64_t depth = smaller(kSlice, m.k - k0);
        for (int64_t p = group; p < group_end; ++p) {
          gather_panel<T>(m, p, k0, depth, wide);
          for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t r0 = tiles.begin(t), tile_rows = tiles.rows(t);
            micro_for<float>(tile_rows, false)(x + r0 * m.k + k0 * tile_rows, wide, 0, depth,
                                               acc + (p - group) * acc_stride + r0 * kPanel, 0, k0 == 0);
          }
        }
      }
    }
    for (int64_t p = group; p < group_end; ++p) {
      if (m.k == 0) std::memset(acc + (p - group) * acc_stride, 0, static_cast<size_t>(acc_stride) * sizeof(float));
      const float* a = acc + (p - group) * acc_stride;
      switch (out.dtype) {
        case DType::f32: store_panel<float>(out, a, rows, row0, m.n, p * kPanel); break;
        case DType::bf16: store_panel<bf16>(out, a, rows, row0, m.n, p * kPanel); break;
        default: store_panel<f16>(out, a, rows, row0, m.n, p * kPanel); break;
      }
    }
  }
}

void matmul(const RowInput& in, const Matrix& m, const RowOutput& out, int64_t rows, ParallelFor parallel_for) {
  thread_local Scratch scratch;
  const int64_t panels = (m.n + kPanel - 1) / kPanel;
  for (int64_t row0 = 0; row0 < rows; row0 += kRowBlock) {
    const int64_t block = smaller(kRowBlock, rows - row0);
    float* x = scratch.get(block * m.k);
    const Tiles tiles(block);
    const auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t r = 0; r < tiles.rows(t); ++r)
          interleave(in, row0 + tiles.begin(t) + r, m.k, x + tiles.begin(t) * m.k + r, tiles.rows(t));
    };
    constexpr int64_t kPackGrain = 16384, kMacGrain = 65536;
    parallel(parallel_for, tiles.count, grain(kPackGrain, kMaxRows * m.k), pack);
    const auto compute = [&](int64_t begin, int64_t end) {
      switch (m.dtype) {
        case DType::f32: return panel_range<float>(m, out, x, row0, block, begin, end);
        case DType::bf16: return panel_range<bf16>(m, out, x, row0, block, begin, end);
        case DType::f16: return panel_range<f16>(m, out, x, row0, block, begin, end);
        default: return panel_range<int8_t>(m, out, x, row0, block, begin, end);
      }
    };
    parallel(parallel_for, panels, grain(kMacGrain, block * m.k * kPanel), compute);
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

}  // namespace
