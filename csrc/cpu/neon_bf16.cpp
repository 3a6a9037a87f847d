// NEON with dot products of bfloat16 pairs and of bytes: Neoverse V1 and N2 (Graviton 3, Axion, Cobalt), Apple M2.
#if defined(__aarch64__)
#include "target.h"
T2_TARGET_BEGIN("arch=armv8.2-a+dotprod+bf16+i8mm")
#define T2_DOT_PRODUCTS
#include "neon_lanes.h"

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kNeonBf16{"neon_bf16", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
T2_TARGET_END
#endif
