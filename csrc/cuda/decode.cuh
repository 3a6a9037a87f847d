// y = ((x Vh^T) * scales) U^T for 1 to 16 rows, both products of up to three layers in one persistent launch.
//
// A decode step reads every weight once and does next to nothing with it, so the limit is the memory's bandwidth, and
// all that matters is that enough loads are under way all the time. Blocks of 8 warps, as many as run side by side,
// walk over tiles of 16 weight rows (32 above 8 rows of x). Weights are the A operand of mma.m16n8k16 and go from
// memory straight to registers; rows of x are the columns of B, one group of 8 or two, zeros past the last. A fragment
// wants two values here and two there from a row, but terms of a sum may come in any order as long as it is fixed: a
// lane takes 16 contiguous bytes of its weight row and the same 16 (or, of int8 weights, 32) bytes of its row of x,
// and calls them the terms that the fragments want. A row's 256 contiguous bytes are a unit; units go round the warps,
// whose sums are added in shared memory, warp 0 first. So a result's bits depend neither on the grid nor on what else
// is in the batch. A lane keeps a ring of one unit, 8 or 16 chunks, and refills each chunk as soon as it is used, from
// its warp's next unit: of this tile, of the next, or of the second product. A multiprocessor runs two blocks of
// 16-row tiles or one of 32-row tiles: 64 KB under way, where 4.8 TB/s for 0.8 us over 132 multiprocessors need 30 KB.
//
// The first product leaves scaled bfloat16 rows in a workspace of at most a few hundred KB, which stays in L2; x and
// that workspace are read through L1, at 8 or 16 rows half as many bytes as of 16-bit weights, as many as of int8 ones.
// A barrier of the whole grid stands between the products, with the ring already full of the second one's weights.
//
// Why this beside two launches: a pair of 4096 x 4096 bfloat16 factors is 67 MB, 14 us at 4.8 TB/s. A second launch
// costs about 1 us between kernels, 1 us until loads arrive and as much again for draining the first; the barrier
// costs about 1 us, in which 64 KB x 132 = 8.4 MB of weights come in. Groups save as much again per layer, and small
// matrices (k and v), which could not fill the machine by themselves, share it.
#pragma once

#include <cstdint>

#include "decode.h"
#include "device.cuh"

namespace t2::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSteps = 4;       // of a unit
constexpr int kStepBytes = 64;  // of a weight row: one chunk for each lane of a quad
constexpr int kUnitBytes = kSteps * kStepBytes;
constexpr int kPhases = 2;
constexpr uint16_t kNaN = 0x7fff;  // as bfloat16

struct Segment {
  const char* weights;  // [rows, row_bytes]
  int row_bytes;
  int units;
  int first;  // where its terms begin in a row of x
  Storage storage;
};

// y[b, n] = (sum over segments of x[b] . weights[n]) * scales[slot(b), n] * component_scale[n] + bias[n], where given.
struct Product {
  Segment segments[kMaxParts];
  int units;  // of both segments
  int rows;   // of the weights
  int first_tile, end_tile;
  const char* x;
  int64_t x_row_bytes;
  const float* scales;
  int64_t scales_stride;
  const float* component_scale;
  const uint16_t* bias;
  uint16_t* y;
  int64_t y_stride;
};

struct Phase {
  Product products[kMaxLayers * kMaxParts];
  int tiles;
};

struct Plan {
  Phase phases[kPhases];
  const int64_t* slots;
  int64_t slot_count;
  int rows, rows_per_slot;
};

constexpr int tile_rows(int64_t rows) { return rows > 8 ? 32 : 16; }

inline Segment segment(const void* weights, int64_t k, int64_t first, Storage storage) {
  const int row_bytes = static_cast<int>(k * bytes_of(storage));
  return {static_cast<const char*>(weights), row_bytes, (row_bytes + kUnitBytes - 1) / kUnitBytes,
          static_cast<int>(first), storage};
}

inline Plan make_plan(const Group& group) {
  Plan plan{};
  plan.slots = group.slots;
  plan.slot_count = group.slot_count;
  plan.rows = static_cast<int>(group.rows);
  plan.rows_per_slot = static_cast<int>(group.rows_per_slot);
  int counts[kPhases] = {};
  const auto add = [&](int phase, Product product) {
    const int height = tile_rows(group.rows);
    product.units = product.segments[0].units + product.segments[1].units;
    product.first_tile = plan.phases[phase].tiles;
    product.end_tile = product.first_tile + (product.rows + height - 1) / height;
    plan.phases[phase].tiles = product.end_tile;
    plan.phases[phase].products[counts[phase]++] = product;
  };
  auto* t = static_cast<uint16_t*>(group.workspace);
  for (int i = 0; i < group.layer_count; ++i) {
    const Layer& layer = group.layers[i];
    const int64_t components = rank(layer);
    Product up{};
    int64_t first = 0;
    for (int p = 0; p < layer.part_count; ++p) {
      const Part& part = layer.parts[p];
      Product down{};
      down.segments[0] = segment(part.vh, group.in, 0, part.storage);
      down.rows = static_cast<int>(part.rank);
      down.x = static_cast<const char*>(group.x);
      down.x_row_bytes = group.in * 2;
      down.scales = layer.scales + first;
      down.scales_stride = layer.scales_stride;
      down.component_scale = layer.component_scale == nullptr ? nullptr : layer.component_scale + first;
      down.y = t + first;
      down.y_stride = components;
      add(0, down);
      up.segments[p] = segment(part.u, part.rank, first, part.storage);
      first += part.rank;
    }
    up.rows = static_cast<int>(layer.out);
    up.x = reinterpret_cast<const char*>(t);
    up.x_row_bytes = components * 2;
    up.bias = static_cast<const uint16_t*>(layer.bias);
    up.y = static_cast<uint16_t*>(layer.y);
    up.y_stride = layer.out;
    add(1, up);
    t += group.rows * components;
  }
  return plan;
}

__device__ __forceinline__ int second_segment(const Product& product, int unit) {
  return unit >= product.segments[0].units ? 1 : 0;
}

// Byte of a weight row of its segment at which a unit begins.
__device__ __forceinline__ int unit_offset(const Product& product, int unit) {
  return (unit - second_segment(product, unit) * product.segments[0].units) * kUnitBytes;
}

// The units of one warp, in the order in which it multiplies them: the tiles of its block, phase after phase.
template <int kRowTiles>
class Weights {
 public:
  __device__ __forceinline__ explicit Weights(const Plan& plan)
      : phase_(0), tile_(static_cast<int>(blockIdx.x)), product_(0), unit_(warp()) {
    settle(plan);
  }

  __device__ __forceinline__ void advance(const Plan& plan) {
    unit_ += kWarps;
    settle(plan);
  }

  // Chunk of row 8 i + lane / 4 of the tile; rows past the last repeat it.
  __device__ __forceinline__ Chunk load(int step, int i) const {
    return load_once(rows_[i] + step * kStepBytes, step * kStepBytes < left_);
  }

 private:
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

  __device__ __forceinline__ void settle(const Plan& plan) {
    for (; phase_ < kPhases; ++phase_, tile_ = static_cast<int>(blockIdx.x), product_ = 0) {
      const Phase& phase = plan.phases[phase_];
      for (; tile_ < phase.tiles; tile_ += static_cast<int>(gridDim.x), unit_ = warp()) {
        while (tile_ >= phase.products[product_].end_tile) ++product_;
        if (unit_ < phase.products[product_].units) return point_at(phase.products[product_]);
      }
    }
    left_ = 0;
  }

  __device__ __forceinline__ void point_at(const Product& product) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int offset = unit_offset(product, unit_) + 16 * (lane % 4);
    const Segment& segment = product.segments[second_segment(product, unit_)];
    left_ = segment.row_bytes - offset;
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = (tile_ - product.first_tile) * 16 * kRowTiles + 8 * i + lane / 4;
      rows_[i] = segment.weights + static_cast<int64_t>(min(row, product.rows - 1)) * segment.row_bytes + offset;
    }
  }

  int phase_, tile_, product_, unit_;
  const char* rows_[2 * kRowTiles];
  int left_;  // bytes from this lane's first chunk to the end of the row
};

template <Storage storage>
constexpr int kPairs = storage == Storage::i8 ? 8 : 4;  // pairs of bfloat16 in a chunk

template <Storage storage>
__device__ __forceinline__ void widen(const Chunk& chunk, uint32_t (&pairs)[kPairs<storage>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = chunk.word[i];
    if constexpr (storage == Storage::bf16) pairs[i] = word;
    if constexpr (storage == Storage::f16) pairs[i] = f16x2_to_bf16x2(word);
    if constexpr (storage == Storage::i8) {
      pairs[2 * i] = i8x2_to_bf16x2<0>(word);
      pairs[2 * i + 1] = i8x2_to_bf16x2<2>(word);
    }
  }
}

template <int kRowTiles>
using Ring = Chunk[kSteps][2 * kRowTiles];

template <int kRowTiles, int kColumnTiles>
using Sums = float[kRowTiles][kColumnTiles][4];

// sums += the unit in the ring times its terms of x; the ring is refilled from `next` as it empties.
template <Storage storage, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply(Sums<kRowTiles, kColumnTiles>& sums, Ring<kRowTiles>& ring,
                                         const Weights<kRowTiles>& next, const Product& product, int unit, int rows) {
  constexpr int kHeld = kColumnTiles == 1 ? kSteps : 2;  // steps whose terms of x are in registers, or on their way
  constexpr int kTermBytes = storage == Storage::i8 ? 2 : 1;  // bytes of x for a byte of weights
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int begin = unit_offset(product, unit), offset = begin + 16 * (lane % 4);
  const Segment& segment = product.segments[second_segment(product, unit)];
  const int steps = (segment.row_bytes - begin + kStepBytes - 1) / kStepBytes;  // to the end of the row
  const char* x[kColumnTiles];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j)
    x[j] = product.x + (8 * j + lane / 4) * product.x_row_bytes + 2 * segment.first + kTermBytes * offset;
  Chunk terms[kHeld][kColumnTiles][kTermBytes];
  const auto load_terms = [&](int step) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < kTermBytes; ++i)
        terms[step % kHeld][j][i] =
            load_cached(x[j] + kTermBytes * kStepBytes * step + 16 * i,
                        offset + step * kStepBytes < segment.row_bytes && 8 * j + lane / 4 < rows);
  };
#pragma unroll
  for (int step = 0; step < kHeld - 1; ++step) load_terms(step);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step < steps) {
      if (step + kHeld - 1 < kSteps) load_terms(step + kHeld - 1);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t upper[kPairs<storage>], lower[kPairs<storage>];  // rows lane / 4 and 8 below it
        widen<storage>(ring[step][2 * i], upper);
        widen<storage>(ring[step][2 * i + 1], lower);
#pragma unroll
        for (int p = 0; p < kPairs<storage>; p += 2)
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j)
            mma(sums[i][j], upper[p], lower[p], upper[p + 1], lower[p + 1], terms[step % kHeld][j][p / 4].word[p % 4],
                terms[step % kHeld][j][p / 4].word[p % 4 + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) ring[step][i] = next.load(step, i);
  }
}

template <int kRowTiles, int kColumnTiles>
__global__ void __launch_bounds__(kThreads, 2 / kRowTiles) decode(const __grid_constant__ Plan plan) {
  constexpr int kRows = 16 * kRowTiles, kColumns = 8 * kColumnTiles;
  constexpr int kPitch = kRows + 4;  // keeps a warp's stores on different banks
  constexpr int kOutputs = (kRows * kColumns + kThreads - 1) / kThreads;
  auto& partial = shared_memory<float[2][kWarps][kColumns][kPitch]>();  // two tiles take turns
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;

  constexpr int kNoSlot = -1;
  int slot[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int b = (thread + o * kThreads) / kRows;
    const int64_t id = b < plan.rows ? plan.slots[b / plan.rows_per_slot] : kNoSlot;
    slot[o] = id >= 0 && id < plan.slot_count ? static_cast<int>(id) : kNoSlot;
  }

  Weights<kRowTiles> weights(plan);
  Ring<kRowTiles> ring;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) ring[step][i] = weights.load(step, i);

  int turn = 0;
  for (int phase = 0; phase < kPhases; ++phase) {
    if (phase > 0) grid_barrier();
    int index = 0;
    for (int tile = static_cast<int>(blockIdx.x); tile < plan.phases[phase].tiles;
         tile += static_cast<int>(gridDim.x), turn ^= 1) {
      while (tile >= plan.phases[phase].products[index].end_tile) ++index;
      const Product& product = plan.phases[phase].products[index];
      const int first = (tile - product.first_tile) * kRows;

      float scale[kOutputs], component[kOutputs];
      uint16_t bias[kOutputs];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int b = (thread + o * kThreads) / kRows, row = first + thread % kRows;
        const bool mine = b < plan.rows && row < product.rows;
        scale[o] = 1.0f;
        if (mine && product.scales != nullptr)
          scale[o] = slot[o] == kNoSlot ? from_bf16(kNaN) : product.scales[slot[o] * product.scales_stride + row];
        component[o] = mine && product.component_scale != nullptr ? product.component_scale[row] : 1.0f;
        bias[o] = mine && product.bias != nullptr ? product.bias[row] : uint16_t{0};
      }

      Sums<kRowTiles, kColumnTiles> sums = {};
      for (int unit = warp; unit < product.units; unit += kWarps) {
        weights.advance(plan);
        switch (product.segments[second_segment(product, unit)].storage) {
          case Storage::bf16:
            multiply<Storage::bf16, kRowTiles, kColumnTiles>(sums, ring, weights, product, unit, plan.rows);
            break;
          case Storage::f16:
            multiply<Storage::f16, kRowTiles, kColumnTiles>(sums, ring, weights, product, unit, plan.rows);
            break;
          case Storage::i8:
            multiply<Storage::i8, kRowTiles, kColumnTiles>(sums, ring, weights, product, unit, plan.rows);
            break;
        }
      }

#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            partial[turn][warp][8 * j + 2 * (lane % 4) + c % 2][16 * i + 8 * (c / 2) + lane / 4] = sums[i][j][c];
      __syncthreads();
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int b = (thread + o * kThreads) / kRows, row = first + thread % kRows;
        if (b >= plan.rows || row >= product.rows) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += partial[turn][w][b][thread % kRows];
        product.y[b * product.y_stride + row] = to_bf16(sum * scale[o] * component[o] + from_bf16(bias[o]));
      }
    }
  }
}

}  // namespace t2::cuda
