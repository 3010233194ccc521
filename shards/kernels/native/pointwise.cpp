// Norms, activations, routing, weighted sums: everything that looks at one row at a time.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "replay.h"
#include "team.h"

namespace kernels {
namespace {

template <class Row>
void for_rows(int64_t rows, int64_t width, int threads, const Row& row) {
    for_each(rows, crew_for(rows * width, threads), row);
}

template <class T>
void add_norm(const Path& path, int threads, const T* x, const T* y, const T* weight, T* sum, T* out, int64_t rows,
              int64_t D, float eps, bool zero_centred) {
    for_rows(rows, D, threads, [=, &path](int64_t r) {
        int64_t at = r * D;
        path.rows(x).add_norm(x + at, y == nullptr ? y : y + at, weight, sum + at, out + at, D, eps, zero_centred);
    });
}

template <class T>
void silu_mul(const Path& path, int threads, const T* gate_up, T* out, int64_t rows, int64_t I, int64_t stride) {
    for_rows(rows, I * 2, threads, [=, &path](int64_t r) {
        const T* gate = gate_up + r * stride;
        path.rows(gate).silu_mul(gate, gate + I, out + r * I, I);
    });
}

// Best first; of equals, the lower id first.
void pick(const float* p, int64_t E, int64_t K, float* weights, int64_t* ids) {
    int64_t held = 0;
    for (int64_t e = 0; e < E; e++) {
        if (held == K && !(p[e] > weights[K - 1])) continue;
        int64_t at = held < K ? held++ : K - 1;
        for (; at > 0 && p[e] > weights[at - 1]; at--) {
            weights[at] = weights[at - 1];
            ids[at] = ids[at - 1];
        }
        weights[at] = p[e];
        ids[at] = e;
    }
}

template <class T>
void route(const Path& path, int threads, const T* logits, float* weights, int64_t* ids, int64_t rows, int64_t E,
           int64_t K, int64_t stride, bool renormalize) {
    for_rows(rows, E * 4, threads, [=, &path](int64_t t) {
        std::vector<float> p(size_t(E), 0.0f);
        float* to = weights + t * K;
        path.rows(logits).softmax(logits + t * stride, E, p.data());
        pick(p.data(), E, K, to, ids + t * K);
        if (!renormalize) return;
        float total = 0.0f;
        for (int64_t k = 0; k < K; k++) total += to[k];
        for (int64_t k = 0; k < K; k++) to[k] /= total;
    });
}

template <class T>
void combine(const Path& path, int threads, const T* y, const float* weights, T* out, int64_t rows, int64_t K, int64_t C) {
    for_rows(rows, K * C / 4, threads,
             [=, &path](int64_t t) { path.rows(y).combine(y + t * K * C, weights + t * K, K, C, out + t * C); });
}

template <class T>
void add_gated(const Path& path, int threads, const T* x, const T* shared, const T* gate, T* out, int64_t rows,
               int64_t C, int64_t gate_stride) {
    for_rows(rows, C, threads, [=, &path](int64_t t) {
        path.rows(x).add_gated(x + t * C, shared + t * C, gate + t * gate_stride, C, out + t * C);
    });
}

}  // namespace
}  // namespace kernels

using namespace kernels;

KERNELS_EXPORT void kernels_add_norm(int path, int threads, int dtype, const void* x, const void* y, const void* weight,
                                     void* sum, void* out, int64_t rows, int64_t D, float eps, int zero_centred) {
    if (dtype == BFLOAT16)
        add_norm(*find_path(path), threads, (const bf16*)x, (const bf16*)y, (const bf16*)weight, (bf16*)sum, (bf16*)out,
                 rows, D, eps, zero_centred != 0);
    else
        add_norm(*find_path(path), threads, (const float*)x, (const float*)y, (const float*)weight, (float*)sum,
                 (float*)out, rows, D, eps, zero_centred != 0);
}

KERNELS_EXPORT void kernels_silu_mul(int path, int threads, int dtype, const void* gate_up, void* out, int64_t rows,
                                     int64_t I, int64_t stride) {
    if (dtype == BFLOAT16)
        silu_mul(*find_path(path), threads, (const bf16*)gate_up, (bf16*)out, rows, I, stride);
    else
        silu_mul(*find_path(path), threads, (const float*)gate_up, (float*)out, rows, I, stride);
}

KERNELS_EXPORT void kernels_route(int path, int threads, int dtype, const void* logits, float* weights, int64_t* ids,
                                  int64_t rows, int64_t E, int64_t K, int64_t stride, int renormalize) {
    if (dtype == BFLOAT16)
        route(*find_path(path), threads, (const bf16*)logits, weights, ids, rows, E, K, stride, renormalize != 0);
    else
        route(*find_path(path), threads, (const float*)logits, weights, ids, rows, E, K, stride, renormalize != 0);
}

KERNELS_EXPORT void kernels_combine(int path, int threads, int dtype, const void* y, const float* weights, void* out,
                                    int64_t rows, int64_t K, int64_t C) {
    if (dtype == BFLOAT16)
        combine(*find_path(path), threads, (const bf16*)y, weights, (bf16*)out, rows, K, C);
    else
        combine(*find_path(path), threads, (const float*)y, weights, (float*)out, rows, K, C);
}

KERNELS_EXPORT void kernels_add_gated(int path, int threads, int dtype, const void* x, const void* shared,
                                      const void* gate, void* out, int64_t rows, int64_t C, int64_t gate_stride) {
    if (dtype == BFLOAT16)
        add_gated(*find_path(path), threads, (const bf16*)x, (const bf16*)shared, (const bf16*)gate, (bf16*)out, rows,
                  C, gate_stride);
    else
        add_gated(*find_path(path), threads, (const float*)x, (const float*)shared, (const float*)gate, (float*)out,
                  rows, C, gate_stride);
}

KERNELS_EXPORT void kernels_best_tokens(int path, int threads, const float* logits, int64_t* tokens, int64_t rows,
                                        int64_t V, int64_t stride) {
    const Path& loops = *find_path(path);
    for_rows(rows, V, threads, [=, &loops](int64_t r) { tokens[r] = loops.best(logits + r * stride, V); });
}

KERNELS_REPLAY(kernels_add_norm)
KERNELS_REPLAY(kernels_silu_mul)
KERNELS_REPLAY(kernels_route)
KERNELS_REPLAY(kernels_combine)
KERNELS_REPLAY(kernels_add_gated)
KERNELS_REPLAY(kernels_best_tokens)
