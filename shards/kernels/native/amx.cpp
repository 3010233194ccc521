// Products of bfloat16 by AMX tiles: 16 weight rows x 32 of K, straight from the row-major weights, times 32 of K x 16
// rows of x, which are packed in pairs of K. A sum walks K in steps of 32 whatever is beside it in the tile.
#include "matmul.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"
#define ENTRY __attribute__((target(TARGET)))
#define FN inline __attribute__((always_inline, target(TARGET)))

#include "amx_sums.h"

namespace kernels {
namespace {

// Weight rows that are staged side by side, and up to how many rows of x whole tiles are read in place instead.
constexpr int SIDE_BY_SIDE = 8;
constexpr int IN_PLACE_ROWS = 32;

int64_t steps_of(int64_t K, int groups) { return blocks_of(K / groups, STEP); }

int64_t packed_width(int64_t K, int groups) { return groups * steps_of(K, groups) * STEP; }

// Tiles 0-3 are sums, 4-5 weights, 6-7 x.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

TileConfig narrow_config() {
    TileConfig config;
    config.row_bytes[0] = config.row_bytes[1] = config.row_bytes[6] = 4 * NARROW;
    return config;
}

ENTRY void configure(bool narrow) {
    static const TileConfig wide_tiles, narrow_tiles = narrow_config();
    _tile_loadconfig(narrow ? &narrow_tiles : &wide_tiles);
}

ENTRY void leave() { _tile_release(); }

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

// The weight rows of one or two tiles.
struct Weights {
    const bf16* rows[2];
    int counts[2];
    int64_t K;
};

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

// Up to 16 weight rows -> tiles [group][step][16 rows][32 of K], zeros behind their ends. It pays where many rows of x
// follow: tiles read in place collide in the first-level cache, whose sets the rows of most models share.
FN void stage_rows(const bf16* w, int count, int64_t K, int groups, bf16* to) {
    int64_t width = K / groups;
    for (int first = 0; first < BLOCK; first += SIDE_BY_SIDE) {
        bf16* at = to + first * STEP;
        for (int g = 0; g < groups; g++) {
            const bf16* from = w + first * K + g * width;
            for (int64_t k = 0; k < width; k += STEP, at += TILE) {
                __mmask32 here = mask_of(width - k < STEP ? int(width - k) : STEP);
                for (int r = 0; r < SIDE_BY_SIDE; r++) {
                    __mmask32 mask = first + r < count ? here : 0;
                    _mm512_store_si512(at + r * STEP, _mm512_maskz_loadu_epi16(mask, from + r * K + k));
                }
            }
        }
    }
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

// Floats from the sums of one group of K to those of the next, and how many groups wait for their sum.
constexpr int LEAF = 4 * SUMS;
constexpr int LEAVES = 8;

// (p0 + p1) + (p2 + p3) of one row of sums over N groups of K.
template <int N>
FN __m512 tree(const float* at) {
    if constexpr (N == 1)
        return _mm512_load_ps(at);
    else
        return _mm512_add_ps(tree<N / 2>(at), tree<N / 2>(at + N / 2 * LEAF));
}

template <int N>
FN void sum_leaves(float* sums, int first, int end) {
    for (int i = first; i < end; i += BLOCK) _mm512_store_ps(sums + i, tree<N>(sums + i));
}

// Sums of finished blocks, whose results are made piece by piece between the steps of the next product: the vector
// units have nothing else to do there.
template <int A, class Use>
struct Waiting {
    static constexpr int REDUCTIONS = 4;  // pieces in which the groups of a block are added
    struct Block {
        float* sums;
        int leaves, row, rows;
    };
    const Use& use;
    Block blocks[2] = {};
    int count = 0, block = 0, piece = 0;

    FN void add(float* sums, int leaves, int row, int rows) {
        blocks[count++] = {sums, leaves, row, rows};
        if (count == 1) piece = leaves > 1 ? -REDUCTIONS : 0;
    }
    FN void some() {
        if (block >= count) return;
        const Block& b = blocks[block];
        if (piece < 0) return reduce(b, piece++ + REDUCTIONS);
        use(b.sums, b.row, b.rows, piece);
        if (++piece < Use::PIECES) return;
        block++;
        piece = block < count && blocks[block].leaves > 1 ? -REDUCTIONS : 0;
    }
    FN void all() {
        while (block < count) some();
        count = block = 0;
    }
    FN void reduce(const Block& b, int share) {
        constexpr int SIZE = A * SUMS / REDUCTIONS;
        if (b.leaves == 2)
            sum_leaves<2>(b.sums, share * SIZE, (share + 1) * SIZE);
        else if (b.leaves == 4)
            sum_leaves<4>(b.sums, share * SIZE, (share + 1) * SIZE);
        else
            sum_leaves<8>(b.sums, share * SIZE, (share + 1) * SIZE);
    }
};

// Sums of one group of K -> sums [B][A][weight row][row of x].
template <int A, int B, class Use>
FN void part(const Source& weights, const Panel& panel, int group, int64_t steps, Ahead& ahead,
             Waiting<A, Use>& waiting, float* sums) {
    const bf16 *w = weights.at + group * weights.group, *x = panel.at + group * steps * panel.tile;
    int row_bytes = panel.tile / BLOCK * 2;
    _tile_zero(0);
    if constexpr (A == 2) _tile_zero(1);
    if constexpr (B == 2) _tile_zero(2);
    if constexpr (A == 2 && B == 2) _tile_zero(3);
    for (int64_t s = 0; s < steps; s++, w += weights.step, x += panel.tile) {
        if (ahead.lines > 0) fetch(ahead, weights.pace);
        _tile_loadd(6, x, row_bytes);
        _tile_loadd(4, w, weights.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (A == 2) {
            _tile_loadd(5, w + weights.second, weights.row_bytes);
            _tile_dpbf16ps(1, 5, 6);
        }
        if constexpr (B == 2) {
            _tile_loadd(7, x + panel.block, LINE);
            _tile_dpbf16ps(2, 4, 7);
            if constexpr (A == 2) _tile_dpbf16ps(3, 5, 7);
        }
        waiting.some();
    }
    _tile_stored(0, sums, LINE);
    if constexpr (A == 2) _tile_stored(1, sums + SUMS, LINE);
    if constexpr (B == 2) _tile_stored(2, sums + A * SUMS, LINE);
    if constexpr (A == 2 && B == 2) _tile_stored(3, sums + 3 * SUMS, LINE);
}

// Sums of all groups of K -> sums, as `leaves` that are still to be added; returns how many. More than LEAVES are added
// here, as a binary counter carries: (p0 + p1) + (p2 + p3), whatever their number.
template <int A, int B, class Use>
FN int tiles(const Source& weights, const Panel& panel, int64_t steps, int groups, Ahead& ahead, Waiting<A, Use>& waiting,
             float* sums) {
    constexpr int LEVELS = 16, SIZE = A * B * SUMS;
    if (groups <= LEAVES) {
        for (int g = 0; g < groups; g++) part<A, B>(weights, panel, g, steps, ahead, waiting, sums + g * LEAF);
        return groups;
    }
    alignas(64) float levels[LEVELS][SIZE];
    for (int g = 0; g < groups; g++) {
        part<A, B>(weights, panel, g, steps, ahead, waiting, sums);
        int level = 0;
        for (int carry = g; carry & 1; carry >>= 1, level++)
            for (int i = 0; i < SIZE; i++) sums[i] = levels[level][i] + sums[i];
        if (g + 1 < groups)
            for (int i = 0; i < SIZE; i++) levels[level][i] = sums[i];
    }
    return 1;
}

template <int A>
FN Source source_of(const Weights& w, int rows, int groups, const Ahead& ahead) {
    int64_t width = w.K / groups, steps = steps_of(w.K, groups), size = groups * steps * TILE;
    int pace = int(blocks_of(ahead.lines, blocks_of(rows, 2 * BLOCK) * groups * steps));
    bool whole = w.counts[0] == BLOCK && w.counts[1] == BLOCK && width % STEP == 0;
    if (whole && rows <= IN_PLACE_ROWS) return {w.rows[0], w.rows[1] - w.rows[0], width, STEP, w.K * 2, pace};
    bf16* to = (bf16*)staging(size_t(A * size) * sizeof(bf16));
    for (int a = 0; a < A; a++) stage_rows(w.rows[a], w.counts[a], w.K, groups, to + a * size);
    return {to, size, steps * TILE, TILE, LINE, pace};
}

// Calls use(sums, first row, rows, piece) for every block of x rows and every piece of it.
template <int A, class Use>
FN void over_blocks(const Weights& w, const bf16* panel, int rows, int groups, Ahead ahead, const Use& use) {
    alignas(64) float both[2][LEAVES * LEAF];
    int64_t block = BLOCK * packed_width(w.K, groups), steps = steps_of(w.K, groups);
    Source source = source_of<A>(w, rows, groups, ahead);
    Waiting<A, Use> waiting{use};
    bool narrow = rows <= NARROW;
    configure(narrow);
    int turn = 0;
    for (int r = 0; r < rows; r += 2 * BLOCK, panel += 2 * block, turn ^= 1) {
        float* sums = both[turn];
        int left = rows - r, first = left < BLOCK ? left : BLOCK, second = left - BLOCK < BLOCK ? left - BLOCK : BLOCK;
        if (second > NARROW) {
            int leaves = tiles<A, 2>(source, {panel, block, TILE}, steps, groups, ahead, waiting, sums);
            waiting.all();
            waiting.add(sums, leaves, r, first);
            waiting.add(sums + A * SUMS, leaves, r + BLOCK, second);
            continue;
        }
        if (!narrow && first <= NARROW) configure(narrow = true);
        int leaves = tiles<A, 1>(source, {panel, block, tile_size(first)}, steps, groups, ahead, waiting, sums);
        waiting.all();
        waiting.add(sums, leaves, r, first);
        if (second <= 0) continue;
        configure(narrow = true);
        float* beside = sums + A * SUMS;
        tiles<A, 1>(source, {panel + block, block, tile_size(second)}, steps, groups, ahead, waiting, beside);
        waiting.all();
        waiting.add(beside, leaves, r + BLOCK, second);
    }
    waiting.all();
}

// Sums as they are.
template <int A>
struct Plain {
    static constexpr int PIECES = 1;
    float* to;
    FN void operator()(const float* sums, int r, int here, int) const {
        for (int a = 0; a < A; a++) turn(sums + a * SUMS, here, to + r * COLUMNS + a * BLOCK);
    }
};

// Rounded sums of two tiles of weights.
struct Rounded {
    static constexpr int PIECES = 1;
    bf16* const* out;
    FN void operator()(const float* sums, int r, int here, int) const { turn_rounded(sums, here, out + r); }
};

// Activated sums of a tile of gates and one of ups.
struct Activated {
    static constexpr int PIECES = 4;
    bf16* inner;
    int64_t row, width;
    int columns;
    int64_t at;
    FN void operator()(const float* sums, int r, int here, int piece) const {
        constexpr int SHARE = BLOCK / PIECES;
        int first = piece * SHARE, end = first + SHARE < columns ? first + SHARE : columns;
        put_inner(sums, first, end, Inner{inner + r * row, width, tile_size(here)}, at);
    }
};

ENTRY void multiply(const bf16* panel, int rows, const bf16* w, int columns, int64_t K, int groups, Ahead ahead,
                    float* sums) {
    if (columns > BLOCK)
        over_blocks<2>({{w, w + BLOCK * K}, {BLOCK, columns - BLOCK}, K}, panel, rows, groups, ahead, Plain<2>{sums});
    else
        over_blocks<1>({{w, w}, {columns, columns}, K}, panel, rows, groups, ahead, Plain<1>{sums});
}

ENTRY void round_to(const bf16* panel, int rows, const bf16* w, int columns, int64_t K, int groups, Ahead ahead,
                    bf16* const* out) {
    if (columns == 2 * BLOCK) {
        over_blocks<2>({{w, w + BLOCK * K}, {BLOCK, BLOCK}, K}, panel, rows, groups, ahead, Rounded{out});
        return;
    }
    alignas(64) float sums[CALL_ROWS * COLUMNS];
    multiply(panel, rows, w, columns, K, groups, ahead, sums);
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < columns; n++) store(out[r] + n, sums[r * COLUMNS + n]);
}

ENTRY void gate_up(const bf16* panel, int rows, const bf16* gate, const bf16* up, int columns, int64_t K, Ahead ahead,
                   bf16* inner, int64_t I, int64_t at, int groups) {
    Activated use{inner, packed_width(I, groups), I / groups, columns, at};
    over_blocks<2>({{gate, up}, {columns, columns}, K}, panel, rows, 1, ahead, use);
}

// Whether processor and kernel let this process use tiles; asks the kernel for their state.
bool tiles_allowed() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

const Matmul<bf16>* amx_matmul() {
    static const Matmul<bf16> matmul = {2 * BLOCK, packed_width, pack, multiply, round_to, gate_up, leave};
    static const bool allowed = tiles_allowed();
    return allowed ? &matmul : nullptr;
}

}  // namespace kernels
#else
const kernels::Matmul<kernels::bf16>* kernels::amx_matmul() { return nullptr; }
#endif

const kernels::Path* kernels::amx_path() {
    if (avx512bf16_path() == nullptr || amx_matmul() == nullptr) return nullptr;
    static const Path path = [] {
        Path same = *avx512bf16_path();
        same.matmul_bf16 = amx_matmul();
        same.attend_range_bf16 = amx_attend_range();
        return same;
    }();
    return &path;
}
