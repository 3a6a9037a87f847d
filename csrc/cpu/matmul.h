// Row-batched products with frozen matrices, on pointers and sizes only (no torch headers).
//
//   y[b, n] = sum over parts of column_scale[n] * sum_k x[b, k] * scale[slot(b), k] * component_scale[k] * M[n, k]
//             +  bias[n]
//
// where each part has rows, scales and a matrix of its own: leading components that are stored with more bits beside
// the others, or W beside the few components that experts change. Parts are summed one after the other.
// A row's bits depend on that row and on M alone, whatever the batch size, the row's position, the tile that computes
// it or the thread it lands on, because the sum over k always runs in the same order:
//   float32 products   one FMA per term, k ascending
//   bfloat16 products  one hardware dot after the other, k ascending (instruction sets that have it): of two terms, or
//                      of 32 on tile registers
//   int8 matrices      activations become 16-bit integers per block of kBlock terms; a block's sum is exact, and blocks
//                      are added in float32, k ascending
//   matrices in blocks the same with 8-bit integers and blocks of kBlockTerms terms
// Columns are split over threads in panels of 16, rows are not: 192 columns are 12 panels and feed at most 12 threads.
#pragma once

#include "formats.h"

namespace t2 {

// Terms that share one activation scale in int8 products: the most whose sum of 127 * 32767 fits 32 bits.
constexpr int64_t kBlock = 512;

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
  bool round_to_bf16;  // bfloat16 matrices may be multiplied by activations rounded to bfloat16
};

struct RowOutput {
  void* data;   // [rows, n], n contiguous
  DType dtype;  // f32, bf16 or f16
  int64_t stride;
  const void* bias;  // [n] or null
  DType bias_dtype;
};

struct Part {
  RowInput in;
  Matrix m;
};

// column_scale belongs to the first part, which without others has the bits that it has with parts that add 0.
// Products of stage 1 run after those of stage 0, whose results their rows may be. Rows that both have are packed once.
constexpr int kMaxParts = 3;
constexpr int kStages = 2;
struct Product {
  int stage;
  Part parts[kMaxParts];
  int part_count;
  const float* column_scale;  // [n] or null
  RowOutput out;
};
constexpr int kMaxProducts = 12;

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context);

enum class Arithmetic : int { f32, bf16, i16, i8 };

// Scratch memory, on cache lines; std::bad_alloc if there is none.
char* allocate(int64_t bytes);
void release(char* data);

struct DecodeAttention;  // attention.h

struct Kernels {
  const char* isa;
  bool bf16_products;
  // Up to kMaxProducts products over the same number of rows, those of a stage side by side, stages in order.
  void (*matmul)(const Product* products, int count, int64_t rows, ParallelFor);
  // dscales[slot(b), k] += t[b, k] * h[b, k] * component_scale[k], rows in ascending order.
  void (*reduce_scales)(const float* t, const float* h, const float* component_scale, const int64_t* slots,
                        int64_t rows_per_slot, int64_t rows, int64_t k, float* dscales, ParallelFor);
  void (*attend)(const DecodeAttention&, ParallelFor);
  // Machine limits: `steps` times as many FMAs as returned, from registers only, on the calling thread.
  int64_t (*multiply_adds)(Arithmetic, int64_t steps);
  // Reads every whole 512 bytes once.
  void (*read)(const void* data, int64_t bytes);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmxBf16;
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const Kernels kNeonBf16;
#endif

// The best set this processor runs. T2KERNELS_CPU asks for one by its `isa`.
const Kernels& kernels();
// Switches to a set by name; returns false when it is not compiled in or not supported here.
bool select_kernels(const char* isa);
bool supported(const char* isa);

}  // namespace t2
