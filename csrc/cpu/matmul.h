// Row-batched products with frozen matrices, on pointers and sizes only (no torch headers).
//
//   y[b, n] = column_scale[n] * sum_k x[b, k] * scale[slot(b), k] * component_scale[k] * M[n, k]  +  bias[n]
//
// The sum over k runs in ascending order with one fp32 fused multiply-add per term, whatever the batch size, the row's
// position, the tile that computes it or the thread it lands on: a row's bits depend on that row and on M alone.
#pragma once

#include <cstdint>

namespace t2 {

enum class DType : int { f32, bf16, f16, i8 };

// Output columns are packed 16 to a panel: [ceil(N / 16)][K][16], columns past N hold zeros.
constexpr int64_t kPanel = 16;

enum class Storage : int {
  strided,            // M[n, k] at data[n * stride_n + k * stride_k]
  panels,             // data is M packed in panels
  panels_transposed,  // data is M^T packed in panels: the backward product, no second copy of the weight
};

struct Matrix {
  const void* data;
  DType dtype;
  Storage storage;
  int64_t n, k;  // of M, the matrix of this product
  int64_t stride_n, stride_k;
};

struct RowInput {
  const void* data;  // [rows, k], k contiguous
  DType dtype;       // f32, bf16 or f16
  int64_t stride;
  const float* scales;  // [slots, k] rows of scales, or null
  int64_t scales_stride;
  const int64_t* slots;  // one per rows_per_slot rows
  int64_t rows_per_slot;
  const float* component_scale;  // [k] or null
};

struct RowOutput {
  void* data;   // [rows, n] contiguous
  DType dtype;  // f32, bf16 or f16
  const float* column_scale;  // [n] or null
  const void* bias;           // [n] or null
  DType bias_dtype;
};

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context);

struct Kernels {
  const char* isa;
  void (*matmul)(const RowInput&, const Matrix&, const RowOutput&, int64_t rows, ParallelFor);
  // dscales[slot(b), k] += t[b, k] * h[b, k] * component_scale[k], rows in ascending order.
  void (*reduce_scales)(const float* t, const float* h, const float* component_scale, const int64_t* slots,
                        int64_t rows_per_slot, int64_t rows, int64_t k, float* dscales, ParallelFor);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The best set this processor runs. T2KERNELS_CPU=portable|avx2|avx512 asks for one by name.
const Kernels& kernels();
// Switches to a set by name; returns false when it is not compiled in or not supported here.
bool select_kernels(const char* isa);
bool supported(const char* isa);

}  // namespace t2
