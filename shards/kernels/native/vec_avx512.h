// Vectors of 16 floats in one AVX-512 register. The including file defines FN with its target attribute.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace kernels {
namespace {

using vec = __m512;

// Rows of x that a tile of products takes: with two strips of weights 24 of the 32 registers accumulate.
constexpr int TILE_ROWS = 12;
// Attention's tiles: rows, and vectors of keys or columns.
constexpr int ATTEND_ROWS = 6, ATTEND_VECS = 4;

FN __mmask16 lanes(int n) { return __mmask16((1u << n) - 1); }
FN vec zero() { return _mm512_setzero_ps(); }
FN vec fill(float x) { return _mm512_set1_ps(x); }
FN vec plus(vec a, vec b) { return _mm512_add_ps(a, b); }
FN vec multiply(vec a, vec b) { return _mm512_mul_ps(a, b); }
FN vec subtract(vec a, vec b) { return _mm512_sub_ps(a, b); }
FN vec fused(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
FN vec read(const float* p) { return _mm512_loadu_ps(p); }
FN vec read(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
FN vec widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
FN vec read(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
FN vec read(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
// The firsts and the seconds of 16 pairs.
FN void split(__m512i pairs, vec& first, vec& second) {
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}
FN void read_pairs(const bf16* p, vec& first, vec& second) { split(_mm512_loadu_si512(p), first, second); }
FN void read_pairs(const bf16* p, int n, vec& first, vec& second) {
    split(_mm512_maskz_loadu_epi32(lanes(n), p), first, second);
}
FN vec read_halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// A unit of integers (ints.h): the firsts and the seconds of each pair of columns, pair by pair.
template <int BITS>
struct Ints;
template <>
struct Ints<4> {
    __m512i words;
    FN explicit Ints(const char* unit) : words(_mm512_loadu_si512(unit)) {}
    FN void next(vec& first, vec& second) {
        const vec numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        // Of an index four bits count.
        first = _mm512_permutexvar_ps(words, numbers);
        second = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 16), numbers);
        words = _mm512_srli_epi32(words, 4);
    }
};
template <>
struct Ints<8> {
    const char* at;
    FN explicit Ints(const char* unit) : at(unit) {}
    FN void next(vec& first, vec& second) {
        __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at));
        first = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
        second = _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16));
        at += 2 * LANES;
    }
};
FN void write(float* p, vec x) { _mm512_storeu_ps(p, x); }
FN void write(float* p, vec x, int n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
// As `store` of one number: to nearest, ties to even, NaN stays NaN.
FN __m256i narrow(vec x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
// Write, and give x as it reads back.
FN vec put(float* p, vec x) {
    write(p, x);
    return x;
}
FN vec put(float* p, vec x, int n) {
    write(p, x, n);
    return x;
}
FN vec put(bf16* p, vec x) {
    __m256i kept = narrow(x);
    _mm256_storeu_si256((__m256i*)p, kept);
    return widen(kept);
}
FN vec put(bf16* p, vec x, int n) {
    __m256i kept = narrow(x);
    _mm256_mask_storeu_epi16(p, lanes(n), kept);
    return widen(kept);
}

// x[i] lane j becomes x[j] lane i: 2 x 2, 4 x 4 within quarters, then quarters.
FN void transpose(vec* x) {
    vec pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int half = 0; half < 2; half++) {
            __m512d a = _mm512_castps_pd(pairs[i + half]), b = _mm512_castps_pd(pairs[i + half + 2]);
            fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // fours[4 * g + c] holds column 4 * q + c of rows 4 * g .. 4 * g + 3 in its quarter q.
    for (int c = 0; c < 4; c++) {
        vec even = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
        vec odd = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
        vec even_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
        vec odd_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
        x[c] = _mm512_shuffle_f32x4(even, even_high, 0x88);
        x[8 + c] = _mm512_shuffle_f32x4(even, even_high, 0xdd);
        x[4 + c] = _mm512_shuffle_f32x4(odd, odd_high, 0x88);
        x[12 + c] = _mm512_shuffle_f32x4(odd, odd_high, 0xdd);
    }
}

}  // namespace
}  // namespace kernels
