// The eight tile registers of AMX, each 16 rows of 64 bytes, behind functions of their numbers. A set that has them
// defines T2_TILE_REGISTERS; for all others the functions are never used.
#pragma once
#include <cstdint>

namespace {

#if defined(T2_TILE_REGISTERS)

constexpr bool kTileRegisters = true;

// Tile registers of full size on this thread; released at the end, so that switching threads stays cheap.
class TileConfiguration {
 public:
  TileConfiguration() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } sizes;
    asm volatile("ldtilecfg %0" ::"m"(sizes));
  }
  ~TileConfiguration() { asm volatile("tilerelease"); }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;
};

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// 16 rows that follow each other.
template <int T>
inline void tile_load(const void* data) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(data), "r"(int64_t{64}) : "memory");
}
template <int T>
inline void tile_store(void* data) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(data), "r"(int64_t{64}) : "memory");
}
// sums[row][column] += dot products of pairs of bfloat16: x [16 rows][16 pairs], w [16 pairs][16 columns].
template <int Sums, int X, int W>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
}

#else

constexpr bool kTileRegisters = false;

struct TileConfiguration {};
template <int T>
void tile_zero() {}
template <int T>
void tile_load(const void*) {}
template <int T>
void tile_store(void*) {}
template <int Sums, int X, int W>
void tile_multiply() {}

#endif

}  // namespace
