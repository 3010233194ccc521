// The inner loops for AVX-512 with bfloat16: products of bfloat16 by the dot-product instruction.
#if defined(__x86_64__)
#define ENTRY __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define FN inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512bf16")))

#include "vec_avx512.h"

#include "paired.h"
#include "table.h"

namespace kernels {
namespace {

// A lane takes two neighbours of K a step; a float's place holds such a pair.
struct Paired {
    using scalar = bf16;
    using stored = bf16;
    static constexpr int DEPTH = 2, ITEMS = 1;
    struct Line {
        vec part[ITEMS];
    };
    static FN vec pairs(__m512i x) { return _mm512_castsi512_ps(x); }
    static FN Line take(const bf16* w) { return {{pairs(_mm512_loadu_si512(w))}}; }
    static FN Line take(const bf16* w, int rows) { return {{pairs(_mm512_maskz_loadu_epi32(lanes(rows), w))}}; }
    static FN Line take_odd(const bf16* w, int rows) {
        return {{pairs(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(rows), w)))}};
    }
    static FN vec add(vec acc, float item, vec part) {
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(int(bits_of(item))), (__m512bh)_mm512_castps_si512(part));
    }
    static FN vec items(const bf16* x) { return pairs(_mm512_loadu_si512(x)); }
    static FN vec items(const bf16* x, int n) { return pairs(_mm512_maskz_loadu_epi16((1u << n) - 1, x)); }
    static FN void put(float* items, int64_t k, int apart, bf16 x) {
        memcpy((char*)(items + k / DEPTH * apart) + k % DEPTH * sizeof x, &x, sizeof x);
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
