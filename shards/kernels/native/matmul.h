// Products of rows of x with rows of a weight matrix, as the instruction sets make them, and scratch memory for callers.
//
// A caller packs rows of x once, cuts the weight rows into tasks, and gives each call the address of the weights that
// the thread will read next, so that memory works while the thread computes.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace kernels {

// Most rows of x that are packed together.
constexpr int BLOCK = 16;
// Rows of x that a call takes at most; less where the rows that are packed together do not divide it.
constexpr int CALL_ROWS = 512;

// Weights that a later call will read. AMX products fetch all of them into the second-level cache on the way, in four
// streams, to which memory gives more than to one or two: from `at`, `at + half` and, `second` bytes behind, from two
// places more. Products in strips fetch the beginnings of the two strips at `at` and `at + second`.
struct Ahead {
    const char* at = nullptr;
    int64_t half = 0, second = 0;
    int64_t lines = 0;  // left of each stream

    Ahead() = default;
    // `bytes` in one piece, or null for none.
    Ahead(const void* from, int64_t bytes) : Ahead(from, lines_of(bytes, 2) * LINE, lines_of(bytes, 2) * LINE) {}
    // Two pieces of `bytes`, `apart` bytes from start to start.
    Ahead(const void* from, int64_t bytes, int64_t apart)
        : at((const char*)from), half(lines_of(bytes, 2) * LINE), second(apart), lines(at == nullptr ? 0 : half / LINE) {}

    static constexpr int64_t LINE = 64;
    static int64_t lines_of(int64_t bytes, int64_t parts) { return (bytes + parts * LINE - 1) / (parts * LINE); }
};

// What a call for few rows of x fetches: the weights `columns` rows ahead of those at hand, and from where its own end
// on, in equal parts, `tail`.
struct Lead {
    int columns;
    Ahead tail;
};

// Weight rows from the first of a strip on, as shards/int_weights.py lays them out: integers of 4 or 8 bits, a scale for
// each `group` of K. Behind the last row a strip holds zeros.
struct IntRows {
    const char *values, *scales;
    int64_t group;
    int bits, scale_type;

    int64_t scale_bytes() const { return scale_type == FLOAT32 ? 4 : 2; }
};

// The weight row `rows` further on, at the start of a strip; bytes of a row that memory delivers, and rows that a matrix
// of so many takes.
template <class T>
inline const T* forward(const T* w, int64_t rows, int64_t K) {
    return w + rows * K;
}
inline IntRows forward(IntRows w, int64_t rows, int64_t K) {
    w.values += rows * K * w.bits / 8;
    w.scales += rows * (K / w.group) * w.scale_bytes();
    return w;
}
template <class T>
inline int64_t row_bytes(const T*, int64_t K) {
    return K * int64_t(sizeof(T));
}
inline int64_t row_bytes(IntRows w, int64_t K) { return K * w.bits / 8; }
template <class T>
inline int64_t rows_held(const T*, int64_t rows) {
    return rows;
}
inline int64_t rows_held(IntRows, int64_t rows) { return (rows + LANES - 1) / LANES * LANES; }
template <class T>
inline const void* address(const T* w) {
    return w;
}
inline const void* address(IntRows w) { return w.values; }

// T: of x and results, W: where weight rows begin.
template <class T, class W = const T*>
struct Matmul {
    // Rows of x that are packed together, at most BLOCK: a panel holds its rows rounded up to a multiple of it.
    int block;
    // Weights lie in strips as layout.cpp lays them out; else row by row.
    bool strips;
    // Elements of a packed row of K; a panel's rows r .. r + block - 1 begin at r * packed_width, r a multiple of block.
    int64_t (*packed_width)(int64_t K, int groups);
    // Packs up to `block` rows.
    void (*pack)(Rows<T> x, int rows, int64_t K, int groups, T* to);
    // sums[r * COLUMNS + n] = x[r] . w[n] over K for up to COLUMNS of n, in `groups` parts that are added as a balanced
    // tree; row n of w, n a multiple of LANES, lies at n * K.
    void (*multiply)(const T* panel, int rows, W w, int columns, int64_t K, int groups, Ahead ahead, float* sums);
    // The same, rounded to T, to out[r][n].
    void (*round_to)(const T* panel, int rows, W w, int columns, int64_t K, int groups, Ahead ahead, T* const* out);
    // Writes silu(x[r] . gate[n]) * (x[r] . up[n]) for up to COLUMNS / 2 of n into columns [at, at + columns) of a
    // panel of rows of I, packed in `groups` for the product that follows.
    void (*gate_up)(const T* panel, int rows, W gate, W up, int columns, int64_t K, Ahead ahead, T* inner,
                    int64_t I, int64_t at, int groups);
    // `gate_up` and `round_to` of up to `block` rows for any number of columns at once; false, and nothing done, where
    // they cannot take the sizes. Null where there is no such way.
    bool (*few_gate_up)(const T* panel, int rows, W gate, W up, int columns, int64_t K, Lead lead, T* inner,
                        int64_t I, int64_t at, int groups);
    bool (*few_round_to)(const T* panel, int rows, W w, int columns, int64_t K, int groups, Lead lead,
                         T* const* out);
    // After the last call of a thread; null where there is nothing to put back.
    void (*leave)();

    // Whole blocks that a call takes.
    int64_t call_rows() const { return CALL_ROWS / block * block; }
    // Rounding up of a panel's rows.
    int64_t panel_rows(int64_t rows) const { return (rows + block - 1) / block * block; }
};

template <class T, class W>
struct MatmulSession {
    const Matmul<T, W>& matmul;
    explicit MatmulSession(const Matmul<T, W>& used) : matmul(used) {}
    ~MatmulSession() {
        if (matmul.leave != nullptr) matmul.leave();
    }
    MatmulSession(const MatmulSession&) = delete;
    MatmulSession& operator=(const MatmulSession&) = delete;
};

// Memory of the calling thread, kept from call to call: fresh memory would be faulted in page by page each time.
// Valid until the thread's next call; 64-byte aligned.
char* scratch(size_t bytes);
// The same for the inner loops of a thread, beside its scratch.
char* staging(size_t bytes);

static inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

const Matmul<bf16>* amx_matmul();

}  // namespace kernels
