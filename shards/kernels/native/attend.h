// Attention of query rows over one block of keys, written once over a path's `vec`; included by each path_*.cpp.
//
// Both products, queries by keys and weights by values, run down the summed axis with an accumulator for each result:
// lanes are keys in the first and columns in the second, so that nothing is summed across lanes and a row's bits are
// the same in every tile. No standard templates here: they would be shared between instruction sets.
#pragma once

#include <cmath>

#include "kernels.h"

namespace kernels {
namespace {

// c[r, n] = c[r, n] * keep[r] + sum over s of a[r, s] * b[s, n]; without `keep` from zero.
template <class Kind, int R, int N>
FN void product_tile(const float* a, int a_stride, const float* b, int b_stride, int steps, const float* keep, float* c,
                     int c_stride) {
    vec acc[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++)
            acc[r][n] = keep == nullptr ? zero() : multiply(read(c + r * c_stride + n * LANES), fill(keep[r]));
    for (int s = 0; s < steps; s++) {
        vec columns[N];
        for (int n = 0; n < N; n++) columns[n] = read(b + s * b_stride + n * LANES);
        for (int r = 0; r < R; r++) {
            vec x = fill(a[r * a_stride + s]);
            for (int n = 0; n < N; n++) acc[r][n] = Kind::add_product(acc[r][n], x, columns[n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) write(c + r * c_stride + n * LANES, acc[r][n]);
}

template <class Kind, int R>
FN void product_rows(const float* a, int a_stride, const float* b, int b_stride, int steps, const float* keep, float* c,
                     int c_stride, int vectors) {
    constexpr int N = ATTEND_VECS;
    int n = 0;
    for (; n + N <= vectors; n += N)
        product_tile<Kind, R, N>(a, a_stride, b + n * LANES, b_stride, steps, keep, c + n * LANES, c_stride);
    for (; n < vectors; n++)
        product_tile<Kind, R, 1>(a, a_stride, b + n * LANES, b_stride, steps, keep, c + n * LANES, c_stride);
}

template <class Kind, int R>
FN void product_last(int rows, const float* a, int a_stride, const float* b, int b_stride, int steps, const float* keep,
                     float* c, int c_stride, int vectors) {
    if (rows == R) {
        product_rows<Kind, R>(a, a_stride, b, b_stride, steps, keep, c, c_stride, vectors);
    } else if constexpr (R > 1) {
        product_last<Kind, R - 1>(rows, a, a_stride, b, b_stride, steps, keep, c, c_stride, vectors);
    }
}

// Operands as float32, whatever they are stored as.
template <class T>
struct WidenedKeys {
    using scalar = T;
    // Items that share a float's place; rows of a product at once; keys to which a block of values is filled up.
    static constexpr int PAIR = 1, ROWS = ATTEND_ROWS, KEY_STEP = 1;
    static FN vec items(const T* p) { return read(p); }
    static FN vec items(const T* p, int n) { return read(p, n); }
    static FN vec add_product(vec acc, vec x, vec y) { return fused(x, y, acc); }
    static FN void join(const vec* x, float* out) { write(out, x[0]); }
    static FN void weights(const float* p, float* out) {
        for (int j = 0; j < KEYS; j += LANES) write(out + j, read(p + j));
    }
    // `rows` <= ROWS rows.
    static FN void product(int rows, const float* a, int a_stride, const float* b, int b_stride, int steps,
                           const float* keep, float* c, int c_stride, int vectors) {
        product_last<WidenedKeys, ROWS>(rows, a, a_stride, b, b_stride, steps, keep, c, c_stride, vectors);
    }
};

template <class Kind>
FN int steps_of(int D) {
    return (D + Kind::PAIR - 1) / Kind::PAIR;
}

template <class Kind>
ENTRY void take_queries(Rows<typename Kind::scalar> q, const Attending& a) {
    constexpr int WIDTH = LANES * Kind::PAIR;
    for (int r = 0; r < a.rows; r++) {
        float* to = a.queries + r * a.stride;
        int d = 0;
        for (; d + WIDTH <= a.D; d += WIDTH) write(to + d / Kind::PAIR, Kind::items(q[r] + d));
        if (d < a.D) write(to + d / Kind::PAIR, Kind::items(q[r] + d, a.D - d));
    }
}

// Keys side by side for every step of D -> [steps, KEYS].
template <class Kind>
FN void take_keys(Rows<typename Kind::scalar> k, int vectors, const Attending& a) {
    constexpr int WIDTH = LANES * Kind::PAIR;
    for (int v = 0; v < vectors; v++) {
        Rows<typename Kind::scalar> some = k + v * LANES;
        for (int d = 0; d < a.D; d += WIDTH) {
            vec x[LANES];
            if (d + WIDTH <= a.D)
                for (int j = 0; j < LANES; j++) x[j] = Kind::items(some[j] + d);
            else
                for (int j = 0; j < LANES; j++) x[j] = Kind::items(some[j] + d, a.D - d);
            transpose(x);
            float* to = a.keys + d / Kind::PAIR * KEYS + v * LANES;
            for (int s = 0; s < LANES; s++) write(to + s * KEYS, x[s]);
        }
    }
}

// Values by key (or pair of keys) -> [KEYS / PAIR, stride].
template <class Kind>
FN void take_values(Rows<typename Kind::scalar> v, int keys, const Attending& a) {
    constexpr int WIDTH = LANES * Kind::PAIR;
    for (int j = 0; j < keys; j += Kind::PAIR) {
        float* to = a.values + j / Kind::PAIR * a.stride;
        for (int d = 0; d < a.D; d += WIDTH) {
            vec x[Kind::PAIR];
            for (int i = 0; i < Kind::PAIR; i++)
                x[i] = d + WIDTH <= a.D ? Kind::items(v[j + i] + d) : Kind::items(v[j + i] + d, a.D - d);
            Kind::join(x, to + d);
        }
    }
}

// Scores to weights e^(p * scale - top), zeros behind count; raises *top, brings *total up to date; returns the factor
// by which earlier weights shrink.
FN float soften(float* p, int count, float scale, float* top, float* total) {
    if (count <= 0) {
        for (int j = 0; j < KEYS; j++) p[j] = 0.0f;
        return 1.0f;
    }
    float lane[LANES];
    for (int j = count; j < KEYS; j++) p[j] = -INFINITY;
    for (int j = 0; j < KEYS; j++) p[j] *= scale;
    for (int l = 0; l < LANES; l++) lane[l] = *top;
    for (int j = 0; j < KEYS; j += LANES)
        for (int l = 0; l < LANES; l++) lane[l] = p[j + l] > lane[l] ? p[j + l] : lane[l];
    float highest = lane[0];
    for (int l = 1; l < LANES; l++) highest = lane[l] > highest ? lane[l] : highest;
    for (int j = 0; j < KEYS; j++) p[j] = exp_f32(p[j] - highest);
    for (int j = count; j < KEYS; j++) p[j] = 0.0f;
    for (int l = 0; l < LANES; l++) lane[l] = p[l];
    for (int j = LANES; j < KEYS; j += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += p[j + l];
    float keep = exp_f32(*top - highest);
    *total = *total * keep + sum_lanes(lane);
    *top = highest;
    return keep;
}

template <class Kind>
ENTRY void attend(Rows<typename Kind::scalar> k, Rows<typename Kind::scalar> v, int keys, Attending& a) {
    constexpr int R = Kind::ROWS, WEIGHTS = KEYS / Kind::PAIR;
    int vectors = (keys + LANES - 1) / LANES;
    take_keys<Kind>(k, vectors, a);
    take_values<Kind>(v, (keys + Kind::KEY_STEP - 1) / Kind::KEY_STEP * Kind::KEY_STEP, a);
    for (int r = 0; r < a.rows; r += R) {
        int rows = a.rows - r < R ? a.rows - r : R, seen = 0;
        for (int i = 0; i < rows; i++) seen = a.counts[r + i] > seen ? a.counts[r + i] : seen;
        if (seen == 0) continue;
        float *scores = a.scores, *weights = a.weights;
        Kind::product(rows, a.queries + r * a.stride, a.stride, a.keys, KEYS, steps_of<Kind>(a.D), nullptr, scores,
                      KEYS, vectors);
        for (int i = 0; i < rows; i++) {
            float* p = scores + i * KEYS;
            a.keep[r + i] = soften(p, a.counts[r + i], a.scale, a.top + r + i, a.total + r + i);
            Kind::weights(p, weights + i * WEIGHTS);
        }
        Kind::product(rows, weights, WEIGHTS, a.values, a.stride, (seen + Kind::PAIR - 1) / Kind::PAIR, a.keep + r,
                      a.acc + r * a.stride, a.stride, a.stride / LANES);
    }
}

ENTRY void merge(const Attending& into, const Attending& range) {
    for (int r = 0; r < into.rows; r++) {
        float highest = into.top[r] > range.top[r] ? into.top[r] : range.top[r];
        float kept = exp_f32(into.top[r] - highest), taken = exp_f32(range.top[r] - highest);
        into.top[r] = highest;
        into.total[r] = into.total[r] * kept + range.total[r] * taken;
        float* to = into.acc + r * into.stride;
        const float* from = range.acc + r * into.stride;
        for (int d = 0; d < into.stride; d += LANES)
            write(to + d, fused(read(from + d), fill(taken), multiply(read(to + d), fill(kept))));
    }
}

}  // namespace
}  // namespace kernels
