// AVX-512 BF16 with matrix products of bfloat16 on tile registers (AMX).
#if defined(__x86_64__)
#include "target.h"
T2_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define T2_DOT_PRODUCTS
#define T2_TILE_REGISTERS
#include "avx512_lanes.h"

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kAmxBf16{"amx_bf16", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
T2_TARGET_END
#endif
