// The gated delta net: causal convolution, gates, and the rule itself, always token by token.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace kernels {
namespace {

constexpr int CHANNELS = 64;
constexpr int MAX_TAPS = 16;

// Columns or channels [first, first + count) of sequence s (and value head `head`).
struct SequenceTask {
    int64_t sequence, head, first;
    int count;
};

std::vector<SequenceTask> cut(const int64_t* query_start, int64_t S, int64_t heads, int64_t columns, int step) {
    std::vector<SequenceTask> all;
    for (int64_t s = 0; s < S; s++)
        for (int64_t h = 0; h < heads && query_start[s] < query_start[s + 1]; h++)
            for (int64_t c = 0; c < columns; c += step)
                all.push_back({s, h, c, int(std::min<int64_t>(step, columns - c))});
    return all;
}

template <class T>
struct Convolution {
    const T* x;
    const T* weight;
    T* state;
    const int64_t* slots;
    const int64_t* query_start;
    const bool* fresh;
    const bool* advance;  // null: every sequence
    T* out;
    int64_t C;
    int W;

    // `seen` is a ring of the last W inputs, by time modulo W, channels inside.
    void task(const SequenceTask& a) const {
        float seen[MAX_TAPS][CHANNELS], taps[MAX_TAPS][CHANNELS];
        T* kept = state + (slots[a.sequence] * C + a.first) * (W - 1);
        for (int c = 0; c < a.count; c++) {
            for (int w = 0; w < W; w++) taps[w][c] = load(weight + (a.first + c) * W + w);
            for (int w = 0; w < W - 1; w++) seen[w][c] = fresh[a.sequence] ? 0.0f : load(kept + c * (W - 1) + w);
        }
        int64_t time = W - 1;
        for (int64_t t = query_start[a.sequence]; t < query_start[a.sequence + 1]; t++, time++) {
            float* newest = seen[time % W];
            for (int c = 0; c < a.count; c++) newest[c] = load(x + t * C + a.first + c);
            float sum[CHANNELS] = {};
            for (int w = 0; w < W; w++) {
                const float *tap = taps[w], *input = seen[(time + 1 + w) % W];
                for (int c = 0; c < a.count; c++) sum[c] += tap[c] * input[c];
            }
            for (int c = 0; c < a.count; c++) store(out + t * C + a.first + c, silu(rounded<T>(sum[c])));
        }
        if (advance && !advance[a.sequence]) return;
        for (int c = 0; c < a.count; c++)
            for (int w = 0; w < W - 1; w++) store(kept + c * (W - 1) + w, seen[(time + 1 + w) % W][c]);
    }

    void run(int64_t S, int threads) const {
        std::vector<SequenceTask> all = cut(query_start, S, 1, C, CHANNELS);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(query_start[S] * C * W, threads))
        for (size_t i = 0; i < all.size(); i++) task(all[i]);
    }
};

// x / |x| * scale
template <class T>
void unit(const T* x, int64_t n, float scale, float* out) {
    float inverse = 1.0f / std::sqrt(sum_of_squares(x, n) + 1e-6f);
    for (int64_t i = 0; i < n; i++) out[i] = load(x + i) * inverse * scale;
}

template <class T>
struct DeltaRule {
    const Path& path;
    const T* q;
    const T* k;
    const T* v;
    const float* beta;
    const float* g;
    float* state;
    const int64_t* slots;
    const int64_t* query_start;
    const bool* fresh;
    const bool* advance;  // null: every sequence
    T* out;
    int64_t K, V, Dk, Dv;

    void task(const SequenceTask& a) const {
        float* columns = state + (slots[a.sequence] * V + a.head) * Dk * Dv + a.first;
        int64_t stride = Dv;
        std::vector<float> scratch;
        if (advance && !advance[a.sequence]) {
            scratch.resize(size_t(Dk * a.count));
            for (int64_t row = 0; row < Dk; row++)
                std::copy_n(columns + row * Dv, a.count, scratch.data() + row * a.count);
            columns = scratch.data(), stride = a.count;
        }
        if (fresh[a.sequence])
            for (int64_t row = 0; row < Dk; row++) std::fill_n(columns + row * stride, a.count, 0.0f);
        std::vector<float> key(size_t(Dk), 0.0f), query(size_t(Dk), 0.0f);
        float value[STATE_COLUMNS], result[STATE_COLUMNS], scale = 1.0f / std::sqrt(float(Dk));
        int64_t key_head = a.head / (V / K);
        for (int64_t t = query_start[a.sequence]; t < query_start[a.sequence + 1]; t++) {
            unit(q + (t * K + key_head) * Dk, Dk, scale, query.data());
            unit(k + (t * K + key_head) * Dk, Dk, 1.0f, key.data());
            int64_t at = (t * V + a.head) * Dv + a.first;
            for (int c = 0; c < a.count; c++) value[c] = load(v + at + c);
            path.delta(columns, stride, int(Dk), a.count, key.data(), query.data(), value, beta[t * V + a.head],
                       exp_f32(g[t * V + a.head]), result);
            for (int c = 0; c < a.count; c++) store(out + at + c, result[c]);
        }
    }

    void run(int64_t S, int threads) const {
        std::vector<SequenceTask> all = cut(query_start, S, V, Dv, STATE_COLUMNS);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(query_start[S] * V * Dk * Dv / 4, threads))
        for (size_t i = 0; i < all.size(); i++) task(all[i]);
    }
};

template <class T>
void convolve(int threads, const void* x, const void* weight, void* state, const int64_t* slots,
              const int64_t* query_start, const bool* fresh, const bool* advance, void* out, int64_t S, int64_t C,
              int W) {
    Convolution<T>{(const T*)x, (const T*)weight, (T*)state, slots, query_start, fresh, advance, (T*)out, C, W}.run(
        S, threads);
}

template <class T>
void delta_rule(int path, int threads, const void* q, const void* k, const void* v, const float* beta, const float* g,
                float* state, const int64_t* slots, const int64_t* query_start, const bool* fresh, const bool* advance,
                void* out, int64_t S, int64_t K, int64_t V, int64_t Dk, int64_t Dv) {
    DeltaRule<T>{*find_path(path), (const T*)q, (const T*)k, (const T*)v, beta, g, state, slots, query_start, fresh,
                 advance, (T*)out, K, V, Dk, Dv}
        .run(S, threads);
}

template <class T>
void gates(const T* b, const T* a, const float* a_log, const float* dt_bias, float* beta, float* g, int64_t rows,
           int64_t V) {
    for (int64_t i = 0; i < rows * V; i++) {
        float x = load(a + i) + dt_bias[i % V];
        beta[i] = rounded<T>(sigmoid(load(b + i)));
        // Like torch: above 20 softplus(x) is x.
        g[i] = -exp_f32(a_log[i % V]) * (x > 20.0f ? x : std::log1p(exp_f32(x)));
    }
}

}  // namespace
}  // namespace kernels

KERNELS_EXPORT void kernels_causal_conv(int threads, int dtype, const void* x, const void* weight, void* state,
                                        const int64_t* slots, const int64_t* query_start, const bool* fresh,
                                        const bool* advance, void* out, int64_t S, int64_t C, int W) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::convolve<kernels::bf16> : kernels::convolve<float>;
    run(threads, x, weight, state, slots, query_start, fresh, advance, out, S, C, W);
}

KERNELS_EXPORT void kernels_delta_rule(int path, int threads, int dtype, const void* q, const void* k, const void* v,
                                       const float* beta, const float* g, float* state, const int64_t* slots,
                                       const int64_t* query_start, const bool* fresh, const bool* advance, void* out,
                                       int64_t S, int64_t K, int64_t V, int64_t Dk, int64_t Dv) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::delta_rule<kernels::bf16> : kernels::delta_rule<float>;
    run(path, threads, q, k, v, beta, g, state, slots, query_start, fresh, advance, out, S, K, V, Dk, Dv);
}

KERNELS_EXPORT void kernels_delta_gates(int dtype, const void* b, const void* a, const float* a_log,
                                        const float* dt_bias, float* beta, float* g, int64_t rows, int64_t V) {
    using namespace kernels;
    if (dtype == BFLOAT16)
        gates((const bf16*)b, (const bf16*)a, a_log, dt_bias, beta, g, rows, V);
    else
        gates((const float*)b, (const float*)a, a_log, dt_bias, beta, g, rows, V);
}
