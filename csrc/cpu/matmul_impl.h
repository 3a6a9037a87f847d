// The matmul driver and its micro-kernel, compiled once per instruction set. The including file defines, in an
// anonymous namespace:
//   Lane16, Broadcast       16 float32 lanes: zero, load, store, multiply, scale_and_add, sum; step, an FMA
//   Pairs16, PairBroadcast  16 pairs of 16-bit terms of M, one pair of terms of x
//   DotI16                  16 int32 lanes: zero, step, add_to (accumulators += lanes * scale)
//   Quads16, DotQ4, DotQ8   16 times 4 codes of M, of 4 or 8 bits; their sums of products with bytes of x: zero, step, sums
//   DotBf16                 16 float32 lanes: zero, load, store, step; used if kBf16Products
//   transpose_pairs         16 columns of 16 terms from a paired panel of the transposed matrix; used if kBf16Products
//   tile registers          where kTileRegisters: configure, release, load, store, zero and multiply (amx_tiles.h)
//   keep                    makes the compiler believe that a lane's value is used
//   kMaxRows                rows of the largest register tile
//   panels_per_tile(rows)   panels that a tile of so many rows spans
// formats.h adds loads and stores of every storage format.
//
// Tiling. A thread owns a range of panels, 16 columns each, so panels bound the number of threads: 192 columns are 12
// panels and feed 12 threads, whatever the number of rows. Rows go in blocks of kRowBlock, which are scaled, converted
// to the operands of the arithmetic (float32, bfloat16 pairs, or int16 pairs with a scale per kBlock terms) and
// interleaved tile by tile ([tile][k][rows of tile]), so that the micro-kernel reads one stream of broadcasts. Within a
// group of kGroup panels the reduction advances a slice at a time: the row block's slice stays in L2, the panels' slice
// in L1 for all tiles. Between slices accumulators are stored as float32, which rounds nothing.
// Data movement. Every weight byte is read from memory once per row block and used straight from its storage format by
// every row tile. Matrices that are not packed, or packed the other way round, are first gathered into panels, a slice
// at a time: float32, or bfloat16 pairs where those are multiplied.
// Limit. Memory bandwidth for few rows, FMAs for many; packing x shows only where M has few columns.

#include <type_traits>

#include "matmul.h"
#include "tile_registers.h"

namespace {

using t2::Arithmetic;
using t2::kBlock;
using t2::kMaxParts;
using t2::kMaxProducts;
using t2::kStages;
using t2::Matrix;
using t2::ParallelFor;
using t2::Product;
using t2::RowInput;
using t2::RowOutput;
using t2::Storage;

// Machine constants, from the sizes of L1 (32 KiB or more) and L2 (512 KiB or more). None changes an output bit.
// Half or twice of kSlice or kGroup changed 33 rows x 2048 x 2048 by less than 4%, within noise (Zen 4, AVX-512 BF16).
// Register tiles (kMaxRows, panels_per_tile) stand beside the lanes that they fill.
constexpr int64_t kRowBlock = 256;        // rows packed at a time; with kSlice 256 KiB of float32 x, half of L2
constexpr int64_t kSlice = 256;           // terms; 16 KiB a float32 panel: the 2 of a tall tile fill an L1 of 32 KiB
constexpr int64_t kGroup = 8;             // panels with open sums: 128 KiB for kRowBlock rows, a quarter of L2
constexpr int64_t kNearBytes = 20 << 10;  // a panel up to this size stays in L1 beside x: one slice, sums in registers
// Bytes in flight for one core: latency times bandwidth (100 ns x 50 GB/s = 5 KB), and some.
constexpr int64_t kBytesAhead = 6144;
constexpr int64_t kReadAhead = 1024;  // for each of read()'s 8 streams
// Work worth a thread, microseconds as waking one takes: elements of x packed, FMAs, scales.
constexpr int64_t kPackGrain = 16384;
constexpr int64_t kFmaGrain = 65536;
constexpr int64_t kScaleGrain = 64;

// std::min would be emitted for this file's instruction set and shared, by the linker, with everyone.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t grain(int64_t enough, int64_t each) { return each <= 0 || each >= enough ? 1 : enough / each; }
inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
inline int64_t even(int64_t k) { return whole(k, 2); }

// Per-thread scratch that grows and stays: a call allocates nothing once warm.
struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  ~Scratch() { t2::release(data); }
  char* get(int64_t bytes) {
    if (bytes > size) {
      t2::release(data);
      data = nullptr;
      size = 0;
      data = t2::allocate(bytes);
      size = bytes;
    }
    return data;
  }
};

template <class Fn>
void parallel(ParallelFor parallel_for, int64_t count, int64_t at_least, const Fn& fn) {
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Fn*>(context))(begin, end); };
  parallel_for(0, count, at_least, call, const_cast<void*>(static_cast<const void*>(&fn)));
}

// Arithmetics of the micro-kernel. One load of a panel gives kTerms terms, which meet x in kSteps steps of MR values.

struct FloatSums {
  template <class Lane>
  static void begin(Lane& sums, const float* acc, bool first) {
    if (first) {
      sums.zero();
    } else {
      sums.load(acc);
    }
  }
  template <class Lane>
  static void end(const Lane& sums, float* acc, const float*, int, bool) {
    sums.store(acc);
  }
};

// Any format, widened to float32 as it is loaded.
template <class T>
struct F32Products : FloatSums {
  using Weight = T;
  using Weights = Lane16;
  using X = float;
  using XBroadcast = Broadcast;
  using Sums = Lane16;
  static constexpr Arithmetic kArithmetic = Arithmetic::f32;
  static constexpr int kTerms = t2::paired(kDType<T>) ? 2 : 1, kSteps = kTerms;
  static void load_step(Lane16& w, const T* p, int step) {
    if constexpr (kSteps == 1) {
      load(w, p);
    } else if (step == 0) {
      load_even(w, p);
    } else {
      load_odd(w, p);
    }
  }
};

// Pairs of 16-bit terms, one dot product a step.
template <class T, class Lane>
struct PairProducts {
  using Weight = T;
  using Weights = Pairs16;
  using X = uint32_t;
  using XBroadcast = PairBroadcast;
  using Sums = Lane;
  static constexpr int kTerms = 2, kSteps = 1;
  static void load_step(Pairs16& w, const T* p, int) { load(w, p); }
};

struct Bf16Products : PairProducts<bf16, DotBf16>, FloatSums {
  static constexpr Arithmetic kArithmetic = Arithmetic::bf16;
};

// 32 terms at once, of which tile registers hold 16 rows of x ([16][32 terms]) or 16 columns of M (as in a panel).
struct TileBf16Products {
  using Weight = bf16;
  using X = bf16;
  static constexpr Arithmetic kArithmetic = Arithmetic::bf16;
  static constexpr int kTerms = 32;
};

// Exact sums of one block of at most kBlock terms, times the activation scales of these rows.
struct I16Products : PairProducts<int8_t, DotI16> {
  static constexpr Arithmetic kArithmetic = Arithmetic::i16;
  static void begin(DotI16& sums, const float*, bool) { sums.zero(); }
  static void end(const DotI16& sums, float* acc, const float* scale, int row, bool first) {
    sums.add_to(acc, scale[row], first);
  }
};

// Codes of blocks and bytes of x, 4 terms a step. Exact sums of kBlockTerms terms, times both scales, and the minima
// times the sum of x are added to the accumulators, which stay in L1: registers hold a block's integers.
template <class T>
struct BlockProducts {
  using Weight = T;
  using Weights = Quads16;
  using X = uint32_t;
  using XBroadcast = PairBroadcast;
  using Sums = std::conditional_t<std::is_same_v<T, q4>, DotQ4, DotQ8>;
  static constexpr Arithmetic kArithmetic = Arithmetic::i8;
  static constexpr int kTerms = kBlockTerms;
  static void load_step(Quads16& w, const T* codes, int step) {
    if constexpr (std::is_same_v<T, q8>) {
      load(w, codes + step * 4 * kPanel);
    } else if (step % 2 == 0) {
      load_low(w, codes + step / 2 * 4 * kPanel);
    } else {
      load_high(w, codes + step / 2 * 4 * kPanel);
    }
  }
};

// The arithmetic of packed weights: 16-bit pairs where format and instruction set have them, else float32.
template <class T>
struct Products {
  using Type = F32Products<T>;
};
template <>
struct Products<bf16> {
  using Type = std::conditional_t<kTileRegisters, TileBf16Products,
                                  std::conditional_t<kBf16Products, Bf16Products, F32Products<bf16>>>;
};
template <>
struct Products<int8_t> {
  using Type = I16Products;
};
template <>
struct Products<q8> {
  using Type = BlockProducts<q8>;
};
template <>
struct Products<q4> {
  using Type = BlockProducts<q4>;
};

Arithmetic arithmetic(const RowInput& in, const Matrix& m) {
  Arithmetic kind = Arithmetic::f32;
  with_format(m.dtype, [&]<class T>(T) { kind = Products<T>::Type::kArithmetic; });
  const bool has_pairs = kind == Arithmetic::bf16 ? m.storage != Storage::strided && in.round_to_bf16
                                                  : kind != Arithmetic::f32 && m.storage == Storage::panels;
  return has_pairs ? kind : Arithmetic::f32;
}

// Prefetches of one tile: they begin `start` bytes past the first weight of each panel, advance `step` bytes with every
// load, and skip `jump` bytes when the load comes to term `turn`.
//
// A single row tile reads `run` panels side by side, straight from memory, and uses nothing twice. Each panel is
// prefetched kBytesAhead / run bytes ahead (n) of its load (w); near its end the next run is. Panel 0 of a run of 2:
//
//        this run                        next run
//        panel 0         panel 1         panel 2         panel 3
//      [===w----n      |               |               |               ]   n = w + start
//      [==========w----n               |               |               ]   turn: n is at the panel's end and jumps over
//      [===========w   |               |n              |               ]   run - 1 panels; panel 1's goes to panel 3
//
// Several row tiles read the same slice of a run in turn, all but the first from cache. Each prefetches its share of
// the slice that is read next, so that memory is read at an even pace (turn = depth, no jump):
//
//      this slice  [ read by tile 0, then by tile 1, then by tile 2 ]
//      next slice  [ tile 0's n    | tile 1's n    | tile 2's n     ]
struct Prefetch {
  int64_t start, step, turn, jump;
};

// The micro-kernel. c[MR][NP] accumulators of 16 columns stay in registers over `depth` terms; each load of a panel
// meets MR broadcasts of x. x: [depth / terms of an X][MR]. w: NP panels, w_stride elements apart. acc: NP x
// [rows][16], acc_stride floats apart, read unless `first`. scale: of MR rows, or null.
// Limit: FMAs while the slice of the panels is in L1; a full tile needs less than one load an FMA.
template <class A, int MR, int NP>
void micro(const typename A::X* x, const float* scale, const typename A::Weight* w, int64_t w_stride, int64_t depth,
           float* acc, int64_t acc_stride, bool first, Prefetch prefetch) {
  typename A::Sums c[MR][NP];
  const char* next = reinterpret_cast<const char*>(w) + prefetch.start;
  int64_t stop = smaller(prefetch.turn, depth);
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) A::begin(c[r][p], acc + p * acc_stride + r * kPanel, first);
  }
  for (int64_t k = 0; k < depth; stop = depth, next += prefetch.jump) {
    for (; k < stop; k += A::kTerms, x += A::kSteps * MR, next += prefetch.step) {
      typename A::Weights v[NP];
      const auto run = [&](int step) __attribute__((always_inline)) {  // a loop costs the portable set 10%
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) {
          A::load_step(v[p], w + p * w_stride + k * kPanel, step);
          if (step == 0) __builtin_prefetch(next + p * w_stride * static_cast<int64_t>(sizeof(*w)));
        }
#pragma GCC unroll 24
        for (int r = 0; r < MR; ++r) {
          const typename A::XBroadcast b(x + step * MR + r);
#pragma GCC unroll 8
          for (int p = 0; p < NP; ++p) c[r][p].step(v[p], b);
        }
      };
      run(0);
      if constexpr (A::kSteps == 2) run(1);
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) A::end(c[r][p], acc + p * acc_stride + r * kPanel, scale, r, first);
  }
}

// fn(0), fn(1), ... with numbers that the compiler knows.
template <int Count, class Fn>
[[gnu::always_inline]] inline void unrolled(const Fn& fn) {
  if constexpr (Count > 0) {
    unrolled<Count - 1>(fn);
    fn(std::integral_constant<int, Count - 1>{});
  }
}

constexpr int64_t kTileRows = 16, kTileTerms = 32, kTileSize = kTileRows * kTileTerms;

// The same on tile registers: RT tiles of 16 rows against NP panels, whose sums fill four of the eight registers. x:
// [depth / 32][RT][16 rows][32 terms], with zeros past depth. Each tile of M is 1 KiB of a panel, read where it lies; a
// last one with fewer terms is copied first. 2 x 2 tiles need one load for each product, which takes 16 cycles.
template <int RT, int NP>
void micro_tiles(const bf16* x, const float*, const bf16* w, int64_t w_stride, int64_t depth, float* acc,
                 int64_t acc_stride, bool first, Prefetch prefetch) {
  constexpr int kX = RT * NP, kW = kX + RT, kWs = 8 - kW;  // sums, then tiles of x, then those of M in turns
  const char* next = reinterpret_cast<const char*>(w) + prefetch.start;
  unrolled<RT>([&](auto r) {
    unrolled<NP>([&](auto p) {
      if (first) {
        tile_zero<r * NP + p>();
      } else {
        tile_load<r * NP + p>(acc + p * acc_stride + r * kTileRows * kPanel);
      }
    });
  });
  const auto step = [&](const bf16* panel, int64_t stride) __attribute__((always_inline)) {
    unrolled<RT>([&](auto r) { tile_load<kX + r>(x + r * kTileSize); });
    unrolled<NP>([&](auto p) {
      tile_load<kW + p % kWs>(panel + p * stride);
      for (int64_t line = 0; line < prefetch.step; line += 64)
        __builtin_prefetch(next + p * w_stride * static_cast<int64_t>(sizeof(bf16)) + line);
      unrolled<RT>([&](auto r) { tile_multiply<r * NP + p, kX + r, kW + p % kWs>(); });
    });
    x += RT * kTileSize;
  };
  const int64_t whole = depth / kTileTerms * kTileTerms;
  int64_t stop = smaller(prefetch.turn, whole);
  for (int64_t k = 0; k < whole; stop = whole, next += prefetch.jump)
    for (; k < stop; k += kTileTerms, next += prefetch.step) step(w + k * kPanel, w_stride);
  if (whole < depth) {
    alignas(64) bf16 last[NP * kTileSize] = {};
    for (int p = 0; p < NP; ++p)
      std::memcpy(last + p * kTileSize, w + p * w_stride + whole * kPanel,
                  static_cast<size_t>((depth - whole) * kPanel) * sizeof(bf16));
    step(last, kTileSize);
  }
  unrolled<RT>([&](auto r) {
    unrolled<NP>([&](auto p) { tile_store<r * NP + p>(acc + p * acc_stride + r * kTileRows * kPanel); });
  });
}

// The same over blocks. x: [depth / 4][MR]; scale: for each block MR scales of x, then MR sums of x.
// Limit: dot products, 8 a block beside 4 other operations on the sums; unpacking is shared by the rows.
template <class T, int MR, int NP>
void micro_blocks(const uint32_t* x, const float* scale, const T* w, int64_t w_stride, int64_t depth, float* acc,
                  int64_t acc_stride, bool first, Prefetch prefetch) {
  const char* next = reinterpret_cast<const char*>(w) + prefetch.start;
  int64_t stop = smaller(prefetch.turn, depth);
  for (int64_t k = 0; k < depth; stop = depth, next += prefetch.jump) {
    for (; k < stop; k += kBlockTerms, w += kBlockBytes<T>, scale += 2 * MR, next += prefetch.step, first = false) {
      typename BlockProducts<T>::Sums c[MR][NP];
#pragma GCC unroll 24
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < NP; ++p) c[r][p].zero();
      }
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p)
        for (int64_t line = 0; line < prefetch.step; line += 64) __builtin_prefetch(next + p * w_stride + line);
      for (int two = 0; two < kBlockTerms / 4; two += 2) {
        const auto run = [&](auto half) __attribute__((always_inline)) {
          Quads16 v[NP];
#pragma GCC unroll 8
          for (int p = 0; p < NP; ++p) BlockProducts<T>::load_step(v[p], w + p * w_stride + kBlockHead, two + half);
#pragma GCC unroll 24
          for (int r = 0; r < MR; ++r) {
            const PairBroadcast b(x + r);
#pragma GCC unroll 8
            for (int p = 0; p < NP; ++p) c[r][p].step(v[p], b);
          }
          x += MR;
        };
        run(std::integral_constant<int, 0>{});
        run(std::integral_constant<int, 1>{});
      }
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) {
        Lane16 scales, minima;
        load(scales, reinterpret_cast<const f16*>(w + p * w_stride));
        load(minima, reinterpret_cast<const f16*>(w + p * w_stride) + kPanel);
#pragma GCC unroll 24
        for (int r = 0; r < MR; ++r) {
          Lane16 product = c[r][p].sums(), sum;
          product.multiply(Broadcast(scale + r));
          FloatSums::begin(sum, acc + p * acc_stride + r * kPanel, first);
          sum.step(scales, product);
          sum.step(minima, Broadcast(scale + MR + r));
          sum.store(acc + p * acc_stride + r * kPanel);
        }
      }
    }
  }
}

constexpr bool uses_registers(Arithmetic kind) { return kTileRegisters && kind == Arithmetic::bf16; }

// Panels that a tile of so many rows spans.
constexpr int64_t span_of(Arithmetic kind, int64_t rows) {
  if (uses_registers(kind)) return rows <= kTileRows ? 4 : 2;
  return panels_per_tile(static_cast<int>(rows));
}

template <class A>
using Micro = void (*)(const typename A::X*, const float*, const typename A::Weight*, int64_t, int64_t, float*, int64_t,
                       bool, Prefetch);

// The micro-kernel for so many rows: over span_of(rows) panels if `wide`, else over one.
template <class A, int MR = kMaxRows>
Micro<A> micro_for(int64_t rows, bool wide) {
  if constexpr (std::is_same_v<A, TileBf16Products>) {
    if (rows <= kTileRows) return wide ? &micro_tiles<1, 4> : &micro_tiles<1, 1>;
    return wide ? &micro_tiles<2, 2> : &micro_tiles<2, 1>;
  } else if constexpr (MR == 0) {
    return nullptr;
  } else {
    if constexpr (A::kArithmetic == Arithmetic::i8) {
      using T = typename A::Weight;
      if (rows == MR) return wide ? &micro_blocks<T, MR, panels_per_tile(MR)> : &micro_blocks<T, MR, 1>;
    } else {
      if (rows == MR) return wide ? &micro<A, MR, panels_per_tile(MR)> : &micro<A, MR, 1>;
    }
    return micro_for<A, MR - 1>(rows, wide);
  }
}

// Tiles of at most `largest` rows. In lanes they are as few as can be, and sizes differ by at most one; tile registers
// have 16 rows each whether they are used or not, so all tiles but the last are whole.
struct Tiles {
  Arithmetic kind;
  bool registers;
  int64_t total, largest, count, small, large_count;
  Tiles(int64_t n, Arithmetic kind)
      : kind(kind),
        registers(uses_registers(kind)),
        total(n),
        largest(registers ? 2 * kTileRows : kMaxRows),
        count((n + largest - 1) / largest),
        small(registers ? largest : n / count),
        large_count(registers ? 0 : n % count) {}
  int64_t begin(int64_t tile) const { return tile * small + smaller(tile, large_count); }
  int64_t rows(int64_t tile) const { return smaller(small + (tile < large_count ? 1 : 0), total - begin(tile)); }
  int64_t stored_rows(int64_t tile) const { return registers ? whole(rows(tile), kTileRows) : rows(tile); }
  int64_t span(int64_t tile) const { return span_of(kind, rows(tile)); }
};

// Rows of accumulators, with room for whole tile registers.
inline int64_t accumulated(int64_t rows) { return kTileRegisters ? whole(rows, kTileRows) : rows; }

// The k terms of a block of rows, packed for one arithmetic, padded with zeros to whole steps of the micro-kernel.
struct PackedRows {
  RowInput in;
  Arithmetic arithmetic;
  int64_t k, rows;
  char* data;    // [tile][depth][rows of tile] float32; or pairs [tile][depth / 2][rows of tile]; or four bytes
                 // [tile][depth / 4][rows of tile]; or, for tile registers, [tile][depth / 32][stored rows of tile][32]
  float* scale;  // i16: [ceil(k / kBlock)][rows]; i8: [tile][depth / kBlockTerms][scales, sums of x][rows of tile]

  Tiles tiles() const { return {rows, arithmetic}; }
  int64_t depth() const {
    return whole(k, uses_registers(arithmetic) ? kTileTerms : arithmetic == Arithmetic::i8 ? kBlockTerms : 2);
  }
  int64_t element_bytes() const { return arithmetic == Arithmetic::f32 ? 4 : arithmetic == Arithmetic::i8 ? 1 : 2; }
  int64_t data_bytes() const {
    return whole((uses_registers(arithmetic) ? whole(rows, kTileRows) : rows) * depth() * element_bytes(), 64);
  }
  int64_t scale_bytes() const {
    const int64_t blocks = arithmetic == Arithmetic::i16  ? (k + kBlock - 1) / kBlock
                           : arithmetic == Arithmetic::i8 ? depth() / kBlockTerms * 2
                                                          : 0;
    return whole(blocks * rows * 4, 64);
  }
  bool same(const PackedRows& other) const {
    return in.data == other.in.data && in.scales == nullptr && other.in.scales == nullptr &&
           in.component_scale == nullptr && other.in.component_scale == nullptr && arithmetic == other.arithmetic &&
           k == other.k && in.stride == other.in.stride;
  }
  // Of a tile's first row, from `term` on.
  template <class X>
  X* at(int64_t first_row, int64_t stored_rows, int64_t term) const {
    return reinterpret_cast<X*>(data + (first_row * depth() + term * stored_rows) * element_bytes());
  }
  float* scale_at(int64_t first_row, int64_t tile_rows, int64_t term) const {
    if (arithmetic == Arithmetic::i16) return scale + term / kBlock * rows + first_row;
    return scale + (first_row * (depth() / kBlockTerms) + term / kBlockTerms * tile_rows) * 2;
  }
};

template <class T>
void widen(const T* x, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + kPanel <= count; k += kPanel) {
    Lane16 v;
    load(v, x + k);
    v.store(out + k);
  }
  for (; k < count; ++k) out[k] = to_float(x[k]);
}

template <class T>
void narrow(const float* v, int64_t count, T* out) {
  int64_t k = 0;
  for (; k + kPanel <= count; k += kPanel) {
    Lane16 lane;
    lane.load(v + k);
    store(lane, out + k);
  }
  for (; k < count; ++k) from_float(v[k], out + k);
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

// Row `row`, scaled, as float32: out[depth].
void scaled_row(const PackedRows& p, int64_t row, float* out) {
  with_activation(p.in.dtype, [&]<class T>(T) {
    widen(static_cast<const T*>(p.in.data) + row * p.in.stride, p.k, out);
  });
  if (p.in.scales) multiply(out, p.in.scales + p.in.slots[row / p.in.rows_per_slot] * p.in.scales_stride, p.k);
  if (p.in.component_scale) multiply(out, p.in.component_scale, p.k);
  for (int64_t j = p.k; j < p.depth(); ++j) out[j] = 0.0f;
}

// Rounds values to integers of at most `limit` times the returned scale, which is NaN if a value is not finite.
template <class Integer>
float quantize(const float* v, int64_t count, float limit, Integer* out) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t magnitude = bits_of(v[k]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float top = float_of(largest);
  constexpr float kTiny = 1e-33f;  // below, limit / top would overflow
  const bool finite = largest < 0x7f800000u;
  const float inverse = finite && top > kTiny ? limit / top : 0.0f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  for (int64_t k = 0; k < count; ++k) out[k] = static_cast<Integer>(bits_of(v[k] * inverse + kMagic));
  if (!finite) return __builtin_nanf("");
  return top > kTiny ? top / limit : 0.0f;
}

// Row `row` of the block, which belongs to `tile`; the block's first row is `row0` of the product.
void pack_row(const PackedRows& p, int64_t row0, const Tiles& tiles, int64_t tile, int64_t row) {
  thread_local Scratch scratch;
  const int64_t k = p.depth(), rows = tiles.stored_rows(tile), first_row = tiles.begin(tile), index = row - first_row;
  float* v = reinterpret_cast<float*>(scratch.get(k * 6));
  scaled_row(p, row0 + row, v);
  if (p.arithmetic == Arithmetic::f32) {
    float* out = p.at<float>(first_row, rows, 0) + index;
    for (int64_t j = 0; j < k; ++j) out[j * rows] = v[j];
    return;
  }
  char* pairs = reinterpret_cast<char*>(v + k);
  if (p.arithmetic == Arithmetic::i8) {
    auto* bytes = reinterpret_cast<int8_t*>(pairs);
    for (int64_t j = 0; j < k; j += kBlockTerms) {
      float* scale = p.scale_at(first_row, rows, j) + index;
      *scale = quantize(v + j, kBlockTerms, 127.0f, bytes + j);
      int sum = 0;
      for (int64_t i = j; i < j + kBlockTerms; ++i) sum += bytes[i];
      scale[rows] = static_cast<float>(sum) * *scale;
    }
    uint32_t* out = p.at<uint32_t>(first_row, rows, 0) + index;
    for (int64_t j = 0; j < k / 4; ++j) std::memcpy(out + j * rows, pairs + j * 4, 4);
    return;
  }
  if (p.arithmetic == Arithmetic::bf16) {
    narrow(v, k, reinterpret_cast<bf16*>(pairs));
  } else {
    int16_t* out = reinterpret_cast<int16_t*>(pairs);
    for (int64_t j = 0; j < k; j += kBlock)
      p.scale_at(first_row, rows, j)[index] = quantize(v + j, smaller(kBlock, k - j), 32767.0f, out + j);
  }
  if (tiles.registers) {
    bf16* out = p.at<bf16>(first_row, rows, 0) + index * kTileTerms;
    for (int64_t j = 0; j < k; j += kTileTerms)
      std::memcpy(out + j * rows, pairs + j * 2, kTileTerms * sizeof(bf16));
    if (row + 1 == p.rows)  // the tile's unused rows
      for (int64_t r = index + 1; r < rows; ++r)
        for (int64_t j = 0; j < k; j += kTileTerms)
          std::memset(out + j * rows + (r - index) * kTileTerms, 0, kTileTerms * sizeof(bf16));
    return;
  }
  uint32_t* out = p.at<uint32_t>(first_row, rows, 0) + index;
  for (int64_t j = 0; j < k / 2; ++j) std::memcpy(out + j * rows, pairs + j * 4, 4);
}

void pack_tile(const PackedRows& p, int64_t row0, int64_t tile) {
  const Tiles tiles = p.tiles();
  if (tile >= tiles.count) return;
  const int64_t begin = tiles.begin(tile), end = begin + tiles.rows(tile);
  for (int64_t row = begin; row < end; ++row) pack_row(p, row0, tiles, tile, row);
}

// Gathers terms [k0, k0 + depth) of 16 columns of a matrix that is not packed this way round, as float32:
// out[depth][16].
template <class T>
void gather_panel(const Matrix& m, int64_t panel, int64_t k0, int64_t depth, float* out) {
  const T* data = static_cast<const T*>(m.data);
  const int64_t n0 = panel * kPanel;
  const int64_t columns = smaller(kPanel, m.n - n0);
  if (columns < kPanel) std::memset(out, 0, static_cast<size_t>(depth * kPanel) * sizeof(float));
  if (m.storage == Storage::panels_transposed) {
    // Stored panels hold 16 terms of this product side by side: element (n, k) at [k / 16][n][k % 16], or, paired,
    // [k / 16][n / 2][k % 16][n % 2].
    constexpr bool pairs = t2::paired(kDType<T>);
    const int64_t stored = pairs ? even(m.n) : m.n;
    for (int64_t k = 0; k < depth; ++k) {
      const T* w = data + ((k0 + k) / kPanel * stored + n0) * kPanel + (k0 + k) % kPanel * (pairs ? 2 : 1);
      for (int64_t j = 0; j < columns; ++j)
        out[k * kPanel + j] = to_float(pairs ? w[j / 2 * 2 * kPanel + (j & 1)] : w[j * kPanel]);
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

// The same from panels in blocks of the transposed matrix: element (n, k) in block n / 32 of panel k / 16.
template <class T>
void gather_blocks(const Matrix& m, int64_t panel, int64_t k0, int64_t depth, float* out) {
  const int64_t n0 = panel * kPanel, columns = smaller(kPanel, m.n - n0);
  const int64_t blocks = (m.n + kBlockTerms - 1) / kBlockTerms;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t stored = (k0 + k) / kPanel;
    const T* block = static_cast<const T*>(m.data) + (stored * blocks + n0 / kBlockTerms) * kBlockBytes<T>;
    for (int64_t j = 0; j < kPanel; ++j)
      out[k * kPanel + j] = j < columns ? to_float(block, (k0 + k) % kPanel, n0 % kBlockTerms + j) : 0.0f;
  }
}

// The same as pairs, out[depth / 2][16][2], from bfloat16 panels of the transposed matrix. Whole panels of 16 terms are
// read and written, which the stored ones have and kSlice has room for.
void gather_pairs(const Matrix& m, int64_t panel, int64_t k0, int64_t depth, bf16* out) {
  const int64_t n0 = panel * kPanel, stored = even(m.n), pairs = smaller(kPanel, stored - n0) / 2;
  const bf16* w = static_cast<const bf16*>(m.data) + k0 * stored + n0 * kPanel;
  for (int64_t k = 0; k < depth; k += kPanel) transpose_pairs(w + k * stored, pairs, out + k * kPanel);
}

// The weights that a product reads from memory: elements of a panel and of one term of it, bytes of an element, terms of
// one load of a panel. Gathered ones are in cache: no bytes.
struct Stream {
  int64_t panel_size, term_size, element_bytes, terms;
  int64_t panel_bytes() const { return panel_size * element_bytes; }
  int64_t term_bytes() const { return term_size * element_bytes; }
  int64_t load_bytes() const { return term_bytes() * terms; }
};

template <class A>
Stream stream_of(const Matrix& m) {
  using Weight = typename A::Weight;
  constexpr int64_t kTermSize = kInBlocks<Weight> ? kBlockBytes<Weight> / kBlockTerms : kPanel;
  const int64_t terms = whole(m.k, kInBlocks<Weight> ? kBlockTerms : t2::paired(kDType<Weight>) ? 2 : 1);
  return {terms * kTermSize, kTermSize, sizeof(Weight), A::kTerms};
}

// Terms of a slice: all of them for one tile, which keeps its sums in registers, or where a panel fits in L1 anyway.
int64_t slice_of(const Tiles& tiles, int64_t k, const Stream& stream) {
  return tiles.count == 1 || stream.panel_bytes() <= kNearBytes ? k : kSlice;
}

// Of the only row tile, with `terms` terms to the end of a run.
Prefetch prefetch_stream(const Stream& stream, int64_t run, int64_t terms) {
  if (stream.element_bytes == 0) return {0, 0, terms, 0};
  const int64_t start = kBytesAhead / run, before_end = terms - start / stream.term_bytes();
  const int64_t turn = before_end < 0 ? 0 : whole(before_end, stream.terms);
  return {start, stream.load_bytes(), turn, (run - 1) * stream.panel_bytes()};
}

// Of row tile `tile`, `distance` elements before the slice that is read next.
Prefetch prefetch_share(const Stream& stream, const Tiles& tiles, int64_t tile, int64_t distance, int64_t depth) {
  const int64_t share = depth * stream.term_bytes() / tiles.count;
  return {distance * stream.element_bytes + tile * share, stream.load_bytes() / tiles.count, depth, 0};
}

// One call of the micro-kernel: rows [row, row + rows) of the block, one panel or `wide`, terms [k0, k0 + depth).
struct Tile {
  int64_t row, rows, stored_rows, panel;
  int64_t index;  // of the panel in its run
  bool wide;
  int64_t k0, depth;
  Prefetch prefetch;
};

// Visits every (slice of terms, run of panels, row tile) of one part in the order that keeps slices in cache:
// prepare(panel, panels, k0) once per run and slice, then run_tile(Tile) for each.
template <class Prepare, class RunTile>
void sweep(const Tiles& tiles, int64_t begin, int64_t end, int64_t k, int64_t slice, const Stream& stream,
           const Prepare& prepare, const RunTile& run_tile) {
  const int64_t span = tiles.span(0);
  if (tiles.count == 1 && begin + span < end) {  // nothing is used twice: one run after the other, from end to end
    for (int64_t panel = begin; panel < end; panel += span)
      sweep(tiles, panel, smaller(panel + span, end), k, slice, stream, prepare, run_tile);
    return;
  }
  for (int64_t k0 = 0; k0 < k; k0 += slice) {
    const int64_t depth = even(smaller(slice, k - k0));
    int64_t run = span;
    for (int64_t panel = begin; panel < end; panel += run) {
      if (panel + span > end) run = 1;
      prepare(panel, run, k0);
      const bool run_follows = panel + run < end, slice_follows = k0 + slice < k;
      const int64_t distance = run_follows     ? run * stream.panel_size
                               : slice_follows ? (begin - panel) * stream.panel_size + slice * stream.term_size
                                               : run * stream.panel_size - k0 * stream.term_size;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t rows = tiles.rows(t), stored_rows = tiles.stored_rows(t), own_span = tiles.span(t);
        const bool wide = own_span <= run;
        const Prefetch prefetch = tiles.count == 1 ? prefetch_stream(stream, run, k - k0)
                                                   : prefetch_share(stream, tiles, t, distance, depth);
        for (int64_t j = 0; j < run; j += wide ? own_span : 1)
          run_tile(Tile{tiles.begin(t), rows, stored_rows, panel + j, j, wide, k0, depth, prefetch});
      }
    }
  }
}

// Accumulators of one group of panels: [panel][rows of the block][16].
struct Accumulators {
  float* data;
  int64_t stride, begin, end;
  bool first;  // nothing has been added yet
  float* at(int64_t panel, int64_t row) const { return data + (panel - begin) * stride + row * kPanel; }
};

template <class A>
void run_micro(const Tile& t, const PackedRows& x, const typename A::Weight* w, int64_t w_stride,
               const Accumulators& acc) {
  const int64_t depth = A::kTerms == 1 ? smaller(t.depth, x.k - t.k0) : t.depth;
  constexpr bool kScaled = A::kArithmetic == Arithmetic::i16 || A::kArithmetic == Arithmetic::i8;
  const float* scale = kScaled ? x.scale_at(t.row, t.stored_rows, t.k0) : nullptr;
  micro_for<A>(t.rows, t.wide)(x.at<typename A::X>(t.row, t.stored_rows, t.k0), scale, w, w_stride, depth,
                               acc.at(t.panel, t.row), acc.stride, acc.first && t.k0 == 0, t.prefetch);
}

// acc (+)= the row block times one part of the matrix, packed.
template <class A>
void multiply_panels(const Matrix& m, const PackedRows& x, const Tiles& tiles, const Accumulators& acc) {
  const Stream stream = stream_of<A>(m);
  const auto* w = static_cast<const typename A::Weight*>(m.data);
  const int64_t slice = A::kArithmetic == Arithmetic::i16 ? kBlock : slice_of(tiles, m.k, stream);
  sweep(
      tiles, acc.begin, acc.end, m.k, slice, stream, [](int64_t, int64_t, int64_t) {},
      [&](const Tile& t) {
        run_micro<A>(t, x, w + t.panel * stream.panel_size + t.k0 * stream.term_size, stream.panel_size, acc);
      });
}

// The same for a matrix that is gathered first, by gather(panel, k0, depth, out), into scratch of kGroup slices.
template <class A, class Gather>
void multiply_gathered(const Matrix& m, const PackedRows& x, const Tiles& tiles, const Accumulators& acc,
                       typename A::Weight* gathered, const Gather& gather) {
  constexpr int64_t kSize = kSlice * kPanel;
  sweep(
      tiles, acc.begin, acc.end, m.k, kSlice, Stream{0, kPanel, 0, 1},
      [&](int64_t panel, int64_t run, int64_t k0) {
        for (int64_t j = 0; j < run; ++j) gather(panel + j, k0, smaller(kSlice, m.k - k0), gathered + j * kSize);
      },
      [&](const Tile& t) { run_micro<A>(t, x, gathered + t.index * kSize, kSize, acc); });
}

template <class T>
void multiply_part(const Matrix& m, const PackedRows& x, const Accumulators& acc, float* gathered) {
  using Packed = typename Products<T>::Type;
  const Tiles tiles = x.tiles();
  if (m.storage == Storage::panels && x.arithmetic == Packed::kArithmetic) {
    multiply_panels<Packed>(m, x, tiles, acc);
  } else if constexpr (kInBlocks<T>) {
    multiply_gathered<F32Products<float>>(m, x, tiles, acc, gathered, [&](auto... at) { gather_blocks<T>(m, at...); });
  } else if (m.storage == Storage::panels) {
    multiply_panels<F32Products<T>>(m, x, tiles, acc);
  } else if (x.arithmetic == Arithmetic::f32) {
    multiply_gathered<F32Products<float>>(
        m, x, tiles, acc, gathered,
        [&](int64_t panel, int64_t k0, int64_t depth, float* out) { gather_panel<T>(m, panel, k0, depth, out); });
  } else if constexpr (Packed::kArithmetic == Arithmetic::bf16) {
    multiply_gathered<Packed>(
        m, x, tiles, acc, reinterpret_cast<bf16*>(gathered),
        [&](int64_t panel, int64_t k0, int64_t depth, bf16* out) { gather_pairs(m, panel, k0, depth, out); });
  }
}

// Scales and bias of the 16 columns from n0 on, 1 and 0 where there are none.
struct Finish {
  alignas(64) float scale[kPanel];
  alignas(64) float bias[kPanel] = {};
  Finish(const Product& product, int64_t n0) {
    const RowOutput& out = product.out;
    const int64_t columns = smaller(kPanel, product.parts[0].m.n - n0);
    for (int64_t j = 0; j < kPanel; ++j)
      scale[j] = product.column_scale && j < columns ? product.column_scale[n0 + j] : 1.0f;
    if (out.bias)
      with_activation(out.bias_dtype, [&]<class B>(B) { widen(static_cast<const B*>(out.bias) + n0, columns, bias); });
  }
  void apply(Lane16& v) const { v.scale_and_add(scale, bias); }
};

// acc = acc * scale + bias: the end of a first part that others follow.
void finish_panel(const Product& product, float* acc, int64_t rows, int64_t n0) {
  const Finish finish(product, n0);
  for (int64_t r = 0; r < rows; ++r) {
    Lane16 v;
    v.load(acc + r * kPanel);
    finish.apply(v);
    v.store(acc + r * kPanel);
  }
}

template <class T>
void store_panel(const Product& product, const float* acc, int64_t rows, int64_t row0, int64_t n0, bool finished) {
  const RowOutput& out = product.out;
  const int64_t columns = smaller(kPanel, product.parts[0].m.n - n0);
  const Finish finish(product, n0);
  for (int64_t r = 0; r < rows; ++r) {
    T* y = static_cast<T*>(out.data) + (row0 + r) * out.stride + n0;
    Lane16 v;
    v.load(acc + r * kPanel);
    if (!finished) finish.apply(v);
    if (columns == kPanel) {
      store(v, y);
    } else {
      T whole[kPanel];
      store(v, whole);
      std::memcpy(y, whole, static_cast<size_t>(columns) * sizeof(T));
    }
  }
}

// One row block against panels [begin, end) of a product. x: its packed rows, one per part.
void panel_range(const Product& product, const PackedRows* const* x, int64_t row0, int64_t rows, int64_t begin,
                 int64_t end) {
  thread_local Scratch scratch;
  [[maybe_unused]] const TileConfiguration configuration;
  const int64_t stride = accumulated(rows) * kPanel;
  float* data = reinterpret_cast<float*>(scratch.get((kGroup * stride + kGroup * kSlice * kPanel) * 4));
  for (int64_t group = begin; group < end; group += kGroup) {
    Accumulators acc{data, stride, group, smaller(group + kGroup, end), true};
    const bool finished = product.column_scale != nullptr && product.part_count > 1;
    for (int part = 0; part < product.part_count; ++part) {
      const Matrix& m = product.parts[part].m;
      with_format(m.dtype, [&]<class T>(T) { multiply_part<T>(m, *x[part], acc, data + kGroup * stride); });
      acc.first = false;
      if (part == 0 && finished)
        for (int64_t p = group; p < acc.end; ++p) finish_panel(product, acc.at(p, 0), rows, p * kPanel);
    }
    with_activation(product.out.dtype, [&]<class T>(T) {
      for (int64_t p = group; p < acc.end; ++p)
        store_panel<T>(product, acc.at(p, 0), rows, row0, p * kPanel, finished);
    });
  }
}

int64_t panels_of(const Product& product) { return (product.parts[0].m.n + kPanel - 1) / kPanel; }

void matmul(const Product* products, int count, int64_t rows, ParallelFor parallel_for) {
  thread_local Scratch scratch;
  PackedRows packed[kMaxProducts * kMaxParts];
  const PackedRows* x[kMaxProducts][kMaxParts] = {};
  int first_product[kStages + 1] = {}, first_pack[kStages + 1] = {};
  int packs = 0, stage = 0;
  int64_t terms = 0;
  for (int i = 0; i < count; ++i) {
    for (; stage < products[i].stage; first_product[stage] = i, first_pack[stage] = packs) ++stage;
    int64_t own = 0;
    for (int part = 0; part < products[i].part_count; ++part) {
      const auto& [in, m] = products[i].parts[part];
      const PackedRows wanted{in, arithmetic(in, m), m.k, 0, nullptr, nullptr};
      int found = 0;
      while (found < packs && !packed[found].same(wanted)) ++found;
      if (found == packs) packed[packs++] = wanted;
      x[i][part] = &packed[found];
      own += m.k;
    }
    terms = own > terms ? own : terms;
  }
  for (; stage < kStages; first_product[stage] = count, first_pack[stage] = packs) ++stage;
  for (int64_t row0 = 0; row0 < rows; row0 += kRowBlock) {
    const int64_t block = smaller(kRowBlock, rows - row0);
    int64_t bytes = 0, pack_terms = 0;
    for (int i = 0; i < packs; ++i) {
      packed[i].rows = block;
      bytes += packed[i].data_bytes() + packed[i].scale_bytes();
      pack_terms = packed[i].k > pack_terms ? packed[i].k : pack_terms;
    }
    char* at = scratch.get(bytes);
    for (int i = 0; i < packs; ++i) {
      packed[i].data = at;
      packed[i].scale = reinterpret_cast<float*>(at + packed[i].data_bytes());
      at += packed[i].data_bytes() + packed[i].scale_bytes();
    }
    for (int stage = 0; stage < kStages; ++stage) {
      const int pack0 = first_pack[stage], own_packs = first_pack[stage + 1] - pack0;
      // A job is a whole tile: rows of one lie interleaved, so that threads would write to the same cache lines.
      int64_t tiles = 0;
      for (int i = pack0; i < pack0 + own_packs; ++i) tiles = larger(tiles, packed[i].tiles().count);
      const auto pack = [&](int64_t begin, int64_t end) {
        for (int64_t job = begin; job < end; ++job) pack_tile(packed[pack0 + job % own_packs], row0, job / own_packs);
      };
      if (own_packs > 0) parallel(parallel_for, tiles * own_packs, grain(kPackGrain, pack_terms * block / tiles), pack);
      const auto compute = [&](int64_t begin, int64_t end) {
        for (int i = first_product[stage]; i < first_product[stage + 1] && begin < end; ++i) {
          const int64_t own = panels_of(products[i]);
          if (begin < own) panel_range(products[i], x[i], row0, block, begin, smaller(end, own));
          begin = begin > own ? begin - own : 0;
          end -= own;
        }
      };
      int64_t panels = 0;
      for (int i = first_product[stage]; i < first_product[stage + 1]; ++i) panels += panels_of(products[i]);
      if (panels > 0) parallel(parallel_for, panels, grain(kFmaGrain, block * terms * kPanel), compute);
    }
  }
}

void reduce_scales(const float* t, const float* h, const float* component_scale, const int64_t* slots,
                   int64_t rows_per_slot, int64_t rows, int64_t k, float* dscales, ParallelFor parallel_for) {
  parallel(parallel_for, k, kScaleGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < rows; ++b) {
      float* d = dscales + slots[b / rows_per_slot] * k;
      const float* tb = t + b * k;
      const float* hb = h + b * k;
      for (int64_t j = begin; j < end; ++j) d[j] += tb[j] * hb[j] * (component_scale ? component_scale[j] : 1.0f);
    }
  });
}

// FMAs from registers alone: independent accumulators enough to cover their latency, few enough to stay in registers.
template <class A, int Terms>
int64_t chain(int64_t steps) {
  alignas(64) static const char zeros[4 * kPanel] = {};
  typename A::Sums c[kMaxRows];
  typename A::Weights w;
  A::load_step(w, reinterpret_cast<const typename A::Weight*>(zeros), 0);
  const typename A::XBroadcast b(reinterpret_cast<const typename A::X*>(zeros));
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
  return kMaxRows * kPanel * Terms;
}

// The same on tile registers.
int64_t tile_chain(int64_t steps) {
  alignas(64) static const bf16 zeros[kTileSize] = {};
  [[maybe_unused]] const TileConfiguration configuration;
  unrolled<4>([&](auto c) { tile_zero<c>(); });
  tile_load<4>(zeros);
  tile_load<5>(zeros);
  for (int64_t s = 0; s < steps; ++s) unrolled<4>([&](auto c) { tile_multiply<c, 4, 5>(); });
  return 4 * kTileSize * kPanel;
}

int64_t multiply_adds(Arithmetic kind, int64_t steps) {
  if (kind == Arithmetic::f32) return chain<F32Products<float>, 1>(steps);
  if (kind == Arithmetic::i16) return chain<I16Products, 2>(steps);
  if (kind == Arithmetic::i8) return chain<BlockProducts<q4>, 4>(steps);
  if (kTileRegisters) return tile_chain(steps);
  return kBf16Products ? chain<std::conditional_t<kBf16Products, Bf16Products, F32Products<bf16>>, 2>(steps) : 0;
}

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
      __builtin_prefetch(line + kReadAhead);
      Lane16 v;
      v.load(reinterpret_cast<const float*>(line));
      sums[s % kSums].step(v, b);
    }
  }
#pragma GCC unroll 4
  for (Lane16& sum : sums) keep(sum);
}

}  // namespace
