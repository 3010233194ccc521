// What becomes of the sums of AMX tiles: turned into rows, rounded, or activated into the panel of the next product.
// Included by amx.cpp after its targets.
#pragma once

#include <immintrin.h>

#include "matmul.h"

namespace kernels {
namespace {

constexpr int STEP = 32;             // of K, a tile
constexpr int TILE = BLOCK * STEP;   // bfloat16 of a tile
constexpr int SUMS = BLOCK * BLOCK;  // floats of a tile of sums
constexpr int LINE = 64;             // bytes
// A block of up to so many rows of x is packed in tiles of so many columns: in decode most experts have few rows, and
// x then stays in the first-level cache beside the weights.
constexpr int NARROW = 4;

// bfloat16 of a tile of x in a block of `rows`.
int tile_size(int rows) { return rows <= NARROW ? BLOCK * NARROW * 2 : TILE; }

// Rows become columns.
FN void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), odd = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// sums [weight row][row of x] -> to[r * COLUMNS + n].
FN void turn(const float* sums, int rows, float* to) {
    if (rows <= 2) {
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < BLOCK; n++) to[r * COLUMNS + n] = sums[n * BLOCK + r];
        return;
    }
    __m512i row[BLOCK];
    for (int n = 0; n < BLOCK; n++) row[n] = _mm512_load_si512(sums + n * BLOCK);
    transpose(row);
    for (int r = 0; r < rows; r++) _mm512_storeu_si512(to + r * COLUMNS, row[r]);
}

// Two rows of floats, rounded and interleaved: the pairs (even[i], odd[i]).
FN __m512i round_pairs(__m512 even, __m512 odd) {
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                            5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// sums of two tiles [weight row][row of x] -> to[r][n], rounded.
FN void turn_rounded(const float* sums, int rows, bf16* const* to) {
    if (rows <= NARROW) {
        __m512i places = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
        for (int r = 0; r < rows; r++) {
            __m512 first = _mm512_i32gather_ps(places, sums + r, sizeof(float));
            __m512 second = _mm512_i32gather_ps(places, sums + SUMS + r, sizeof(float));
            _mm512_storeu_si512(to[r], (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
        return;
    }
    __m512i pairs[BLOCK];
    for (int p = 0; p < BLOCK; p++)
        pairs[p] = round_pairs(_mm512_load_ps(sums + 2 * p * BLOCK), _mm512_load_ps(sums + (2 * p + 1) * BLOCK));
    transpose(pairs);
    for (int r = 0; r < rows; r++) _mm512_storeu_si512(to[r], pairs[r]);
}

// A block of rows of a panel of I, which is cut into groups of `width`.
struct Inner {
    bf16* block;
    int64_t width;
    int tile;

    // Row pair of column n.
    FN bf16* pair(int64_t n) const {
        int64_t in_group = n % width, steps = (width + STEP - 1) / STEP;
        return block + (n / width * steps + in_group / STEP) * tile + in_group % STEP / 2 * (tile / BLOCK);
    }
};

FN __m512 rounded(__m512 x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
}

// silu(gate) * up of one column for 16 rows of x, to be rounded. Nothing but bfloat16 is made of it, so e^-gate is 2^n
// times a polynomial (Cephes' expf coefficients), and a reciprocal with one step of Newton stands for the division.
FN __m512 activate(const float* gates, const float* ups) {
    __m512 gate = rounded(_mm512_loadu_ps(gates)), up = rounded(_mm512_loadu_ps(ups));
    __m512 x = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), gate), _mm512_set1_ps(87.0f));
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147181f), x);
    __m512 p = _mm512_set1_ps(1.3981999507e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    __m512 below = _mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1.0f));
    __m512 inverse = _mm512_rcp14_ps(below);
    inverse = _mm512_fmadd_ps(_mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(1.0f)), inverse, inverse);
    return _mm512_mul_ps(rounded(_mm512_mul_ps(gate, inverse)), up);
}

// Four columns of up to NARROW rows at once, which begin a row pair of their own.
FN void put_four(const float* sums, bf16* pair) {
    alignas(64) float gate[BLOCK], up[BLOCK];
    for (int n = 0; n < 4; n++) {
        _mm_store_ps(gate + n * NARROW, _mm_load_ps(sums + n * BLOCK));
        _mm_store_ps(up + n * NARROW, _mm_load_ps(sums + SUMS + n * BLOCK));
    }
    const __m256i places = _mm256_set_epi16(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    __m256i done = (__m256i)_mm512_cvtneps_pbh(activate(gate, up));
    _mm256_storeu_si256((__m256i*)pair, _mm256_permutexvar_epi16(places, done));
}

// sums of gates, then of their ups; [first, end) of them -> columns [at + first, at + end) of `inner`.
FN void put_inner(const float* sums, int first, int end, const Inner& inner, int64_t at) {
    bool narrow = inner.tile == tile_size(NARROW);
    for (int n = first; n < end; n++) {
        bf16* pair = inner.pair(at + n);
        int64_t in_group = (at + n) % inner.width, odd = in_group % 2;
        if (narrow && in_group % 4 == 0 && n + 4 <= end && in_group + 4 <= inner.width) {
            put_four(sums + n * BLOCK, pair);
            n += 3;
            continue;
        }
        __m512 one = activate(sums + n * BLOCK, sums + SUMS + n * BLOCK);
        alignas(64) bf16 pairs[2 * BLOCK];
        if (!odd && n + 1 < end && in_group + 1 < inner.width) {
            n++;
            _mm512_store_si512(pairs, round_pairs(one, activate(sums + n * BLOCK, sums + SUMS + n * BLOCK)));
            memcpy(pair, pairs, size_t(inner.tile / BLOCK) * sizeof(bf16));
        } else {
            _mm512_store_si512(pairs, round_pairs(one, one));
            for (int r = 0; r < inner.tile / BLOCK / 2; r++) pair[2 * r + odd] = pairs[2 * r];
        }
    }
}

}  // namespace
}  // namespace kernels
