// The inner loops for AVX-512 (F, BW, VL): bfloat16 is widened to float32 and fused like float32.
#if defined(__x86_64__)
#define ENTRY __attribute__((target("avx512f,avx512bw,avx512vl")))
#define FN inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl")))

#include "vec_avx512.h"

#include "table.h"

namespace kernels {

const Path* avx512_path() {
    static const Path path = make_path<Widened<bf16>, WidenedKeys<bf16>>();
    bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl");
    return here ? &path : nullptr;
}

}  // namespace kernels
#else
#include "kernels.h"
const kernels::Path* kernels::avx512_path() { return nullptr; }
#endif
