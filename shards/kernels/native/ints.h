// Products with weights in small integers (shards/int_weights.py); included by each path_*.cpp after strips.h.
//
// A group of K is multiplied and added up as integers, which are exact in every operand, and its sums then go by its
// scales into those of the groups before it: an order that follows from the sizes alone.
#pragma once

#include "strips.h"

namespace kernels {
namespace {

// Columns of 16 rows that lie together.
constexpr int UNIT = 8;

template <int BITS>
constexpr int64_t UNIT_BYTES = UNIT * LANES * BITS / 8;

// The pairs of columns of a unit as operands of a kind; kinds that take a pair at once specialise it.
template <class Kind, int BITS>
struct IntPairs {
    static constexpr int PARTS = 2;
    Ints<BITS> unit;
    FN explicit IntPairs(const char* from) : unit(from) {}
    FN void next(vec (&part)[PARTS]) { unit.next(part[0], part[1]); }
    static FN vec add(vec acc, float item, vec part) { return Kind::add(acc, item, part); }
};

FN vec read_scales(const char* from, int type) {
    if (type == FLOAT32) return read((const float*)from);
    return type == BFLOAT16 ? read((const bf16*)from) : read_halves((const uint16_t*)from);
}

// The kind whose items of x are as this one's and are multiplied alike: one function for both.
template <class Kind>
struct SameProducts {
    using kind = Kind;
};

template <>
struct SameProducts<Widened<bf16>> {
    using kind = Widened<float>;
};

template <class Kind, int BITS>
struct IntOperands {
    static constexpr bool PADDED = true;
    IntRows strip[STRIPS];
    const float* x;

    FN IntOperands one(int s, int) const { return {{strip[s], strip[s]}, x}; }
    FN const char* place(int s) const { return strip[s].values; }
    FN int64_t strip_bytes(int64_t K) const { return LANES * K * BITS / 8; }
};

// The next pair of columns of a unit of S strips.
template <int R, int S, class Pairs>
FN void add_pair(Pairs* units, const float* x, vec (&acc)[R][S]) {
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
        vec part[Pairs::PARTS];
        units[s].next(part);
#pragma GCC unroll 2
        for (int i = 0; i < Pairs::PARTS; i++) {
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r][s] = Pairs::add(acc[r][s], x[i * R + r], part[i]);
        }
    }
}

// One group of a sum's parts, in groups of the weights.
template <int R, int S, bool, class Kind, int BITS>
FN void add_group(IntOperands<Kind, BITS>& at, int64_t width, Fetch& fetch, vec (&total)[R][S]) {
    using Pairs = IntPairs<Kind, BITS>;
    int64_t group = at.strip[0].group;
    for (int64_t k = 0; k < width; k += group) {
        vec acc[R][S];
        for (int r = 0; r < R; r++)
            for (int s = 0; s < S; s++) acc[r][s] = zero();
        for (int64_t unit = 0; unit < group; unit += UNIT) {
            for (int64_t line = 0; line < UNIT_BYTES<BITS>; line += Ahead::LINE) {
                fetch.line();
                for (int s = 0; s < S; s++) __builtin_prefetch(at.strip[s].values + line + fetch.offset[s], 0, 3);
            }
            // The second is not looked at where there is one strip.
            Pairs units[STRIPS] = {Pairs(at.strip[0].values), Pairs(at.strip[S - 1].values)};
            // As a loop: unrolled, the many sizes of a tile would take minutes to compile.
#pragma GCC unroll 1
            for (int pair = 0; pair < UNIT / 2; pair++, at.x += Pairs::PARTS * R) add_pair<R, S>(units, at.x, acc);
            for (int s = 0; s < S; s++) at.strip[s].values += UNIT_BYTES<BITS>;
        }
        for (int s = 0; s < S; s++) {
            vec scales = read_scales(at.strip[s].scales, at.strip[s].scale_type);
            at.strip[s].scales += LANES * at.strip[s].scale_bytes();
            for (int r = 0; r < R; r++) total[r][s] = fused(acc[r][s], scales, total[r][s]);
        }
    }
}

// A block of rows of x with two strips; a function of its own, for all that is done with sums.
template <class Kind, int BITS>
ENTRY __attribute__((noinline)) void int_block(IntRows first, IntRows second, const float* x, int rows, int strips,
                                               int64_t K, int groups, const Ahead& ahead, float* sums) {
    int rows_of[STRIPS] = {LANES, strips > 1 ? LANES : 0};
    last_rows<TILE_ROWS>(IntOperands<Kind, BITS>{{first, second}, x}, rows_of, rows, K, groups, ahead, sums);
}

// Rows of x from which on integers are widened once for all of them instead of anew for each block.
constexpr int MANY_ROWS = 3 * TILE_ROWS;

// The kind that reads what `unpack` makes: bfloat16, which holds integers of 8 bits as they are, in its strips' layout.
template <class Kind>
struct Unpacked {
    using kind = Kind;
};

template <>
struct Unpacked<Widened<float>> {
    using kind = Widened<bf16>;
};

FN void put_pair(const vec (&part)[1], bf16* to) { write((float*)to, part[0]); }
FN void put_pair(const vec (&part)[2], bf16* to) {
    alignas(64) float first[LANES], second[LANES];
    write(first, part[0]);
    write(second, part[1]);
    for (int n = 0; n < LANES; n++) {
        to[2 * n] = bf16(bits_of(first[n]) >> 16);
        to[2 * n + 1] = bf16(bits_of(second[n]) >> 16);
    }
}

template <class Kind, int BITS>
ENTRY __attribute__((noinline)) void unpack(const char* strip, int64_t K, bf16* to) {
    using Pairs = IntPairs<Kind, BITS>;
    for (int64_t k = 0; k < K; k += UNIT, strip += UNIT_BYTES<BITS>) {
        __builtin_prefetch(strip + LEAD, 0, 3);
        Pairs unit(strip);
#pragma GCC unroll 1
        for (int pair = 0; pair < UNIT / 2; pair++, to += 2 * LANES) {
            vec part[Pairs::PARTS];
            unit.next(part);
            put_pair(part, to);
        }
    }
}

template <class Kind>
struct UnpackedOperands {
    const bf16* strip[STRIPS];
    IntRows scaled[STRIPS];
    const float* x;

    FN const char* place(int s) const { return (const char*)strip[s]; }
    FN int64_t strip_bytes(int64_t K) const { return LANES * K * int64_t(sizeof(bf16)); }
};

// Sums, in the order of those of integers.
template <int R, int S, bool, class Kind>
FN void add_group(UnpackedOperands<Kind>& at, int64_t width, Fetch& fetch, vec (&total)[R][S]) {
    int64_t group = at.scaled[0].group;
    for (int64_t k = 0; k < width; k += group) {
        vec acc[R][S];
        for (int r = 0; r < R; r++)
            for (int s = 0; s < S; s++) acc[r][s] = zero();
        Operands<Kind> lines = {{at.strip[0], at.strip[S - 1]}, LANES, at.x};
        add_group<R, S, true>(lines, group, fetch, acc);
        at.x = lines.x;
        for (int s = 0; s < S; s++) {
            at.strip[s] = lines.strip[s];
            vec scales = read_scales(at.scaled[s].scales, at.scaled[s].scale_type);
            at.scaled[s].scales += LANES * at.scaled[s].scale_bytes();
            for (int r = 0; r < R; r++) total[r][s] = fused(acc[r][s], scales, total[r][s]);
        }
    }
}

// TILE_ROWS rows of x.
template <class Kind>
ENTRY __attribute__((noinline)) void unpacked_block(const UnpackedOperands<Kind>& at, int strips, int64_t K, int groups,
                                                    const Ahead& ahead, float* sums) {
    if (strips > 1)
        tile<TILE_ROWS, 2, true>(at, K, groups, ahead, sums);
    else
        tile<TILE_ROWS, 1, true>(at, K, groups, ahead, sums);
}

template <class Kind>
UnpackedOperands<typename Unpacked<Kind>::kind> unpacked(IntRows first, IntRows second, int strips, int64_t K) {
    int64_t size = LANES * K;
    bf16* to = (bf16*)staging(size_t(STRIPS * size) * sizeof(bf16));
    auto take = first.bits == 4 ? unpack<Kind, 4> : unpack<Kind, 8>;
    take(first.values, K, to);
    if (strips > 1) take(second.values, K, to + size);
    return {{to, to + size}, {first, second}, nullptr};
}

// As `all_rows`.
template <class Kind, class Use>
FN void int_rows(const typename Kind::scalar* panel, int rows, IntRows first, IntRows second, int strips, int64_t K,
                 int groups, const Ahead& ahead, const Use& use) {
    alignas(64) float sums[TILE_ROWS * COLUMNS];
    using Products = typename SameProducts<Kind>::kind;
    int64_t width = packed_width<Kind>(K, groups);
    auto block = first.bits == 4 ? int_block<Products, 4> : int_block<Products, 8>;
    int r = 0;
    if (rows >= MANY_ROWS) {
        auto at = unpacked<Products>(first, second, strips, K);
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS) {
            at.x = (const float*)(panel + r * width);
            unpacked_block(at, strips, K, groups, ahead, sums);
            use(sums, r, TILE_ROWS);
        }
    }
    for (; r < rows; r += TILE_ROWS) {
        int here = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        block(first, second, (const float*)(panel + r * width), here, strips, K, groups, ahead, sums);
        use(sums, r, here);
    }
}

template <class Kind>
ENTRY void multiply_ints(const typename Kind::scalar* panel, int rows, IntRows w, int columns, int64_t K, int groups, Ahead ahead,
                         float* sums) {
    int_rows<Kind>(panel, rows, w, forward(w, LANES, K), columns > LANES ? 2 : 1, K, groups, ahead,
                   PutSums{sums, columns});
}

template <class Kind>
ENTRY void round_ints_to(const typename Kind::scalar* panel, int rows, IntRows w, int columns, int64_t K, int groups, Ahead ahead,
                         typename Kind::scalar* const* out) {
    int_rows<Kind>(panel, rows, w, forward(w, LANES, K), columns > LANES ? 2 : 1, K, groups, ahead,
                   PutRounded<typename Kind::scalar>{out, columns});
}

template <class Kind>
ENTRY void gate_up_ints(const typename Kind::scalar* panel, int rows, IntRows gate, IntRows up, int columns, int64_t K,
                        Ahead ahead, typename Kind::scalar* inner, int64_t I, int64_t at, int groups) {
    int_rows<Kind>(panel, rows, gate, up, 2, K, 1, ahead, PutInner<Kind>{inner, I, at, columns, groups});
}

template <class Kind>
const Matmul<typename Kind::scalar, IntRows>* int_matmul() {
    static const Matmul<typename Kind::scalar, IntRows> matmul = {
        TILE_ROWS,           true,               packed_width<Kind>, pack_rows<Kind>, multiply_ints<Kind>,
        round_ints_to<Kind>, gate_up_ints<Kind>, nullptr,            nullptr,         nullptr};
    return &matmul;
}

}  // namespace
}  // namespace kernels
