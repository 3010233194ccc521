// The inner loops, written once over a path's `vec`; included by each path_*.cpp after its vec_*.h.
//
// Every (row, column) of a product has its own accumulator that walks K in steps from its start, so a tile's shape
// decides the speed and never the bits. No standard templates here: they would be shared between instruction sets.
#pragma once

#include "matmul.h"

namespace kernels {
namespace {

// Operands of a product: how many of K a step takes, how they are read and multiplied.
template <class T>
struct Widened {
    using scalar = T;
    using operand = vec;
    static constexpr int STEP = LANES;
    static FN operand take(const T* p) { return read(p); }
    static FN operand take(const T* p, int n) { return read(p, n); }
    static FN vec add_product(vec acc, operand x, operand w) { return fused(x, w, acc); }
};

// About as many lines of weights as a step uses.
template <int N>
FN void fetch(Ahead& ahead) {
    constexpr int LINES = (N + 3) / 4;
    if (ahead.lines <= 0) return;
    for (int64_t stream : {int64_t(0), ahead.half, ahead.second, ahead.second + ahead.half})
        for (int n = 0; n < LINES; n++) __builtin_prefetch(ahead.at + stream + n * Ahead::LINE, 0, 2);
    ahead.at += LINES * Ahead::LINE;
    ahead.lines -= LINES;
}

template <class Kind, int R, int N>
FN void part_tile(Rows<typename Kind::scalar> x, Rows<typename Kind::scalar> w, int64_t start, int64_t end, Ahead& ahead,
                  float* out) {
    vec acc[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) acc[r][n] = zero();
    int64_t k = start;
    for (; k + Kind::STEP <= end; k += Kind::STEP) {
        fetch<N>(ahead);
        typename Kind::operand xs[R];
        for (int r = 0; r < R; r++) xs[r] = Kind::take(x[r] + k);
        for (int n = 0; n < N; n++) {
            typename Kind::operand column = Kind::take(w[n] + k);
            for (int r = 0; r < R; r++) acc[r][n] = Kind::add_product(acc[r][n], xs[r], column);
        }
    }
    if (k < end) {
        int left = int(end - k);
        typename Kind::operand xs[R];
        for (int r = 0; r < R; r++) xs[r] = Kind::take(x[r] + k, left);
        for (int n = 0; n < N; n++) {
            typename Kind::operand column = Kind::take(w[n] + k, left);
            for (int r = 0; r < R; r++) acc[r][n] = Kind::add_product(acc[r][n], xs[r], column);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) out[r * N + n] = sum(acc[r][n]);
}

// The parts of K are added like a binary counter carries: (p0 + p1) + (p2 + p3), whatever their number.
template <class Kind, int R, int N>
FN void tile(Rows<typename Kind::scalar> x, Rows<typename Kind::scalar> w, int64_t K, int groups, Ahead& ahead,
             float* out, int stride) {
    constexpr int LEVELS = 16;
    float sums[LEVELS][R * N];
    int64_t width = K / groups;
    for (int g = 0; g < groups; g++) {
        float part[R * N];
        part_tile<Kind, R, N>(x, w, g * width, (g + 1) * width, ahead, part);
        int level = 0;
        for (int carry = g; carry & 1; carry >>= 1, level++)
            for (int i = 0; i < R * N; i++) part[i] = sums[level][i] + part[i];
        for (int i = 0; i < R * N; i++) sums[level][i] = part[i];
    }
    int top = 0;
    while ((1 << top) < groups) top++;
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) out[r * stride + n] = sums[top][r * N + n];
}

template <class Kind, int R>
FN void row_of_tiles(Rows<typename Kind::scalar> x, Rows<typename Kind::scalar> w, int columns, int64_t K, int groups,
                     Ahead& ahead, float* out, int stride) {
    constexpr int N = tile_columns(R);
    int n = 0;
    for (; n + N <= columns; n += N) tile<Kind, R, N>(x, w + n, K, groups, ahead, out + n, stride);
    for (; n + 2 <= columns; n += 2) tile<Kind, R, 2>(x, w + n, K, groups, ahead, out + n, stride);
    if (n < columns) tile<Kind, R, 1>(x, w + n, K, groups, ahead, out + n, stride);
}

template <class Kind, int R>
FN void last_rows(Rows<typename Kind::scalar> x, int rows, Rows<typename Kind::scalar> w, int columns, int64_t K,
                  int groups, Ahead& ahead, float* out, int stride) {
    if (rows == R) {
        row_of_tiles<Kind, R>(x, w, columns, K, groups, ahead, out, stride);
    } else if constexpr (R > 1) {
        last_rows<Kind, R - 1>(x, rows, w, columns, K, groups, ahead, out, stride);
    }
}

template <class Kind>
FN void all_dots(Rows<typename Kind::scalar> x, int rows, Rows<typename Kind::scalar> w, int columns, int64_t K,
                 int groups, Ahead& ahead, float* out, int stride) {
    constexpr int R = MAX_TILE_ROWS, N = tile_columns(R);
    if (rows < R) return last_rows<Kind, R>(x, rows, w, columns, K, groups, ahead, out, stride);
    // The weight rows of a tile stay in the first-level cache while all rows of x pass by.
    for (int n = 0; n < columns; n += N) {
        int here = columns - n < N ? columns - n : N, r = 0;
        for (; r + R <= rows; r += R)
            row_of_tiles<Kind, R>(x + r, w + n, here, K, groups, ahead, out + int64_t(r) * stride + n, stride);
        if (r < rows)
            last_rows<Kind, R>(x + r, rows - r, w + n, here, K, groups, ahead, out + int64_t(r) * stride + n, stride);
    }
}

}  // namespace
}  // namespace kernels
