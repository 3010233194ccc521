// The walk of AMX tiles along K: sums of one or two blocks of x with one or two tiles of weights.
// Included by amx.cpp after its targets.
#pragma once

#include <initializer_list>

#include "amx_pack.h"

namespace kernels {
namespace {

// Tiles 0-3 are sums, 4-5 weights, 6-7 x.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

TileConfig narrow_config() {
    TileConfig config;
    for (int tile : {0, 1, 2, 3, 6, 7}) config.row_bytes[tile] = 4 * NARROW;
    return config;
}

ENTRY void configure(bool narrow) {
    static const TileConfig wide_tiles, narrow_tiles = narrow_config();
    _tile_loadconfig(narrow ? &narrow_tiles : &wide_tiles);
}

// Some lines of each stream.
FN void fetch(Ahead& ahead, int lines) {
    for (int i = 0; i < lines; i++, ahead.at += LINE) {
        _mm_prefetch(ahead.at, _MM_HINT_T1);
        _mm_prefetch(ahead.at + ahead.half, _MM_HINT_T1);
        _mm_prefetch(ahead.at + ahead.second, _MM_HINT_T1);
        _mm_prefetch(ahead.at + ahead.second + ahead.half, _MM_HINT_T1);
    }
    ahead.lines -= lines;
}

// Packed x: one or two blocks, `block` apart, of tiles of `tile` bfloat16.
struct Panel {
    const bf16* at;
    int64_t block;
    int tile;
};

// Where tiles of weights are read: one or two tiles' rows, `second` apart, in place or staged.
struct Source {
    const bf16* at;
    int64_t second, group, step;  // bfloat16 to the second tile, the next group of K, the next step
    int64_t row_bytes;
    int pace;  // lines of each stream that are fetched ahead a step
};

// Floats from the sums of one group of K to those of the next, and up to how many groups are added at once.
constexpr int LEAF = 2 * SUMS;
constexpr int LEAVES = 8;

// (p0 + p1) + (p2 + p3) of one row of sums over N groups of K.
template <int N>
FN __m512 tree(const float* at) {
    if constexpr (N == 1)
        return _mm512_load_ps(at);
    else
        return _mm512_add_ps(tree<N / 2>(at), tree<N / 2>(at + N / 2 * LEAF));
}

// Adds 2, 4 or 8 groups.
template <int A>
FN void sum_leaves(const float* leaves, int groups, float* sums) {
    for (int i = 0; i < A * SUMS; i += BLOCK) {
        if (groups == 2)
            _mm512_store_ps(sums + i, tree<2>(leaves + i));
        else if (groups == 4)
            _mm512_store_ps(sums + i, tree<4>(leaves + i));
        else
            _mm512_store_ps(sums + i, tree<8>(leaves + i));
    }
}

// Sums of finished blocks, whose results are made piece by piece between the steps of the next product: the vector
// units have nothing else to do there.
template <class Use>
struct Waiting {
    struct Block {
        const float* sums;
        int row, rows;
    };
    const Use& use;
    Block blocks[2] = {};
    int count = 0, piece = 0;

    FN void add(const float* sums, int row, int rows) { blocks[count++] = {sums, row, rows}; }
    FN void some() {
        int block = piece / Use::PIECES;
        if (block >= count) return;
        use(blocks[block].sums, blocks[block].row, blocks[block].rows, piece % Use::PIECES);
        piece++;
    }
    FN void all() {
        while (piece < count * Use::PIECES) some();
        count = piece = 0;
    }
};

// Sums over the whole of K of two blocks of x -> sums [2][A][weight row][row of x].
template <int A, class Use>
FN void two_blocks(const Source& weights, const Panel& panel, int64_t steps, Ahead& ahead, Waiting<Use>& waiting,
                   float* sums) {
    const bf16 *w = weights.at, *x = panel.at;
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (A == 2) _tile_zero(1);
    if constexpr (A == 2) _tile_zero(3);
    for (int64_t s = 0; s < steps; s++, w += weights.step, x += TILE) {
        if (ahead.lines > 0) fetch(ahead, weights.pace);
        _tile_loadd(6, x, LINE);
        _tile_loadd(4, w, weights.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (A == 2) {
            _tile_loadd(5, w + weights.second, weights.row_bytes);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_loadd(7, x + panel.block, LINE);
        _tile_dpbf16ps(2, 4, 7);
        if constexpr (A == 2) _tile_dpbf16ps(3, 5, 7);
        waiting.some();
    }
    _tile_stored(0, sums, LINE);
    if constexpr (A == 2) _tile_stored(1, sums + SUMS, LINE);
    _tile_stored(2, sums + A * SUMS, LINE);
    if constexpr (A == 2) _tile_stored(3, sums + 3 * SUMS, LINE);
}

// Sums over one group of K of one block of x -> sums [A][weight row][row of x]. Neighbouring groups take the tiles of
// either SET: one's sums are stored while the next one's come to be.
template <int A, int SET, class Use>
FN void one_group(const Source& weights, const Panel& panel, int group, int64_t steps, Ahead& ahead,
                  Waiting<Use>& waiting, float* sums) {
    const bf16 *w = weights.at + group * weights.group, *x = panel.at + group * steps * panel.tile;
    int row_bytes = panel.tile / BLOCK * 2;
    if constexpr (SET == 0) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++, w += weights.step, x += panel.tile) {
        if (ahead.lines > 0) fetch(ahead, weights.pace);
        _tile_loadd(4, w, weights.row_bytes);
        if constexpr (A == 2) _tile_loadd(5, w + weights.second, weights.row_bytes);
        if constexpr (SET == 0) {
            _tile_loadd(6, x, row_bytes);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (A == 2) _tile_dpbf16ps(1, 5, 6);
        } else {
            _tile_loadd(7, x, row_bytes);
            _tile_dpbf16ps(2, 4, 7);
            if constexpr (A == 2) _tile_dpbf16ps(3, 5, 7);
        }
        waiting.some();
    }
    if constexpr (SET == 0) {
        _tile_stored(0, sums, LINE);
        if constexpr (A == 2) _tile_stored(1, sums + SUMS, LINE);
    } else {
        _tile_stored(2, sums, LINE);
        if constexpr (A == 2) _tile_stored(3, sums + SUMS, LINE);
    }
}

// Sums over each of up to LEAVES groups of K of one block of x, LEAF apart.
template <int A, class Use>
FN void all_groups(const Source& weights, const Panel& panel, int64_t steps, int groups, Ahead& ahead,
                   Waiting<Use>& waiting, float* leaves) {
    one_group<A, 0>(weights, panel, 0, steps, ahead, waiting, leaves);
    for (int g = 1; g < groups; g += 2) {
        one_group<A, 1>(weights, panel, g, steps, ahead, waiting, leaves + g * LEAF);
        if (g + 1 < groups) one_group<A, 0>(weights, panel, g + 1, steps, ahead, waiting, leaves + (g + 1) * LEAF);
    }
}

// Sums over all groups of K of one block of x. Up to LEAVES groups are added as a tree; more, as a binary counter carries,
// which gives the same tree: (p0 + p1) + (p2 + p3), whatever their number.
template <int A, class Use>
FN void one_block(const Source& weights, const Panel& panel, int64_t steps, int groups, Ahead& ahead,
                  Waiting<Use>& waiting, float* sums) {
    constexpr int LEVELS = 16, SIZE = A * SUMS;
    if (groups <= LEAVES) {
        alignas(64) float leaves[LEAVES * LEAF];
        all_groups<A>(weights, panel, steps, groups, ahead, waiting, groups == 1 ? sums : leaves);
        if (groups > 1) sum_leaves<A>(leaves, groups, sums);
        return;
    }
    alignas(64) float levels[LEVELS][SIZE];
    for (int g = 0; g < groups; g++) {
        one_group<A, 0>(weights, panel, g, steps, ahead, waiting, sums);
        int level = 0;
        for (int carry = g; carry & 1; carry >>= 1, level++)
            for (int i = 0; i < SIZE; i++) sums[i] = levels[level][i] + sums[i];
        if (g + 1 < groups)
            for (int i = 0; i < SIZE; i++) levels[level][i] = sums[i];
    }
}

}  // namespace
}  // namespace kernels
