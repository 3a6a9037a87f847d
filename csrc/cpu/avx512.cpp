// AVX-512 F/BW/DQ/VL.
#if defined(__x86_64__)
#include "target.h"
T2_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#include "avx512_lanes.h"

#include "matmul_impl.h"
#include "attention_impl.h"

namespace t2 {
const Kernels kAvx512{"avx512", kBf16Products, &matmul, &reduce_scales, &attend, &multiply_adds, &read};
}
T2_TARGET_END
#endif
