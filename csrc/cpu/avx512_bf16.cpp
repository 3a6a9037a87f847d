// AVX-512 with dot products of bfloat16 (BF16) and of 16-bit integers (VNNI): two FMAs a lane where float32 has one.
#if defined(__x86_64__)
#include "target.h"
T2_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define T2_DOT_PRODUCTS
#include "avx512_lanes.h"

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kAvx512Bf16{"avx512_bf16", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
T2_TARGET_END
#endif
