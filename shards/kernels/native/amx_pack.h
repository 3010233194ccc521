// How rows of x and of weights are laid out for AMX tiles. Included by amx.cpp after its targets.
#pragma once

#include <immintrin.h>

#include "amx_sums.h"

namespace kernels {
namespace {

constexpr int SIDE_BY_SIDE = 8;  // weight rows that are staged side by side

int64_t steps_of(int64_t K, int groups) { return blocks_of(K / groups, STEP); }

int64_t packed_width(int64_t K, int groups) { return groups * steps_of(K, groups) * STEP; }

FN __mmask32 mask_of(int count) { return count < STEP ? (__mmask32(1) << count) - 1 : ~__mmask32(0); }

// Those of K in `here` of up to NARROW rows -> a tile [pairs of K][NARROW rows of x][2].
FN void pack_narrow(Rows<bf16> x, int rows, int64_t k, __mmask32 here, bf16* to) {
    alignas(64) uint32_t pairs[BLOCK], tile[BLOCK * NARROW] = {};
    for (int r = 0; r < rows; r++) {
        _mm512_store_si512(pairs, _mm512_maskz_loadu_epi16(here, x[r] + k));
        for (int p = 0; p < BLOCK; p++) tile[p * NARROW + r] = pairs[p];
    }
    memcpy(to, tile, sizeof tile);
}

// Those of K in `here` of up to 16 rows -> a tile [pairs of K][16 rows of x][2].
FN void pack_tile(Rows<bf16> x, int rows, int64_t k, __mmask32 here, bf16* to) {
    __m512i row[BLOCK];
    for (int r = 0; r < BLOCK; r++)
        row[r] = r < rows ? _mm512_maskz_loadu_epi16(here, x[r] + k) : _mm512_setzero_si512();
    transpose(row);
    for (int p = 0; p < BLOCK; p++) _mm512_store_si512(to + p * STEP, row[p]);
}

ENTRY void pack(Rows<bf16> x, int rows, int64_t K, int groups, bf16* to) {
    int64_t width = K / groups;
    for (int g = 0; g < groups; g++) {
        for (int64_t k = 0; k < width; k += STEP, to += tile_size(rows)) {
            __mmask32 here = mask_of(width - k < STEP ? int(width - k) : STEP);
            if (rows <= NARROW)
                pack_narrow(x, rows, g * width + k, here, to);
            else
                pack_tile(x, rows, g * width + k, here, to);
        }
    }
}

// Up to 16 weight rows -> tiles [group][step][16 rows][32 of K], zeros behind their ends. It pays where many rows of x
// follow: tiles read in place collide in the first-level cache, whose sets the rows of most models share.
FN void stage_rows(const bf16* w, int count, int64_t K, int groups, bf16* to) {
    int64_t width = K / groups, whole = width / STEP * STEP;
    for (int first = 0; first < BLOCK; first += SIDE_BY_SIDE) {
        bf16* at = to + first * STEP;
        for (int g = 0; g < groups; g++) {
            const bf16* from = w + first * K + g * width;
            int64_t k = 0;
            for (; k < whole && first + SIDE_BY_SIDE <= count; k += STEP, at += TILE)
                for (int r = 0; r < SIDE_BY_SIDE; r++)
                    _mm512_store_si512(at + r * STEP, _mm512_loadu_si512(from + r * K + k));
            for (; k < width; k += STEP, at += TILE) {
                __mmask32 here = mask_of(width - k < STEP ? int(width - k) : STEP);
                for (int r = 0; r < SIDE_BY_SIDE; r++) {
                    __mmask32 mask = first + r < count ? here : 0;
                    _mm512_store_si512(at + r * STEP, _mm512_maskz_loadu_epi16(mask, from + r * K + k));
                }
            }
        }
    }
}

}  // namespace
}  // namespace kernels
