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

#include "amx_tiles.h"

namespace kernels {
namespace {

// Up to how many rows of x whole tiles of weights are read in place.
constexpr int IN_PLACE_ROWS = 32;

ENTRY void leave() { _tile_release(); }

// The weight rows of one or two tiles.
struct Weights {
    const bf16* rows[2];
    int counts[2];
    int64_t K;
};

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
    static const Matmul<bf16> matmul = {BLOCK,    false,   packed_width, pack,         multiply,
                                         round_to, gate_up, few_gate_up,  few_round_to, leave};
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
        // Integers have no tiles; these processors' dot product is slower than two fused multiply-adds.
        same.ints_bf16 = avx512_path()->ints_bf16;
        same.attend_range_bf16 = amx_attend_range();
        return same;
    }();
    return &path;
}
