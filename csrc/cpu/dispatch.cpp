#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "matmul.h"

namespace t2 {
namespace {

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bfloat16 and Linux lets this process: their registers are 8 KiB, which a
// process asks for before its first use.
bool has_tile_registers() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // cpuid 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTiles) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
// Whether Linux says that the processor has the dot products of neon_bf16.cpp; elsewhere nobody is asked.
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20, kInt8 = 1ul << 13, kBf16 = 1ul << 14;  // AT_HWCAP, then AT_HWCAP2
  return (getauxval(AT_HWCAP) & kDotProducts) != 0 && (~getauxval(AT_HWCAP2) & (kInt8 | kBf16)) == 0;
#else
  return false;
#endif
}
#endif

const Kernels* compiled[] = {
#if defined(__x86_64__)
    &kAmxBf16,
    &kAvx512Bf16,
    &kAvx512,
    &kAvx2,
#elif defined(__aarch64__)
    &kNeonBf16,
    &kNeon,
#endif
    &kPortable,
};

bool runs_here(const Kernels& set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&set == &kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&set == &kAvx512) return avx512;
  const bool dots = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (&set == &kAvx512Bf16) return dots;
  if (&set == &kAmxBf16) {
    static const bool tiles = has_tile_registers();
    return dots && tiles;
  }
#elif defined(__aarch64__)
  if (&set == &kNeonBf16) return has_dot_products();
#endif
  return true;
}

const Kernels* find(const char* isa) {
  for (const Kernels* set : compiled)
    if (std::strcmp(set->isa, isa) == 0 && runs_here(*set)) return set;
  return nullptr;
}

const Kernels* initial() {
  if (const char* wanted = std::getenv("T2KERNELS_CPU"))
    if (const Kernels* set = find(wanted)) return set;
  for (const Kernels* set : compiled)
    if (runs_here(*set)) return set;
  return &kPortable;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> set{initial()};
  return set;
}

}  // namespace

char* allocate(int64_t bytes) {
  void* data = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  if (data == nullptr) throw std::bad_alloc();
  return static_cast<char*>(data);
}

void release(char* data) { std::free(data); }

const Kernels& kernels() { return *chosen().load(std::memory_order_acquire); }

bool supported(const char* isa) { return find(isa) != nullptr; }

bool select_kernels(const char* isa) {
  const Kernels* set = find(isa);
  if (set != nullptr) chosen().store(set, std::memory_order_release);
  return set != nullptr;
}

}  // namespace t2
