// Attention's operands in bfloat16, for machines with its dot product; included after vec_avx512.h.
#pragma once

#include "attend.h"

namespace kernels {
namespace {

// Two neighbours of the summed axis share 32 bits; a float's place holds such a pair.
struct PairedKeys {
    using scalar = bf16;
    static constexpr int PAIR = 2, ROWS = ATTEND_ROWS, KEY_STEP = 2;
    static FN vec items(const bf16* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
    static FN vec items(const bf16* p, int n) {
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p));
    }
    static FN vec add_product(vec acc, vec x, vec y) {
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_castps_si512(y));
    }
    // Values of two keys side by side, column by column.
    static FN void join(const vec* x, float* out) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        __m512i a = _mm512_castps_si512(x[0]), b = _mm512_castps_si512(x[1]);
        write(out, _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b)));
        write(out + LANES, _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b)));
    }
    static FN void weights(const float* p, float* out) {
        for (int j = 0; j < KEYS / PAIR; j += LANES) {
            vec first = read(p + 2 * j), second = read(p + 2 * j + LANES);
            write(out + j, _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first)));
        }
    }
    static FN void product(int rows, const float* a, int a_stride, const float* b, int b_stride, int steps,
                           const float* keep, float* c, int c_stride, int vectors) {
        product_last<PairedKeys, ROWS>(rows, a, a_stride, b, b_stride, steps, keep, c, c_stride, vectors);
    }
};

}  // namespace
}  // namespace kernels
