// The inner loops for AVX2 with FMA.
#if defined(__x86_64__)
#define ENTRY __attribute__((target("avx2,fma")))
#define FN inline __attribute__((always_inline, target("avx2,fma")))

#include "vec_avx2.h"

#include "table.h"

namespace kernels {

const Path* avx2_path() {
    static const Path path = make_path<Widened<bf16>, WidenedKeys<bf16>>();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &path : nullptr;
}

}  // namespace kernels
#else
#include "kernels.h"
const kernels::Path* kernels::avx2_path() { return nullptr; }
#endif
