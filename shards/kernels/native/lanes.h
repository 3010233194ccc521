// Products by lanes: a vector of partial sums for every (row, weight row), along K; the panels are plain rows.
// Included by each path_*.cpp after its vec_*.h.
#pragma once

#include "tiles.h"

namespace kernels {
namespace {

int64_t plain_width(int64_t K, int) { return K; }

template <class Kind>
ENTRY void multiply(const typename Kind::scalar* panel, int rows, const typename Kind::scalar* w, int columns, int64_t K,
                    int groups, Ahead ahead, float* sums) {
    const typename Kind::scalar *xs[CALL_ROWS], *ws[COLUMNS];
    for (int r = 0; r < rows; r++) xs[r] = panel + r * K;
    for (int n = 0; n < columns; n++) ws[n] = w + n * K;
    all_dots<Kind>(xs, rows, ws, columns, K, groups, ahead, sums, COLUMNS);
}

template <class Kind>
ENTRY void round_to(const typename Kind::scalar* panel, int rows, const typename Kind::scalar* w, int columns, int64_t K,
                    int groups, Ahead ahead, typename Kind::scalar* const* out) {
    float sums[CALL_ROWS * COLUMNS];
    multiply<Kind>(panel, rows, w, columns, K, groups, ahead, sums);
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < columns; n++) store(out[r] + n, sums[r * COLUMNS + n]);
}

template <class Kind>
ENTRY void gate_up(const typename Kind::scalar* panel, int rows, const typename Kind::scalar* gate,
                   const typename Kind::scalar* up, int columns, int64_t K, Ahead ahead, typename Kind::scalar* inner,
                   int64_t I, int64_t at, int) {
    using T = typename Kind::scalar;
    const T *xs[CALL_ROWS], *ws[COLUMNS];
    float sums[CALL_ROWS * COLUMNS];
    for (int r = 0; r < rows; r++) xs[r] = panel + r * K;
    for (int n = 0; n < columns; n++) {
        ws[n] = gate + n * K;
        ws[columns + n] = up + n * K;
    }
    all_dots<Kind>(xs, rows, ws, 2 * columns, K, 1, ahead, sums, COLUMNS);
    for (int r = 0; r < rows; r++) {
        const float *g = sums + r * COLUMNS, *u = g + columns;
        T* to = inner + r * I + at;
        for (int n = 0; n < columns; n++) store(to + n, rounded<T>(silu(rounded<T>(g[n]))) * rounded<T>(u[n]));
    }
}

template <class T>
ENTRY void finish(const float* sums, const T* bias, int n, T* out) {
    if (bias == nullptr)
        for (int i = 0; i < n; i++) store(out + i, sums[i]);
    else
        for (int i = 0; i < n; i++) store(out + i, sums[i] + load(bias + i));
}

template <class Kind>
const Matmul<typename Kind::scalar>* lane_matmul() {
    static const Matmul<typename Kind::scalar> matmul = {
        COLUMNS, plain_width, nullptr, multiply<Kind>, round_to<Kind>, gate_up<Kind>, nullptr, nullptr, nullptr};
    return &matmul;
}

}  // namespace
}  // namespace kernels
