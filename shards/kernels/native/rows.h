// Loops over one row each, for the compiler to vectorise for a path's instruction set; included by each path_*.cpp.
// They round where transformers does. No standard templates here: they would be shared between instruction sets.
#pragma once

#include <cmath>

#include "kernels.h"

namespace kernels {
namespace {

constexpr int PIECE = 64;

template <class T>
FN void normalise(const T* x, const T* weight, T* out, int64_t D, float eps, bool zero_centred) {
    float inverse = 1.0f / std::sqrt(sum_of_squares(x, D) / float(D) + eps);
    if (zero_centred)
        for (int64_t d = 0; d < D; d++) store(out + d, load(x + d) * inverse * (1.0f + load(weight + d)));
    else
        for (int64_t d = 0; d < D; d++) store(out + d, load(weight + d) * rounded<T>(load(x + d) * inverse));
}

template <class T>
ENTRY void add_norm(const T* x, const T* y, const T* weight, T* sum, T* out, int64_t D, float eps, bool zero_centred) {
    if (y != nullptr) {
        for (int64_t d = 0; d < D; d++) store(sum + d, load(x + d) + load(y + d));
        x = sum;
    }
    normalise(x, weight, out, D, eps, zero_centred);
}

template <class T>
ENTRY void gated_norm(const float* x, const T* gate, const T* weight, T* out, int64_t D, float eps) {
    float inverse = 1.0f / std::sqrt(sum_of_squares(x, D) / float(D) + eps);
    for (int64_t d = 0; d < D; d++) {
        float normed = rounded<T>(load(weight + d) * rounded<T>(x[d] * inverse));
        store(out + d, normed * silu(load(gate + d)));
    }
}

template <class T>
ENTRY void turn_head(const T* x, const T* weight, float eps, bool zero_centred, const float* cos, const float* sin,
                     int64_t D, int64_t R, T* out) {
    if (weight != nullptr)
        normalise(x, weight, out, D, eps, zero_centred);
    else
        for (int64_t d = 0; d < D; d++) out[d] = x[d];
    for (int64_t i = 0; i < R / 2; i++) {
        float a = load(out + i), b = load(out + R / 2 + i);
        float cos_a = rounded<T>(cos[i]), sin_a = rounded<T>(sin[i]);
        float cos_b = rounded<T>(cos[R / 2 + i]), sin_b = rounded<T>(sin[R / 2 + i]);
        store(out + i, rounded<T>(a * cos_a) + rounded<T>(-b * sin_a));
        store(out + R / 2 + i, rounded<T>(b * cos_b) + rounded<T>(a * sin_b));
    }
}

template <class T>
ENTRY void finish_head(const float* acc, float total, const T* gate, int64_t D, T* out) {
    if (gate == nullptr)
        for (int64_t d = 0; d < D; d++) store(out + d, acc[d] / total);
    else
        for (int64_t d = 0; d < D; d++)
            store(out + d, rounded<T>(acc[d] / total) * rounded<T>(sigmoid(load(gate + d))));
}

template <class T>
ENTRY void silu_mul(const T* gate, const T* up, T* out, int64_t I) {
    for (int64_t i = 0; i < I; i++) store(out + i, rounded<T>(silu(load(gate + i))) * load(up + i));
}

template <class T>
ENTRY void softmax(const T* logits, int64_t E, float* p) {
    float top = -INFINITY, lane[LANES] = {};
    for (int64_t e = 0; e < E; e++) {
        p[e] = load(logits + e);
        top = p[e] > top ? p[e] : top;
    }
    for (int64_t e = 0; e < E; e++) p[e] = exp_f32(p[e] - top);
    for (int64_t e = 0; e < E; e++) lane[e % LANES] += p[e];
    float total = sum_lanes(lane);
    for (int64_t e = 0; e < E; e++) p[e] /= total;
}

// The first largest of x, or -1 where one is NaN or the largest is infinite.
ENTRY int64_t best(const float* x, int64_t n) {
    constexpr int64_t CHUNK = 64 * LANES;
    int64_t chunk = -1;
    int32_t nan[LANES] = {};
    float best = -INFINITY;
    for (int64_t first = 0; first < n; first += CHUNK) {
        int64_t end = first + CHUNK < n ? first + CHUNK : n, i = first;
        float lane[LANES], top = -INFINITY;
        for (int l = 0; l < LANES; l++) lane[l] = -INFINITY;
        for (; i + LANES <= end; i += LANES) {
            for (int l = 0; l < LANES; l++) {
                lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
                nan[l] |= x[i + l] != x[i + l];
            }
        }
        for (; i < end; i++) {
            top = x[i] > top ? x[i] : top;
            nan[0] |= x[i] != x[i];
        }
        for (int l = 0; l < LANES; l++) top = lane[l] > top ? lane[l] : top;
        if (top > best) {
            best = top;
            chunk = first;
        }
    }
    for (int l = 0; l < LANES; l++)
        if (nan[l]) return -1;
    if (chunk < 0 || best == INFINITY) return -1;
    while (x[chunk] != best) chunk++;
    return chunk;
}

template <class T>
ENTRY void combine(const T* y, const float* weights, int64_t K, int64_t C, T* out) {
    for (int64_t first = 0; first < C; first += PIECE) {
        int count = int(C - first < PIECE ? C - first : PIECE);
        float total[PIECE] = {};
        for (int64_t k = 0; k < K; k++) {
            const T* from = y + k * C + first;
            float weight = weights[k];
            for (int c = 0; c < count; c++) total[c] += load(from + c) * weight;
        }
        for (int c = 0; c < count; c++) store(out + first + c, total[c]);
    }
}

template <class T>
ENTRY void add_gated(const T* x, const T* shared, const T* gate, int64_t C, T* out) {
    float factor = rounded<T>(sigmoid(load(gate)));
    for (int64_t c = 0; c < C; c++) store(out + c, load(x + c) + rounded<T>(load(shared + c) * factor));
}

template <class T>
ENTRY void widen_row(const T* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i++) to[i] = load(from + i);
}

template <class T>
ENTRY void convolve(const float* window, int64_t channels, const float* taps, int W, float* out) {
    for (int64_t c = 0; c < channels; c++) out[c] = 0.0f;
    for (int w = 0; w < W; w++)
        for (int64_t c = 0; c < channels; c++) out[c] += taps[w * channels + c] * window[w * channels + c];
    for (int64_t c = 0; c < channels; c++) out[c] = rounded<T>(silu(rounded<T>(out[c])));
}

ENTRY void unit(const float* x, int64_t n, float scale, float* out) {
    float inverse = 1.0f / std::sqrt(sum_of_squares(x, n) + 1e-6f);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * inverse * scale;
}

template <class T>
RowLoops<T> row_loops() {
    return {add_norm<T>, gated_norm<T>, turn_head<T>, finish_head<T>, silu_mul<T>,
            softmax<T>,  combine<T>,    add_gated<T>, widen_row<T>,   convolve<T>};
}

// V vectors of state columns from column `at` on through all tokens of the tile; each column is on its own. The sweep
// that writes the state for one token reads it for the next, as it reads back from T: the next call finds the same.
template <class T, int V, bool LAST>
FN void delta_token(const DeltaTile<T>& t, int token, int at, int columns, vec* seen) {
    const float *k = t.k + token * t.Dk, *q = t.q + token * t.Dk, *next_k = k + t.Dk;
    const float* value = t.v + token * t.v_stride + at;
    vec keep = fill(t.decay[token]), change[V], result[V], ahead[V];
    for (int i = 0; i < V; i++) {
        vec v = columns < LANES ? read(value, columns) : read(value + i * LANES);
        change[i] = multiply(subtract(v, multiply(seen[i], keep)), fill(t.beta[token]));
        result[i] = ahead[i] = zero();
    }
    for (int row = 0; row < t.Dk; row++) {
        T* state = t.state + row * t.stride + at;
        vec key = fill(k[row]), query = fill(q[row]), next_key = LAST ? zero() : fill(next_k[row]);
        for (int i = 0; i < V; i++) {
            T* place = state + i * LANES;
            vec old = columns < LANES ? read(place, columns) : read(place);
            vec now = fused(key, change[i], multiply(old, keep));
            now = columns < LANES ? put(place, now, columns) : put(place, now);
            result[i] = fused(query, now, result[i]);
            if (!LAST) ahead[i] = fused(next_key, now, ahead[i]);
        }
    }
    float* out = t.out + token * t.out_stride + at;
    for (int i = 0; i < V; i++) {
        seen[i] = ahead[i];
        if (columns < LANES)
            write(out, result[i], columns);
        else
            write(out + i * LANES, result[i]);
    }
}

template <class T, int V>
FN void delta_columns(const DeltaTile<T>& t, int at, int columns) {
    vec seen[V];
    for (int i = 0; i < V; i++) seen[i] = zero();
    for (int row = 0; row < t.Dk; row++) {
        const T* state = t.state + row * t.stride + at;
        vec key = fill(t.k[row]);
        for (int i = 0; i < V; i++)
            seen[i] = fused(key, columns < LANES ? read(state, columns) : read(state + i * LANES), seen[i]);
    }
    for (int token = 0; token + 1 < t.tokens; token++) delta_token<T, V, false>(t, token, at, columns, seen);
    delta_token<T, V, true>(t, t.tokens - 1, at, columns, seen);
}

template <class T>
ENTRY void delta(const DeltaTile<T>& t) {
    constexpr int V = ATTEND_VECS;
    int at = 0;
    // A single token streams its state from memory: whole rows at once. More tokens stay in the first-level cache.
    if (t.tokens == 1)
        for (; at + 2 * V * LANES <= t.columns; at += 2 * V * LANES) delta_columns<T, 2 * V>(t, at, LANES);
    for (; at + V * LANES <= t.columns; at += V * LANES) delta_columns<T, V>(t, at, LANES);
    for (; at + LANES <= t.columns; at += LANES) delta_columns<T, 1>(t, at, LANES);
    if (at < t.columns) delta_columns<T, 1>(t, at, t.columns - at);
}

}  // namespace
}  // namespace kernels
