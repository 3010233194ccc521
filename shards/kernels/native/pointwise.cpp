// Norms, activations, rotary, routing: everything that looks at one row at a time. Rounds where transformers does.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace kernels {
namespace {

template <class Row>
void for_rows(int64_t rows, int64_t width, int threads, const Row& row) {
#pragma omp parallel for num_threads(threads_for(rows * width, threads))
    for (int64_t r = 0; r < rows; r++) row(r);
}

enum Norm { PLAIN = 0, ZERO_CENTRED = 1, GATED = 2 };

template <class T>
void norm_row(const T* x, const T* gate, const T* weight, T* out, int64_t D, float eps, int kind) {
    float inverse = 1.0f / std::sqrt(sum_of_squares(x, D) / float(D) + eps);
    if (kind == ZERO_CENTRED) {
        for (int64_t d = 0; d < D; d++) store(out + d, load(x + d) * inverse * (1.0f + load(weight + d)));
    } else if (kind == PLAIN) {
        for (int64_t d = 0; d < D; d++) store(out + d, load(weight + d) * rounded<T>(load(x + d) * inverse));
    } else {
        for (int64_t d = 0; d < D; d++) {
            float normed = rounded<T>(load(weight + d) * rounded<T>(load(x + d) * inverse));
            store(out + d, normed * silu(load(gate + d)));
        }
    }
}

template <class T>
void norm(int threads, const void* x, const void* gate, const void* weight, void* out, int64_t rows, int64_t D,
          float eps, int kind) {
    for_rows(rows, D, threads, [=](int64_t r) {
        norm_row((const T*)x + r * D, (const T*)gate + r * D, (const T*)weight, (T*)out + r * D, D, eps, kind);
    });
}

template <class T>
void silu_mul(int threads, const void* gate_up, void* out, int64_t rows, int64_t I) {
    for_rows(rows, I * 4, threads, [=](int64_t r) {
        const T *gate = (const T*)gate_up + r * 2 * I, *up = gate + I;
        T* to = (T*)out + r * I;
        for (int64_t i = 0; i < I; i++) store(to + i, rounded<T>(silu(load(gate + i))) * load(up + i));
    });
}

// gate has D columns, or one.
template <class T>
void sigmoid_mul(int threads, const void* x, const void* gate, void* out, int64_t rows, int64_t D, int64_t gates) {
    for_rows(rows, D * 4, threads, [=](int64_t r) {
        const T *from = (const T*)x + r * D, *at = (const T*)gate + r * gates;
        T* to = (T*)out + r * D;
        if (gates == 1) {
            float factor = rounded<T>(sigmoid(load(at)));
            for (int64_t d = 0; d < D; d++) store(to + d, load(from + d) * factor);
        } else {
            for (int64_t d = 0; d < D; d++) store(to + d, load(from + d) * rounded<T>(sigmoid(load(at + d))));
        }
    });
}

template <class T>
void rotary(int threads, const void* x, const float* cos, const float* sin, void* out, int64_t rows, int64_t H,
            int64_t D, int64_t R) {
    for_rows(rows, H * D, threads, [=](int64_t t) {
        const float *c = cos + t * R, *s = sin + t * R;
        for (int64_t h = 0; h < H; h++) {
            const T *low = (const T*)x + (t * H + h) * D, *high = low + R / 2;
            T *to = (T*)out + (t * H + h) * D, *to_high = to + R / 2;
            for (int64_t i = 0; i < R / 2; i++) {
                float a = load(low + i), b = load(high + i);
                float cos_a = rounded<T>(c[i]), sin_a = rounded<T>(s[i]);
                float cos_b = rounded<T>(c[R / 2 + i]), sin_b = rounded<T>(s[R / 2 + i]);
                store(to + i, rounded<T>(a * cos_a) + rounded<T>(-b * sin_a));
                store(to_high + i, rounded<T>(b * cos_b) + rounded<T>(a * sin_b));
            }
            std::copy(low + R, low + D, to + R);
        }
    });
}

template <class T>
void softmax(const T* logits, int64_t E, float* p) {
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
void route(int threads, const void* logits, float* weights, int64_t* ids, int64_t rows, int64_t E, int64_t K,
           bool renormalize) {
    for_rows(rows, E * 4, threads, [=](int64_t t) {
        std::vector<float> p(size_t(E), 0.0f);
        float* to = weights + t * K;
        softmax((const T*)logits + t * E, E, p.data());
        pick(p.data(), E, K, to, ids + t * K);
        if (!renormalize) return;
        float total = 0.0f;
        for (int64_t k = 0; k < K; k++) total += to[k];
        for (int64_t k = 0; k < K; k++) to[k] /= total;
    });
}

template <class From, class To>
void combine(int threads, const void* y, const float* weights, void* out, int64_t rows, int64_t K, int64_t C) {
    for_rows(rows, K * C, threads, [=](int64_t t) {
        std::vector<float> total(size_t(C), 0.0f);
        for (int64_t k = 0; k < K; k++) {
            const From* from = (const From*)y + (t * K + k) * C;
            float weight = weights[t * K + k];
            for (int64_t c = 0; c < C; c++) total[size_t(c)] += load(from + c) * weight;
        }
        for (int64_t c = 0; c < C; c++) store((To*)out + t * C + c, total[size_t(c)]);
    });
}

}  // namespace
}  // namespace kernels

using kernels::bf16;
using kernels::BFLOAT16;

KERNELS_EXPORT void kernels_norm(int threads, int dtype, const void* x, const void* gate, const void* weight, void* out,
                                 int64_t rows, int64_t D, float eps, int kind) {
    auto run = dtype == BFLOAT16 ? kernels::norm<bf16> : kernels::norm<float>;
    run(threads, x, gate, weight, out, rows, D, eps, kind);
}

KERNELS_EXPORT void kernels_silu_mul(int threads, int dtype, const void* gate_up, void* out, int64_t rows, int64_t I) {
    auto run = dtype == BFLOAT16 ? kernels::silu_mul<bf16> : kernels::silu_mul<float>;
    run(threads, gate_up, out, rows, I);
}

KERNELS_EXPORT void kernels_sigmoid_mul(int threads, int dtype, const void* x, const void* gate, void* out,
                                        int64_t rows, int64_t D, int64_t gates) {
    auto run = dtype == BFLOAT16 ? kernels::sigmoid_mul<bf16> : kernels::sigmoid_mul<float>;
    run(threads, x, gate, out, rows, D, gates);
}

KERNELS_EXPORT void kernels_rotary(int threads, int dtype, const void* x, const float* cos, const float* sin, void* out,
                                   int64_t rows, int64_t H, int64_t D, int64_t R) {
    auto run = dtype == BFLOAT16 ? kernels::rotary<bf16> : kernels::rotary<float>;
    run(threads, x, cos, sin, out, rows, H, D, R);
}

KERNELS_EXPORT void kernels_route(int threads, int dtype, const void* logits, float* weights, int64_t* ids,
                                  int64_t rows, int64_t E, int64_t K, int renormalize) {
    auto run = dtype == BFLOAT16 ? kernels::route<bf16> : kernels::route<float>;
    run(threads, logits, weights, ids, rows, E, K, renormalize != 0);
}

KERNELS_EXPORT void kernels_combine(int threads, int from, int to, const void* y, const float* weights, void* out,
                                    int64_t rows, int64_t K, int64_t C) {
    auto from_bf16 = to == BFLOAT16 ? kernels::combine<bf16, bf16> : kernels::combine<bf16, float>;
    auto from_float = to == BFLOAT16 ? kernels::combine<float, bf16> : kernels::combine<float, float>;
    (from == BFLOAT16 ? from_bf16 : from_float)(threads, y, weights, out, rows, K, C);
}
