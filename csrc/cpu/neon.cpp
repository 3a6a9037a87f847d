// ARMv8: NEON with FMA, which every 64-bit ARM processor has.
#if defined(__aarch64__)
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "neon_lanes.h"

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kNeon{"neon", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
#endif
