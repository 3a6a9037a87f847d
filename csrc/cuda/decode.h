// Factored linear layers of a decode step on CUDA, on pointers and sizes only (no torch headers, no CUDA headers).
//
//   y[b] = ((x[b] Vh^T) * scales[slot(b)] * component_scale) U^T + bias    for up to 3 layers that share x and slots
//
// Sums are float32; x and the scaled intermediate are bfloat16, and float16 factors are rounded to bfloat16. A row's
// bits depend on that row, its scales and the factors alone. A row whose slot is not there becomes NaN, and nothing is
// read for it: ids are on the device, and to check them the host would have to wait.
#pragma once

#include <cstdint>

namespace t2::cuda {

constexpr int kMaxRows = 16;
constexpr int kMaxLayers = 3;  // q, k and v; gate and up
constexpr int kMaxParts = 2;

enum class Storage : int { bf16, f16, i8 };

constexpr int64_t bytes_of(Storage storage) { return storage == Storage::i8 ? 1 : 2; }

struct Part {
  const void* vh;  // [rank, in], row-major
  const void* u;   // [out, rank], row-major
  int64_t rank;
  Storage storage;
};

struct Layer {
  Part parts[kMaxParts];  // leading components first
  int part_count;
  const float* scales;  // rows of scales, one scale per component
  int64_t scales_stride;
  const float* component_scale;  // one per component, or null
  const void* bias;              // bfloat16 [out], or null
  void* y;                       // bfloat16 [rows, out]
  int64_t out;
};

struct Group {
  const void* x;  // bfloat16 [rows, in]
  int64_t rows, in;
  const int64_t* slots;  // one per rows_per_slot rows
  int64_t slot_count;    // rows of scales that every layer has
  int64_t rows_per_slot;
  Layer layers[kMaxLayers];
  int layer_count;
  void* workspace;  // workspace_bytes(), of this call alone until it is done
};

constexpr int64_t rank(const Layer& layer) {
  int64_t sum = 0;
  for (int i = 0; i < layer.part_count; ++i) sum += layer.parts[i].rank;
  return sum;
}

constexpr int64_t workspace_bytes(const Group& group) {
  int64_t ranks = 0;
  for (int i = 0; i < group.layer_count; ++i) ranks += rank(group.layers[i]);
  return group.rows * ranks * 2;
}

// Null, or what `launch` cannot take. It reads 16 bytes at a time, so rows must start on such a boundary and end on
// one.
inline const char* unsupported(const Group& group) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const auto whole = [](int64_t k) { return k > 0 && k % 16 == 0 && k <= (1 << 24); };
  if (group.rows < 1 || group.rows > kMaxRows) return "more than 16 rows of x, or none";
  if (group.layer_count < 1 || group.layer_count > kMaxLayers) return "more than 3 layers, or none";
  if (group.rows_per_slot < 1 || group.rows % group.rows_per_slot != 0) return "slots that do not divide the rows of x";
  if (!whole(group.in)) return "in_features that are not a multiple of 16";
  if (!aligned(group.x) || !aligned(group.workspace)) return "x or workspace off a 16-byte boundary";
  for (int i = 0; i < group.layer_count; ++i) {
    const Layer& layer = group.layers[i];
    if (layer.part_count < 1 || layer.part_count > kMaxParts) return "more than 2 parts, or none";
    if (layer.out < 1 || layer.out > (1 << 24)) return "out_features below 1 or above 2^24";
    for (int p = 0; p < layer.part_count; ++p) {
      if (!whole(layer.parts[p].rank)) return "a part whose rank is not a multiple of 16";
      if (!aligned(layer.parts[p].vh) || !aligned(layer.parts[p].u)) return "a factor off a 16-byte boundary";
    }
  }
  return nullptr;
}

// Runs a supported group on a CUDA stream (a cudaStream_t) of the current device. Null, or the error of the CUDA
// runtime.
const char* launch(const Group& group, void* stream);

}  // namespace t2::cuda
