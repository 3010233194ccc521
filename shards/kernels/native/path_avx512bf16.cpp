// The inner loops for AVX-512 with bfloat16: products of bfloat16 by the dot-product instruction.
#if defined(__x86_64__)
#define ENTRY __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define FN inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512bf16")))

#include "vec_avx512.h"

#include "paired.h"
#include "table.h"

namespace kernels {
namespace {

// A lane takes two neighbours of K a step.
struct Paired {
    using scalar = bf16;
    using operand = __m512i;
    static constexpr int STEP = 2 * LANES;
    static FN operand take(const bf16* p) { return _mm512_loadu_si512(p); }
    static FN operand take(const bf16* p, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
    static FN vec add_product(vec acc, operand x, operand w) {
        return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
    }
};

}  // namespace

const Path* avx512bf16_path() {
    static const Path path = make_path<Paired, PairedKeys>();
    return avx512_path() != nullptr && __builtin_cpu_supports("avx512bf16") ? &path : nullptr;
}

}  // namespace kernels
#else
#include "kernels.h"
const kernels::Path* kernels::avx512bf16_path() { return nullptr; }
#endif
