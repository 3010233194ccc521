// Attention over a range of bfloat16 keys by AMX tiles, turned on its side: scores are [keys, queries] and sums of
// values [D, queries], so that a query is a lane of every vector of the softmax and nothing is summed across lanes.
//
// Keys lie as they are and values turned, both packed once for all query rows of a call. Queries and weights are the
// second operands, in pairs of the summed axis. What is behind the last row, key or D is zero.
#include <cmath>

#include "matmul.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define TARGET "avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"
#define ENTRY __attribute__((target(TARGET)))
#define FN inline __attribute__((always_inline, target(TARGET)))

#include "vec_avx512.h"

namespace kernels {
namespace {

constexpr int DEPTH = 32;               // of the summed axis, a tile
constexpr int OPERAND = LANES * DEPTH;  // bfloat16 of a tile
constexpr int RESULT = LANES * LANES;   // floats of a tile
constexpr int LINE = 64;                // bytes of a tile's row
constexpr int COLUMNS_AT_ONCE = 2;      // tiles of queries
constexpr int SOFTMAX_KEYS = 256;       // keys of a step of the online softmax, counted from position 0
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

struct alignas(64) WholeTiles {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles of the operands: keys [key / 16][D / 32], values [key / 32][D / 16], queries [column][D / 32], weights
// [key / 32][column]; of the results: scores [key][column] rows of 16 floats, acc [D / 16][column].
struct Room {
    bf16 *keys, *values, *queries, *weights;
    float *scores, *acc;

    Room(int keys_of_range, int stride) {
        size_t range = size_t(keys_of_range) * size_t(stride), columns = COLUMNS_AT_ONCE * LANES;
        size_t block = SOFTMAX_KEYS * columns, rows = columns * size_t(stride);
        char* at = scratch((2 * range + rows + block) * sizeof(bf16) + (block + rows) * sizeof(float));
        scores = (float*)at;
        acc = scores + block;
        weights = (bf16*)(acc + rows);
        queries = weights + block;
        keys = queries + rows;
        values = keys + range;
    }
};

FN __m512i items(const bf16* row, int d, int D) {
    __mmask32 here = D - d < DEPTH ? (__mmask32(1) << (D - d)) - 1 : ~__mmask32(0);
    return _mm512_maskz_loadu_epi16(here, row + d);
}

FN void pack_keys(Rows<bf16> k, int keys, int D, int steps, bf16* to) {
    for (int j = 0; j < keys; j += LANES)
        for (int s = 0; s < steps; s++)
            for (int r = 0; r < LANES; r++, to += DEPTH) _mm512_store_si512(to, items(k[j + r], s * DEPTH, D));
}

// Up to 16 rows of queries -> a column of tiles.
FN void pack_queries(Rows<bf16> q, int rows, int D, int steps, bf16* to) {
    for (int s = 0; s < steps; s++) {
        vec x[LANES];
        for (int r = 0; r < LANES; r++) x[r] = r < rows ? _mm512_castsi512_ps(items(q[r], s * DEPTH, D)) : zero();
        transpose(x);
        for (int p = 0; p < LANES; p++, to += DEPTH) _mm512_store_si512(to, _mm512_castps_si512(x[p]));
    }
}

// The bfloat16 of two vectors in turns: of their first halves, of their second halves.
FN void interleave(__m512i a, __m512i b, vec* low, vec* high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    *low = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, first, b));
    *high = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, second, b));
}

FN void pack_values(Rows<bf16> v, int keys, int D, int steps, bf16* to) {
    for (int j = 0; j < keys; j += DEPTH)
        for (int s = 0; s < steps; s++) {
            vec x[2][LANES];
            for (int p = 0; p < LANES; p++) {
                __m512i even = items(v[j + 2 * p], s * DEPTH, D), odd = items(v[j + 2 * p + 1], s * DEPTH, D);
                interleave(even, odd, x[0] + p, x[1] + p);
            }
            for (int half = 0; half < 2; half++) {
                transpose(x[half]);
                for (int d = 0; d < LANES; d++, to += DEPTH) _mm512_store_si512(to, _mm512_castps_si512(x[half][d]));
            }
        }
}

// Two tiles of `a` under each other times C of `b` side by side, summed into tiles 0 .. 3.
template <int C>
FN void step(const bf16* a, const bf16* a_below, const bf16* b, const bf16* b_beside) {
    _tile_loadd(4, a, LINE);
    _tile_loadd(6, b, LINE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a_below, LINE);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (C > 1) {
        _tile_loadd(7, b_beside, LINE);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// An even number of tiles of keys by C columns of queries.
template <int C>
FN void score(const bf16* keys, const bf16* queries, int count, int steps, float* scores) {
    constexpr int ROW = C * LANES;
    for (int j = 0; j < count; j += DEPTH, keys += 2 * steps * OPERAND, scores += DEPTH * ROW) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (C > 1) _tile_zero(2);
        if constexpr (C > 1) _tile_zero(3);
        for (int s = 0; s < steps; s++)
            step<C>(keys + s * OPERAND, keys + (steps + s) * OPERAND, queries + s * OPERAND,
                    queries + (steps + s) * OPERAND);
        _tile_stored(0, scores, ROW * sizeof(float));
        _tile_stored(1, scores + LANES * ROW, ROW * sizeof(float));
        if constexpr (C > 1) _tile_stored(2, scores + LANES, ROW * sizeof(float));
        if constexpr (C > 1) _tile_stored(3, scores + LANES * ROW + LANES, ROW * sizeof(float));
    }
}

// acc, from zero on the first call, plus values by weights.
template <int C>
FN void weigh(const bf16* values, const bf16* weights, int count, int steps, bool first, float* acc) {
    for (int s = 0; s < steps; s++, acc += 2 * C * RESULT) {
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (C > 1) _tile_zero(2);
            if constexpr (C > 1) _tile_zero(3);
        } else {
            _tile_loadd(0, acc, LINE);
            _tile_loadd(1, acc + C * RESULT, LINE);
            if constexpr (C > 1) _tile_loadd(2, acc + RESULT, LINE);
            if constexpr (C > 1) _tile_loadd(3, acc + (C + 1) * RESULT, LINE);
        }
        const bf16 *a = values + 2 * s * OPERAND, *b = weights;
        for (int j = 0; j < count; j += DEPTH, a += 2 * steps * OPERAND, b += C * OPERAND)
            step<C>(a, a + OPERAND, b, b + OPERAND);
        _tile_stored(0, acc, LINE);
        _tile_stored(1, acc + C * RESULT, LINE);
        if constexpr (C > 1) _tile_stored(2, acc + RESULT, LINE);
        if constexpr (C > 1) _tile_stored(3, acc + (C + 1) * RESULT, LINE);
    }
}

// 2^x to 1e-7 of it, 1 for 0 exactly; a polynomial of the least largest error (Remez) on [-1/2, 1/2].
FN vec exp2_of(vec x) {
    vec whole = _mm512_roundscale_ps(x, 0), r = subtract(x, whole), y = fill(1.3264727e-3f);
    y = fused(y, r, fill(9.6715127e-3f));
    y = fused(y, r, fill(5.5507337e-2f));
    y = fused(y, r, fill(2.4022242e-1f));
    y = fused(y, r, fill(6.9314698e-1f));
    y = fused(y, r, fill(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// One column of queries over the scores of a block.
struct Softmax {
    const float* scores;
    int row;         // floats from key to key
    __m512i counts;  // keys of the block that each query sees
    int seen_by_all;
    vec scale;       // to powers of 2
};

FN vec highest_score(const Softmax& x, int keys) {
    constexpr int CHAINS = 4;
    vec top[CHAINS];
    for (int i = 0; i < CHAINS; i++) top[i] = fill(-INFINITY);
    int j = 0;
    for (; j + CHAINS <= x.seen_by_all; j += CHAINS)
        for (int i = 0; i < CHAINS; i++) top[i] = _mm512_max_ps(top[i], read(x.scores + (j + i) * x.row));
    for (; j < keys; j++) {
        __mmask16 seen = _mm512_cmpgt_epi32_mask(x.counts, _mm512_set1_epi32(j));
        top[0] = _mm512_mask_max_ps(top[0], seen, top[0], read(x.scores + j * x.row));
    }
    return _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
}

template <bool ALL>
FN vec weight(const Softmax& x, vec shift, int j) {
    vec w = exp2_of(_mm512_fmsub_ps(read(x.scores + j * x.row), x.scale, shift));
    if (ALL) return w;
    return _mm512_maskz_mov_ps(_mm512_cmpgt_epi32_mask(x.counts, _mm512_set1_epi32(j)), w);
}

// Weights of 32 keys -> a tile, in pairs of keys; added to `sums` of even and odd keys.
template <bool ALL>
FN void weights_of(const Softmax& x, vec shift, int j, vec* sums, bf16* to) {
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int p = 0; p < LANES; p++, j += 2, to += DEPTH) {
        vec even = weight<ALL>(x, shift, j), odd = weight<ALL>(x, shift, j + 1);
        sums[0] = _mm512_add_ps(sums[0], even);
        sums[1] = _mm512_add_ps(sums[1], odd);
        _mm512_store_si512(to, _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
}

// Scores to weights 2^(score - top), zeros for keys not seen; raises `top`, brings `total` up to date; returns the
// factor by which earlier weights shrink.
FN vec soften(const Softmax& x, int keys, vec* top, vec* total, bf16* weights, int tile) {
    constexpr float LEAST = -200.0f;  // 2^LEAST is 0, as for no keys before
    vec before = *top, highest = multiply(highest_score(x, keys), x.scale);
    *top = _mm512_max_ps(before, highest);
    // Where a query sees none: any number, as its weights are zeros.
    vec shift = _mm512_max_ps(*top, fill(-3e38f));
    vec keep = exp2_of(_mm512_max_ps(subtract(before, shift), fill(LEAST)));
    vec sums[2] = {zero(), zero()};
    int j = 0;
    for (; j + DEPTH <= x.seen_by_all; j += DEPTH, weights += tile) weights_of<true>(x, shift, j, sums, weights);
    for (; j < keys; j += DEPTH, weights += tile) weights_of<false>(x, shift, j, sums, weights);
    *total = _mm512_add_ps(multiply(*total, keep), _mm512_add_ps(sums[0], sums[1]));
    return keep;
}

FN void shrink(float* acc, int tiles, int apart, vec keep) {
    if (_mm512_cmp_ps_mask(keep, fill(1.0f), _CMP_NEQ_UQ) == 0) return;
    for (int i = 0; i < tiles; i++, acc += apart)
        for (int d = 0; d < RESULT; d += LANES) write(acc + d, multiply(read(acc + d), keep));
}

// A column of acc -> rows.
FN void put_rows(const float* acc, int apart, int tiles, int rows, int stride, float* out) {
    for (int i = 0; i < tiles; i++, acc += apart, out += LANES) {
        vec x[LANES];
        for (int d = 0; d < LANES; d++) x[d] = read(acc + d * LANES);
        transpose(x);
        for (int r = 0; r < rows; r++) write(out + r * stride, x[r]);
    }
}

// The softmax of column `c` of C, with keys [base, base + keys) of the range.
template <int C>
FN void soften_column(const Room& room, const Attending& a, int r, int c, int base, int keys, vec* top, vec* total) {
    __m512i ends = _mm512_setzero_si512();
    int rows = a.rows - r < LANES ? a.rows - r : LANES;
    if (rows > 0) ends = _mm512_maskz_loadu_epi32(lanes(rows), a.counts + r);
    ends = _mm512_sub_epi32(ends, _mm512_set1_epi32(base));
    int least = _mm512_reduce_min_epi32(ends);
    Softmax x = {room.scores + c * LANES, C * LANES, ends, least < keys ? least : keys, fill(a.scale * LOG2_E)};
    vec keep = soften(x, keys, top, total, room.weights + c * OPERAND, C * OPERAND);
    if (base > 0) shrink(room.acc + c * RESULT, a.stride / LANES, C * RESULT, keep);
}

// Query rows from `r` on, up to C columns of them.
template <int C>
FN void attend_rows(Rows<bf16> q, const Room& room, const Attending& a, int r) {
    int steps = a.stride / DEPTH, seen = 0;
    vec top[C], total[C];
    for (int c = 0; c < C; c++) {
        int at = r + c * LANES, rows = a.rows - at < LANES ? a.rows - at : LANES;
        pack_queries(q + at, rows, a.D, steps, room.queries + c * steps * OPERAND);
        top[c] = fill(-INFINITY);
        total[c] = zero();
        for (int i = at; i < at + rows; i++) seen = a.counts[i] > seen ? a.counts[i] : seen;
    }
    // At least one block, so that acc is set.
    for (int base = 0; base == 0 || base < seen; base += SOFTMAX_KEYS) {
        int keys = seen - base < SOFTMAX_KEYS ? (seen - base + DEPTH - 1) / DEPTH * DEPTH : SOFTMAX_KEYS;
        score<C>(room.keys + base * a.stride, room.queries, keys, steps, room.scores);
        for (int c = 0; c < C; c++) soften_column<C>(room, a, r + c * LANES, c, base, keys, top + c, total + c);
        weigh<C>(room.values + base * a.stride, room.weights, keys, steps, base == 0, room.acc);
    }
    for (int c = 0; c < C; c++) {
        int at = r + c * LANES, rows = a.rows - at < LANES ? a.rows - at : LANES;
        if (rows <= 0) continue;
        write(a.top + at, multiply(top[c], fill(LN_2)), rows);
        write(a.total + at, total[c], rows);
        put_rows(room.acc + c * RESULT, C * RESULT, 2 * steps, rows, a.stride, a.acc + at * a.stride);
    }
}

ENTRY void attend_range(Rows<bf16> q, Rows<bf16> k, Rows<bf16> v, int keys, const Attending& a) {
    static const WholeTiles config;
    int whole = (keys + DEPTH - 1) / DEPTH * DEPTH, steps = a.stride / DEPTH, r = 0;
    Room room(whole, a.stride);
    pack_keys(k, whole, a.D, steps, room.keys);
    pack_values(v, whole, a.D, steps, room.values);
    _tile_loadconfig(&config);
    for (; r + LANES < a.rows; r += COLUMNS_AT_ONCE * LANES) attend_rows<COLUMNS_AT_ONCE>(q, room, a, r);
    if (r < a.rows) attend_rows<1>(q, room, a, r);
    _tile_release();
}

}  // namespace

AttendRange amx_attend_range() { return attend_range; }

}  // namespace kernels
#else
kernels::AttendRange kernels::amx_attend_range() { return nullptr; }
#endif
