// Decode attention: one new token per row over its key-value cache, on pointers and sizes only.
//
//   p = softmax over allowed keys j of scale * <q[h], k[h / group, j]>        out[h] = sum_j p[j] * v[h / group, j]
//
// A row's bits depend on its keys from the first allowed one to the last: padding on both sides is skipped, and every
// sum runs in the same order in between, whatever the batch and the thread count.
#pragma once

#include "matmul.h"

namespace t2 {

// Strides of a tensor whose last dimension is contiguous.
struct HeadStrides {
  int64_t row, head, key;
};

struct DecodeAttention {
  const void* query;  // [rows, heads, head_dim]
  const void* keys;   // [rows, key_heads, length, head_dim], or of other rows where key_rows says which
  const void* values;
  void* out;  // [rows, heads, head_dim], contiguous
  DType dtype;
  HeadStrides query_strides, key_strides, value_strides;
  const uint8_t* allowed;  // [rows, length], nonzero where a row may look, or null for everywhere
  int64_t allowed_row_stride, allowed_stride;
  const int64_t* key_rows;    // [rows], the row of keys and values that each row looks at, or null for its own
  const int64_t* key_ranges;  // [rows, 2], the first key that each row looks at and the end, or null for all
  int64_t rows, heads, key_heads, length, head_dim;  // head_dim: a multiple of kPanel
  float scale;
};

}  // namespace t2
