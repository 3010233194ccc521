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

// Sixteen floats, each rounded as `store` does, in the lower halves.
FN __m512i round_lanes(__m512i bits) {
    __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    __mmask16 nan = _mm512_cmp_ps_mask((__m512)bits, (__m512)bits, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
}

// sums of two tiles [weight row][row of x] -> to[r][n], rounded.
FN void turn_rounded(const float* sums, int rows, bf16* const* to) {
    if (rows <= NARROW) {
        __m512i places = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
        for (int r = 0; r < rows; r++)
            for (int a = 0; a < 2; a++) {
                __m512i bits = _mm512_i32gather_epi32(places, sums + a * SUMS + r, sizeof(float));
                _mm256_storeu_si256((__m256i*)(to[r] + a * BLOCK), _mm512_cvtepi32_epi16(round_lanes(bits)));
            }
        return;
    }
    __m512i pairs[BLOCK];
    for (int p = 0; p < BLOCK; p++) {
        __m512i even = _mm512_load_si512(sums + 2 * p * BLOCK), odd = _mm512_load_si512(sums + (2 * p + 1) * BLOCK);
        pairs[p] = _mm512_or_si512(round_lanes(even), _mm512_slli_epi32(round_lanes(odd), 16));
    }
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

// silu(gate) * up of one column for 16 rows of x.
FN void activate(const float* gate, const float* up, uint32_t* to) {
    for (int r = 0; r < BLOCK; r++) {
        bf16 product;
        store(&product, rounded<bf16>(silu(rounded<bf16>(gate[r]))) * rounded<bf16>(up[r]));
        to[r] = product;
    }
}

// Four columns of up to NARROW rows at once, which begin a row pair of their own.
FN void put_four(const float* sums, bf16* pair) {
    alignas(64) float gate[BLOCK], up[BLOCK];
    alignas(64) uint32_t done[BLOCK], pairs[2 * NARROW];
    __m512i four[2];
    for (int i = 0; i < 2; i++) {
        const float* from = sums + i * SUMS;
        __m256 low = _mm256_set_m128(_mm_load_ps(from + BLOCK), _mm_load_ps(from));
        __m256 high = _mm256_set_m128(_mm_load_ps(from + 3 * BLOCK), _mm_load_ps(from + 2 * BLOCK));
        four[i] = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
    }
    _mm512_store_si512(gate, four[0]);
    _mm512_store_si512(up, four[1]);
    activate(gate, up, done);
    for (int i = 0; i < 2 * NARROW; i++) {
        const uint32_t* one = done + i / NARROW * 2 * NARROW + i % NARROW;
        pairs[i] = one[0] | one[NARROW] << 16;
    }
    memcpy(pair, pairs, sizeof pairs);
}

// sums of `columns` gates, then of their ups -> columns [at, at + columns) of `inner`.
FN void put_inner(const float* sums, int columns, const Inner& inner, int64_t at) {
    for (int n = 0; n < columns; n++) {
        uint32_t one[BLOCK], two[BLOCK];
        bf16* pair = inner.pair(at + n);
        int64_t in_group = (at + n) % inner.width, odd = in_group % 2;
        bool narrow = inner.tile == tile_size(NARROW);
        if (narrow && in_group % 4 == 0 && n + 4 <= columns && in_group + 4 <= inner.width) {
            put_four(sums + n * BLOCK, pair);
            n += 3;
            continue;
        }
        activate(sums + n * BLOCK, sums + SUMS + n * BLOCK, one);
        bool both = !odd && n + 1 < columns && in_group + 1 < inner.width;
        if (both) {
            n++;
            activate(sums + n * BLOCK, sums + SUMS + n * BLOCK, two);
            for (int r = 0; r < BLOCK; r++) one[r] |= two[r] << 16;
            memcpy(pair, one, size_t(inner.tile / BLOCK) * sizeof(bf16));
        } else {
            for (int r = 0; r < inner.tile / BLOCK / 2; r++) pair[2 * r + odd] = bf16(one[r]);
        }
    }
}

}  // namespace
}  // namespace kernels
