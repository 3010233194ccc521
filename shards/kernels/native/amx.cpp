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

#include "amx_pack.h"

namespace kernels {
namespace {

// Up to how many rows of x whole tiles of weights are read in place.
constexpr int IN_PLACE_ROWS = 32;

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

ENTRY void leave() { _tile_release(); }

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

template <int A>
FN Source source_of(const Weights& w, int rows, int groups, const Ahead& ahead) {
    int64_t width = w.K / groups, steps = steps_of(w.K, groups), size = groups * steps * TILE;
    int64_t blocks = blocks_of(rows, groups == 1 ? 2 * BLOCK : BLOCK);
    int pace = int(blocks_of(ahead.lines, blocks * groups * steps));
    bool whole = w.counts[0] == BLOCK && w.counts[1] == BLOCK && width % STEP == 0;
    if (whole && rows <= IN_PLACE_ROWS) return {w.rows[0], w.rows[1] - w.rows[0], width, STEP, w.K * 2, pace};
    bf16* to = (bf16*)staging(size_t(A * size) * sizeof(bf16));
    for (int a = 0; a < A; a++) stage_rows(w.rows[a], w.counts[a], w.K, groups, to + a * size);
    return {to, size, steps * TILE, TILE, LINE, pace};
}

// Calls use(sums, first row, rows, piece) for every block of x rows and every piece of it.
template <int A, class Use>
FN void over_blocks(const Weights& w, const bf16* panel, int rows, int groups, Ahead ahead, const Use& use) {
    alignas(64) float both[2][2 * A * SUMS];
    int64_t block = BLOCK * packed_width(w.K, groups), steps = steps_of(w.K, groups);
    Source source = source_of<A>(w, rows, groups, ahead);
    Waiting<Use> waiting{use};
    bool narrow = rows <= NARROW;
    configure(narrow);
    for (int r = 0, turn = 0; r < rows; turn ^= 1) {
        float* sums = both[turn];
        int left = rows - r, here = left < BLOCK ? left : BLOCK;
        if (groups == 1 && left > BLOCK + NARROW) {
            int second = left - BLOCK < BLOCK ? left - BLOCK : BLOCK;
            two_blocks<A>(source, {panel, block, TILE}, steps, ahead, waiting, sums);
            waiting.all();
            waiting.add(sums, r, here);
            waiting.add(sums + A * SUMS, r + BLOCK, second);
            r += BLOCK + second, panel += 2 * block;
            continue;
        }
        if (!narrow && here <= NARROW) configure(narrow = true);
        one_block<A>(source, {panel, block, tile_size(here)}, steps, groups, ahead, waiting, sums);
        waiting.all();
        waiting.add(sums, r, here);
        r += here, panel += block;
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
    static constexpr int PIECES = 8;
    bf16* inner;
    int64_t row, width;
    int columns;
    int64_t at;
    FN void operator()(const float* sums, int r, int here, int piece) const {
        // Few rows are done four columns at a time.
        int pieces = here <= NARROW ? BLOCK / 4 : PIECES, share = BLOCK / pieces;
        int first = piece * share, end = first + share < columns ? first + share : columns;
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

// One block of x against many weight rows, read in place: a strip of two tiles after the other, and what becomes of a
// strip's sums is done between the steps of the next one, so that requests to memory never cease.
template <class Use>
FN void strips(Source source, const Panel& panel, int64_t K, int rows, int count, int groups, Lead lead, const Use& use) {
    alignas(64) float both[2][LEAVES * LEAF];
    int64_t steps = steps_of(K, groups), row_bytes = K * 2;
    Waiting<Use> waiting{use};
    configure(rows <= NARROW);
    int width = Use::STRIP, tail_pace = int(blocks_of(lead.tail.lines, blocks_of(lead.columns, width) * groups * steps));
    for (int n = 0, turn = 0; n < count; n += width, turn ^= 1, source.at += width * K) {
        Ahead own;
        bool inside = n + lead.columns < count;
        if (inside) own = Use::ahead((const char*)(source.at + lead.columns * K), width * row_bytes, source.second * 2);
        source.pace = inside ? int(blocks_of(own.lines, groups * steps)) : tail_pace;
        all_groups<2>(source, panel, steps, groups, inside ? own : lead.tail, waiting, both[turn]);
        waiting.all();
        waiting.add(both[turn], n, rows);
    }
    waiting.all();
}

struct FewActivated {
    static constexpr int PIECES = 4, STRIP = BLOCK;
    Inner inner;
    int64_t at;
    static Ahead ahead(const char* from, int64_t bytes, int64_t second) { return {from, bytes, second}; }
    FN void operator()(const float* sums, int column, int, int piece) const {
        constexpr int SHARE = BLOCK / PIECES;
        put_inner(sums, piece * SHARE, (piece + 1) * SHARE, inner, at + column);
    }
};

struct FewRounded {
    static constexpr int PIECES = 1, STRIP = 2 * BLOCK;
    bf16* const* out;
    int groups;
    static Ahead ahead(const char* from, int64_t bytes, int64_t) { return {from, bytes}; }
    FN void operator()(const float* leaves, int column, int rows, int) const {
        alignas(64) float sums[2 * SUMS];
        bf16* to[BLOCK];
        for (int r = 0; r < rows; r++) to[r] = out[r] + column;
        if (groups > 1) sum_leaves<2>(leaves, groups, sums);
        turn_rounded(groups > 1 ? sums : leaves, rows, to);
    }
};

bool strips_fit(int rows, int columns, int width, int64_t K, int groups) {
    return rows <= BLOCK && columns % width == 0 && K / groups % STEP == 0 && groups <= LEAVES;
}

ENTRY bool few_gate_up(const bf16* panel, int rows, const bf16* gate, const bf16* up, int columns, int64_t K, Lead lead,
                       bf16* inner, int64_t I, int64_t at, int groups) {
    if (!strips_fit(rows, columns, FewActivated::STRIP, K, 1)) return false;
    FewActivated use{{inner, I / groups, tile_size(rows)}, at};
    strips({gate, up - gate, 0, STEP, K * 2, 0}, {panel, 0, tile_size(rows)}, K, rows, columns, 1, lead, use);
    return true;
}

ENTRY bool few_round_to(const bf16* panel, int rows, const bf16* w, int columns, int64_t K, int groups, Lead lead,
                        bf16* const* out) {
    if (!strips_fit(rows, columns, FewRounded::STRIP, K, groups)) return false;
    Source source{w, BLOCK * K, K / groups, STEP, K * 2, 0};
    strips(source, {panel, 0, tile_size(rows)}, K, rows, columns, groups, lead, FewRounded{out, groups});
    return true;
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
    static const Matmul<bf16> matmul = {2 * BLOCK,    packed_width, pack,        multiply, round_to, gate_up,
                                         few_gate_up, few_round_to, leave};
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
