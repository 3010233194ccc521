// Products with weights that lie in strips (layout.cpp), written once over a path's `vec`; included by each path_*.cpp
// after its vec_*.h.
//
// A lane is a weight row: a number of x, in all lanes, times a line of a strip adds to 16 sums; no sum crosses lanes.
// Every (row, column) of a product has its own accumulator that walks K from its start, so a tile's shape decides the
// speed and never the bits. No standard templates here: they would be shared between instruction sets.
#pragma once

#include "matmul.h"

namespace kernels {
namespace {

// Strips that a tile takes at once: two lines of weights share each number of x.
constexpr int STRIPS = COLUMNS / LANES;

// How a product reads its operands. `Line`: what a line of a strip holds of 16 weight rows, DEPTH of K, in the ITEMS
// parts that it is multiplied in; `items`: 16 numbers of a row of x as they are packed, each to go with one part.
template <class T>
struct Widened;

template <>
struct Widened<float> {
    using scalar = float;
    using stored = float;
    static constexpr int DEPTH = 1, ITEMS = 1;
    struct Line {
        vec part[ITEMS];
    };
    static FN Line take(const float* w) { return {{read(w)}}; }
    static FN Line take(const float* w, int rows) { return {{read(w, rows)}}; }
    static FN Line take_odd(const float* w, int rows) { return take(w, rows); }
    static FN vec add(vec acc, float item, vec part) { return fused(fill(item), part, acc); }
    static FN vec items(const float* x) { return read(x); }
    static FN vec items(const float* x, int n) { return read(x, n); }
    static FN void put(float* items, int64_t k, int apart, float x) { items[k * apart] = x; }
};

// bfloat16 is float32 cut short: the parts are the first and the second of two neighbours of K.
template <>
struct Widened<bf16> {
    using scalar = bf16;
    using stored = bf16;
    static constexpr int DEPTH = 2, ITEMS = 2;
    struct Line {
        vec part[ITEMS];
    };
    static FN Line take(const bf16* w) {
        Line line;
        read_pairs(w, line.part[0], line.part[1]);
        return line;
    }
    static FN Line take(const bf16* w, int rows) {
        Line line;
        read_pairs(w, rows, line.part[0], line.part[1]);
        return line;
    }
    static FN Line take_odd(const bf16* w, int rows) { return {{read(w, rows), zero()}}; }
    static FN vec add(vec acc, float item, vec part) { return fused(fill(item), part, acc); }
    static FN vec items(const bf16* x) { return read(x); }
    static FN vec items(const bf16* x, int n) { return read(x, n); }
    static FN void put(float* items, int64_t k, int apart, bf16 x) { items[k * apart] = load(&x); }
};

// Of K, that an item of packed x holds.
template <class Kind>
constexpr int PER_ITEM = Kind::DEPTH / Kind::ITEMS;

// Items of a packed row; every group begins a line of weights.
template <class Kind>
int64_t items_of(int64_t K, int groups) {
    return groups * blocks_of(K / groups, Kind::DEPTH) * Kind::ITEMS;
}

template <class Kind>
int64_t packed_width(int64_t K, int groups) {
    return items_of<Kind>(K, groups) * int64_t(sizeof(float) / sizeof(typename Kind::scalar));
}

// A block of rows becomes [item][row].
template <class Kind>
ENTRY void pack_rows(Rows<typename Kind::scalar> x, int rows, int64_t K, int groups, typename Kind::scalar* to) {
    float* out = (float*)to;
    int64_t width = K / groups, items = items_of<Kind>(width, 1);
    for (int g = 0; g < groups; g++, out += items * rows) {
        for (int64_t first = 0; first < items; first += LANES) {
            vec turned[LANES];
            int64_t k = first * PER_ITEM<Kind>, left = width - k;
            for (int r = 0; r < LANES; r++) {
                turned[r] = zero();
                if (r >= rows || left <= 0) continue;
                const typename Kind::scalar* from = x[r] + g * width + k;
                turned[r] = left >= LANES * PER_ITEM<Kind> ? Kind::items(from) : Kind::items(from, int(left));
            }
            int count = int(items - first < LANES ? items - first : LANES);
            if (rows == 1) {
                write(out + first, turned[0], count);
                continue;
            }
            transpose(turned);
            for (int i = 0; i < count; i++) write(out + (first + i) * rows, turned[i], rows);
        }
    }
}

// What a tile reads: strips of `rows` weight rows each, x as packed.
template <class Kind>
struct Operands {
    static constexpr bool PADDED = false;  // whether a strip always holds 16 rows
    const typename Kind::stored* strip[STRIPS];
    int rows;
    const float* x;

    FN Operands one(int s, int rows_of) const { return {{strip[s], nullptr}, rows_of, x}; }
    FN const char* place(int s) const { return (const char*)strip[s]; }
    FN int64_t strip_bytes(int64_t K) const { return LANES * K * int64_t(sizeof(typename Kind::stored)); }
};

// Lines are fetched into the first-level cache this far ahead, and into the second-level cache twice as far: fewer
// requests would be under way than memory takes, and at the end of a tile, where none are made, it would pause.
constexpr int64_t LEAD = 2048, FAR_LEAD = 2 * LEAD;

// Where the line is, seen from the one at hand, that is fetched with it: farther on in its strip, then in the one that
// is read next.
struct Fetch {
    int64_t left;  // lines until then
    int64_t offset[STRIPS], then[STRIPS];

    // `ahead`: what is read after these strips, or null.
    template <int S, class At>
    static FN Fetch of(const At& at, int64_t K, const Ahead& ahead) {
        int64_t bytes = at.strip_bytes(K);
        Fetch fetch{bytes > LEAD ? (bytes - LEAD) / Ahead::LINE : 0, {LEAD, LEAD}, {LEAD, LEAD}};
        for (int s = 0; s < S && ahead.at != nullptr; s++)
            fetch.then[s] += ahead.at + s * ahead.second - (at.place(s) + bytes);
        return fetch;
    }
    FN void line() {
        if (left-- == 0)
            for (int s = 0; s < STRIPS; s++) offset[s] = then[s];
    }
};

template <class Kind, int R, int S>
FN void add_line(const float* x, const typename Kind::Line* line, vec (&acc)[R][S]) {
#pragma GCC unroll 2
    for (int i = 0; i < Kind::ITEMS; i++) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int s = 0; s < S; s++) acc[r][s] = Kind::add(acc[r][s], x[i * R + r], line[s].part[i]);
        }
    }
}

// One group of K, whose end `at` is then at; WHOLE: all 16 rows of the strips are there.
template <int R, int S, bool WHOLE, class Kind>
FN void add_group(Operands<Kind>& at, int64_t width, Fetch& fetch, vec (&acc)[R][S]) {
    int rows = WHOLE ? LANES : at.rows;
    typename Kind::Line line[S];
    int64_t k = 0;
    for (; k + Kind::DEPTH <= width; k += Kind::DEPTH, at.x += Kind::ITEMS * R) {
        fetch.line();
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) {
            __builtin_prefetch((const char*)at.strip[s] + fetch.offset[s], 0, 3);
            __builtin_prefetch((const char*)at.strip[s] + FAR_LEAD, 0, 2);
            line[s] = WHOLE ? Kind::take(at.strip[s]) : Kind::take(at.strip[s], rows);
            at.strip[s] += Kind::DEPTH * rows;
        }
        add_line<Kind, R, S>(at.x, line, acc);
    }
    if (k == width) return;
    for (int s = 0; s < S; s++) {
        line[s] = Kind::take_odd(at.strip[s], rows);
        at.strip[s] += rows;
    }
    add_line<Kind, R, S>(at.x, line, acc);
    at.x += Kind::ITEMS * R;
}

// The parts of K are added like a binary counter carries: (p0 + p1) + (p2 + p3), whatever their number.
template <int R, int S, bool WHOLE, class At>
FN void tile(At at, int64_t K, int groups, const Ahead& ahead, float* out) {
    constexpr int LEVELS = 16;
    float sums[LEVELS][R][S][LANES];
    int64_t width = K / groups;
    Fetch fetch = Fetch::of<S>(at, K, ahead);
    for (int g = 0; g < groups; g++) {
        vec acc[R][S];
        for (int r = 0; r < R; r++)
            for (int s = 0; s < S; s++) acc[r][s] = zero();
        add_group<R, S, WHOLE>(at, width, fetch, acc);
        int level = 0;
        for (int carry = g; carry & 1; carry >>= 1, level++)
            for (int r = 0; r < R; r++)
                for (int s = 0; s < S; s++) acc[r][s] = plus(read(sums[level][r][s]), acc[r][s]);
        float* to = g + 1 < groups ? sums[level][0][0] : out;
        int row = g + 1 < groups ? S * LANES : COLUMNS;
        for (int r = 0; r < R; r++)
            for (int s = 0; s < S; s++) write(to + r * row + s * LANES, acc[r][s]);
    }
}

template <int R, class At>
FN void last_rows(const At& at, const int* rows_of, int rows, int64_t K, int groups, const Ahead& ahead, float* out) {
    if (rows == R) {
        if (rows_of[0] == LANES && rows_of[1] == LANES) return tile<R, 2, true>(at, K, groups, ahead, out);
        for (int s = 0; s < STRIPS && rows_of[s] > 0; s++) {
            if (At::PADDED || rows_of[s] == LANES)
                tile<R, 1, true>(at.one(s, LANES), K, groups, ahead, out + s * LANES);
            else if constexpr (!At::PADDED)
                tile<R, 1, false>(at.one(s, rows_of[s]), K, groups, ahead, out + s * LANES);
        }
    } else if constexpr (R > 1) {
        last_rows<R - 1>(at, rows_of, rows, K, groups, ahead, out);
    }
}

// Two strips, of which `rows_of` weight rows are there, with all rows of a panel: use(sums [rows][COLUMNS], first row,
// rows) after each block.
template <class Kind, class Use>
FN void all_rows(const typename Kind::scalar* panel, int rows, Operands<Kind> at, const int* rows_of, int64_t K,
                 int groups, const Ahead& ahead, const Use& use) {
    alignas(64) float sums[TILE_ROWS * COLUMNS];
    int64_t width = packed_width<Kind>(K, groups);
    for (int r = 0; r < rows; r += TILE_ROWS) {
        int here = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        at.x = (const float*)(panel + r * width);
        last_rows<TILE_ROWS>(at, rows_of, here, K, groups, ahead, sums);
        use(sums, r, here);
    }
}

// `columns` of weight rows from w on, as two strips.
template <class Kind, class Use>
FN void rows_by_columns(const typename Kind::scalar* panel, int rows, const typename Kind::stored* w, int columns,
                        int64_t K, int groups, const Ahead& ahead, const Use& use) {
    int rows_of[STRIPS] = {columns < LANES ? columns : LANES, columns < LANES ? 0 : columns - LANES};
    all_rows<Kind>(panel, rows, {{w, w + LANES * K}, 0, nullptr}, rows_of, K, groups, ahead, use);
}

struct PutSums {
    float* sums;
    int columns;
    FN void operator()(const float* from, int first, int rows) const {
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < columns; n++) sums[(first + r) * COLUMNS + n] = from[r * COLUMNS + n];
    }
};

template <class Kind>
ENTRY void multiply(const typename Kind::scalar* panel, int rows, const typename Kind::stored* w, int columns,
                    int64_t K, int groups, Ahead ahead, float* sums) {
    rows_by_columns<Kind>(panel, rows, w, columns, K, groups, ahead, PutSums{sums, columns});
}

template <class T>
struct PutRounded {
    T* const* out;
    int columns;
    FN void operator()(const float* from, int first, int rows) const {
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < columns; n++) store(out[first + r] + n, from[r * COLUMNS + n]);
    }
};

template <class Kind>
ENTRY void round_to(const typename Kind::scalar* panel, int rows, const typename Kind::stored* w, int columns,
                    int64_t K, int groups, Ahead ahead, typename Kind::scalar* const* out) {
    PutRounded<typename Kind::scalar> use{out, columns};
    rows_by_columns<Kind>(panel, rows, w, columns, K, groups, ahead, use);
}

// Gates and ups of `columns` become columns [at, at + columns) of a panel of rows of I, in `groups`.
template <class Kind>
struct PutInner {
    using T = typename Kind::scalar;
    T* inner;
    int64_t I, at;
    int columns, groups;

    FN void operator()(const float* from, int first, int rows) const {
        int64_t width = I / groups, items = items_of<Kind>(width, 1);
        float* block = (float*)(inner + first * packed_width<Kind>(I, groups)) + at / width * items * rows;
        for (int r = 0; r < rows; r++) {
            const float *g = from + r * COLUMNS, *u = g + LANES;
            T done[LANES];
            for (int n = 0; n < LANES; n++) store(done + n, rounded<T>(silu(rounded<T>(g[n]))) * rounded<T>(u[n]));
            float* group = block + r;
            int64_t k = at % width;
            for (int n = 0; n < columns; n++, k++) {
                if (k == width) group += items * rows, k = 0;
                Kind::put(group, k, rows, done[n]);
            }
        }
    }
};

template <class Kind>
ENTRY void gate_up(const typename Kind::scalar* panel, int rows, const typename Kind::stored* gate,
                   const typename Kind::stored* up, int columns, int64_t K, Ahead ahead, typename Kind::scalar* inner,
                   int64_t I, int64_t at, int groups) {
    int rows_of[STRIPS] = {columns, columns};
    all_rows<Kind>(panel, rows, {{gate, up}, 0, nullptr}, rows_of, K, 1, ahead,
                   PutInner<Kind>{inner, I, at, columns, groups});
}

template <class T>
ENTRY void finish(const float* sums, const T* bias, int n, T* out) {
    if (bias == nullptr)
        for (int i = 0; i < n; i++) store(out + i, sums[i]);
    else
        for (int i = 0; i < n; i++) store(out + i, sums[i] + load(bias + i));
}

template <class Kind>
const Matmul<typename Kind::scalar>* strip_matmul() {
    static const Matmul<typename Kind::scalar> matmul = {
        TILE_ROWS,      true,          packed_width<Kind>, pack_rows<Kind>, multiply<Kind>,
        round_to<Kind>, gate_up<Kind>, nullptr,            nullptr,         nullptr};
    return &matmul;
}

}  // namespace
}  // namespace kernels
