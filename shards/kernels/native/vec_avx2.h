// Vectors of 16 floats in two AVX2 registers. The including file defines FN with its target attribute.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace kernels {
namespace {

struct vec {
    __m256 low, high;
};

// Rows of x that a tile of products takes: with two strips of weights 12 of the 16 registers accumulate.
constexpr int TILE_ROWS = 3;
// Attention's tiles: rows, and vectors of keys or columns.
constexpr int ATTEND_ROWS = 3, ATTEND_VECS = 2;

FN vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FN vec fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FN vec plus(vec a, vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
FN vec multiply(vec a, vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
FN vec subtract(vec a, vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
FN vec fused(vec a, vec b, vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
FN vec read(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FN __m256 widen(const bf16* p) {
    __m128i halves = _mm_loadu_si128((const __m128i*)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
FN vec read(const bf16* p) { return {widen(p), widen(p + 8)}; }
template <class T>
FN vec read(const T* p, int n) {
    T padded[LANES] = {};
    for (int i = 0; i < n; i++) padded[i] = p[i];
    return read(padded);
}
// The firsts and the seconds of 16 pairs.
FN void read_pairs(const bf16* p, vec& first, vec& second) {
    __m256i low = _mm256_loadu_si256((const __m256i*)p), high = _mm256_loadu_si256((const __m256i*)(p + LANES));
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
}
FN void read_pairs(const bf16* p, int n, vec& first, vec& second) {
    bf16 padded[2 * LANES] = {};
    for (int i = 0; i < 2 * n; i++) padded[i] = p[i];
    read_pairs(padded, first, second);
}
FN vec read_halves(const uint16_t* p) {
    float x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = load_half(p[i]);
    return read(x);
}
// A unit of integers (ints.h): the firsts and the seconds of each pair of columns, pair by pair.
template <int BITS>
struct Ints;
template <>
struct Ints<4> {
    __m256i low, high;
    FN explicit Ints(const char* unit)
        : low(_mm256_loadu_si256((const __m256i*)unit)), high(_mm256_loadu_si256((const __m256i*)(unit + 32))) {}
    static FN __m256 numbers(__m256i words) {
        __m256i nibbles = _mm256_and_si256(words, _mm256_set1_epi32(15));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
    }
    FN void next(vec& first, vec& second) {
        first = {numbers(low), numbers(high)};
        second = {numbers(_mm256_srli_epi32(low, 16)), numbers(_mm256_srli_epi32(high, 16))};
        low = _mm256_srli_epi32(low, 4);
        high = _mm256_srli_epi32(high, 4);
    }
};
template <>
struct Ints<8> {
    const char* at;
    FN explicit Ints(const char* unit) : at(unit) {}
    static FN __m256 firsts(__m256i words) {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16));
    }
    static FN __m256 seconds(__m256i words) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16)); }
    FN void next(vec& first, vec& second) {
        __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
        __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(at + LANES)));
        first = {firsts(low), firsts(high)};
        second = {seconds(low), seconds(high)};
        at += 2 * LANES;
    }
};
FN void write(float* p, vec x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
FN void write(float* p, vec x, int n) {
    float padded[LANES];
    write(padded, x);
    for (int i = 0; i < n; i++) p[i] = padded[i];
}
// As `store` of one number: to nearest, ties to even, NaN stays NaN.
FN __m128i narrow(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i kept = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
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
    _mm_storeu_si128((__m128i*)p, narrow(x.low));
    _mm_storeu_si128((__m128i*)(p + 8), narrow(x.high));
    return read(p);
}
FN vec put(bf16* p, vec x, int n) {
    bf16 padded[LANES];
    vec kept = put(padded, x);
    for (int i = 0; i < n; i++) p[i] = padded[i];
    return kept;
}

// x[i] lane j becomes x[j] lane i.
FN void transpose(vec* x) {
    float lane[LANES][LANES], turned[LANES][LANES];
    for (int i = 0; i < LANES; i++) write(lane[i], x[i]);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) turned[i][j] = lane[j][i];
    for (int i = 0; i < LANES; i++) x[i] = read(turned[i]);
}

}  // namespace
}  // namespace kernels
