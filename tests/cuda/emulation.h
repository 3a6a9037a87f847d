// A small CUDA on the CPU, enough for csrc/cuda/decode.cuh: every thread of a grid is a fiber, all on one thread of
// the CPU. A fiber runs until it waits: for its warp at an mma, for its block, or for the grid. So warps and blocks
// run one after the other as far as they can, which is the order that shows a barrier that is missing. Shared memory
// starts as NaN, and loads of chunks are checked against the arrays that the kernel was given.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::t2::cuda::emulation::machine().thread_index())
#define blockIdx (::t2::cuda::emulation::machine().block_index())
#define gridDim (::t2::cuda::emulation::machine().grid_size())
#define __syncthreads() ::t2::cuda::emulation::machine().wait_for_block()

namespace t2::cuda {

inline uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 32 << 10;
constexpr size_t kSharedBytes = 48 << 10;

struct Index {
  unsigned x;
};

struct Range {
  const char* begin;
  int64_t bytes;
};

enum class State { ready, waits, done };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  unsigned block, thread;
  uint32_t a[4], b[2];  // fragments of the mma at which it waits
  float* sum;
};

class Machine {
 public:
  // Null, or what went wrong.
  const char* run(unsigned blocks, unsigned threads, std::function<void()> kernel, std::vector<Range> memory) {
    kernel_ = std::move(kernel);
    memory_ = std::move(memory);
    error_.clear();
    blocks_ = blocks;
    threads_ = threads;
    const size_t count = size_t{blocks} * threads;
    if (stacks_size_ < count) {
      stacks_.reset(new char[count * kStackBytes]);  // only what is used is ever touched
      stacks_size_ = count;
    }
    fibers_.assign(count, Fiber{});
    shared_.assign(blocks, std::vector<float>(kSharedBytes / 4, std::numeric_limits<float>::quiet_NaN()));
    block_arrived_.assign(blocks, 0);
    warp_arrived_.assign(count / kWarp, 0);
    grid_arrived_ = 0;
    chunks_ = chunks_before_grid_barrier_ = 0;
    for (size_t i = 0; i < count; ++i) prepare(i);
    while (advance()) {
    }
    for (const Fiber& fiber : fibers_)
      if (fiber.state != State::done && error_.empty()) error_ = "threads wait for others that never arrive";
    return error_.empty() ? nullptr : error_.c_str();
  }

  Index thread_index() const { return {self_->thread}; }
  Index block_index() const { return {self_->block}; }
  Index grid_size() const { return {blocks_}; }
  void* shared() { return shared_[self_->block].data(); }

  void wait_for_block() { wait(block_arrived_[self_->block], block_fibers(self_->block), threads_); }
  void wait_for_grid() {
    chunks_before_grid_barrier_ = chunks_;
    wait(grid_arrived_, fibers_.data(), static_cast<unsigned>(fibers_.size()));
  }

  void count_chunk() { ++chunks_; }
  int64_t chunks_before_grid_barrier() const { return chunks_before_grid_barrier_; }

  void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    std::copy(a, a + 4, self_->a);
    std::copy(b, b + 2, self_->b);
    self_->sum = sum;
    const unsigned warp = self_->thread / kWarp;
    Fiber* lanes = block_fibers(self_->block) + warp * kWarp;
    unsigned& arrived = warp_arrived_[(self_->block * threads_) / kWarp + warp];
    if (arrived + 1 == kWarp) multiply_fragments(lanes);
    wait(arrived, lanes, kWarp);
  }

  bool may_load(const char* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) error_ = "a 16-byte load off its boundary";
    for (const Range& range : memory_)
      if (p >= range.begin && p + 16 <= range.begin + range.bytes) return true;
    error_ = "a load outside the arrays";
    return false;
  }

 private:
  Fiber* block_fibers(unsigned block) { return &fibers_[size_t{block} * threads_]; }

  void prepare(size_t i) {
    Fiber& fiber = fibers_[i];
    fiber.block = static_cast<unsigned>(i) / threads_;
    fiber.thread = static_cast<unsigned>(i) % threads_;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks_.get() + i * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Machine::enter, 0);
  }

  static void enter();

  // Runs every warp until all its lanes wait. False when none could run.
  bool advance() {
    bool ran = false;
    for (size_t warp = 0; warp < fibers_.size() / kWarp; ++warp) {
      for (bool again = true; again;) {
        again = false;
        for (size_t lane = 0; lane < kWarp; ++lane) {
          Fiber& fiber = fibers_[warp * kWarp + lane];
          if (fiber.state != State::ready) continue;
          switch_to(fiber);
          ran = again = true;
        }
      }
    }
    return ran;
  }

  __attribute__((noinline)) void switch_to(Fiber& fiber) {
    self_ = &fiber;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  __attribute__((noinline)) void switch_back() {
    if (_setjmp(self_->resume) == 0) _longjmp(scheduler_, 1);
  }

  void wait(unsigned& arrived, Fiber* fibers, unsigned count) {
    if (++arrived == count) {
      arrived = 0;
      for (unsigned i = 0; i < count; ++i) fibers[i].state = State::ready;
      return;
    }
    self_->state = State::waits;
    switch_back();
  }

  // mma.m16n8k16: lane 4 g + t holds of a rows g and g + 8, columns 2 t, 2 t + 1 and 8 further; of b the same rows of
  // column g; of the sum columns 2 t and 2 t + 1 of rows g and g + 8.
  static void multiply_fragments(Fiber* lanes) {
    float a[16][16], b[8][16];
    const auto half = [](uint32_t pair, int i) { return from_bf16(static_cast<uint16_t>(i == 0 ? pair : pair >> 16)); };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = half(lanes[lane].a[r], i);
        for (int r = 0; r < 2; ++r) b[g][2 * t + i + 8 * r] = half(lanes[lane].b[r], i);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = lanes[lane].sum[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
        lanes[lane].sum[i] = sum;
      }
  }

  std::function<void()> kernel_;
  std::vector<Range> memory_;
  std::string error_;
  unsigned blocks_ = 0, threads_ = 0, grid_arrived_ = 0;
  int64_t chunks_ = 0, chunks_before_grid_barrier_ = 0;  // of weights
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  size_t stacks_size_ = 0;
  std::vector<std::vector<float>> shared_;
  std::vector<unsigned> block_arrived_, warp_arrived_;
  Fiber* self_ = nullptr;
  jmp_buf scheduler_;
};

inline Machine& machine() {
  static Machine only;
  return only;
}

inline void Machine::enter() {
  Machine& m = machine();
  m.kernel_();
  m.self_->state = State::done;
  m.switch_back();
}

}  // namespace emulation

using std::min;

inline Chunk load_cached(const char* p, bool inside) {
  Chunk chunk{};
  if (inside && emulation::machine().may_load(p)) std::memcpy(&chunk, p, sizeof chunk);
  return chunk;
}

inline Chunk load_once(const char* p, bool inside) {
  if (inside) emulation::machine().count_chunk();
  return load_cached(p, inside);
}

inline void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::machine().multiply(sum, {a0, a1, a2, a3}, {b0, b1});
}

inline uint32_t subtract_bf16x2(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t pair, int shift) { return from_bf16(static_cast<uint16_t>(pair >> shift)); };
  return uint32_t{to_bf16(half(a, 16) - half(b, 16))} << 16 | to_bf16(half(a, 0) - half(b, 0));
}

inline float from_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) value = fraction == 0 ? std::numeric_limits<float>::infinity() : std::nanf("");
  return (bits & 0x8000) != 0 ? -value : value;
}

inline uint32_t f16x2_to_bf16x2(uint32_t pair) {
  return uint32_t{to_bf16(from_f16(static_cast<uint16_t>(pair >> 16)))} << 16 |
         to_bf16(from_f16(static_cast<uint16_t>(pair)));
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return picked;
}

inline void grid_barrier() { emulation::machine().wait_for_grid(); }

template <class T>
T& shared_memory() {
  static_assert(sizeof(T) <= emulation::kSharedBytes);
  return *static_cast<T*>(emulation::machine().shared());
}

}  // namespace t2::cuda
