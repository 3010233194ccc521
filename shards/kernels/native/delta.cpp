// The gated delta net between its two projections: causal convolution, gates, the rule (always token by token) and the
// gated norm. A task takes the heads of one key head of one sequence, a piece of TOKENS tokens at a time.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "replay.h"
#include "team.h"

namespace kernels {
namespace {

constexpr int64_t TOKENS = 32;

struct DeltaTask {
    int64_t sequence, key_head;
};

// T is what rows and weights are held in, H what states are.
template <class T, class H>
struct DeltaNet {
    const Path& path;
    const T* x;  // rows [q | k | v | z | b | a]
    const T* weight;
    T* conv_state;
    const float* a_log;
    const float* dt_bias;
    const T* norm;
    H* state;
    const int64_t* slots;
    const int64_t* query_start;
    const bool* fresh;
    const bool* advance;  // null: every sequence
    T* out;
    int64_t S, K, V, Dk, Dv;
    int W;
    float eps;

    int64_t share() const { return V / K; }
    int64_t all_channels() const { return 2 * K * Dk + V * Dv; }
    int64_t row_size() const { return all_channels() + V * Dv + 2 * V; }
    int64_t channels() const { return 2 * Dk + share() * Dv; }
    bool advances(int64_t s) const { return advance == nullptr || advance[s]; }

    // Calls part(first of all channels, first of the task's, count) for q, k and v of a key head.
    template <class Part>
    void parts(int64_t key_head, const Part& part) const {
        part(key_head * Dk, int64_t(0), Dk);
        part((K + key_head) * Dk, Dk, Dk);
        part(2 * K * Dk + key_head * share() * Dv, 2 * Dk, share() * Dv);
    }

    // A thread's buffers.
    struct Room {
        std::vector<float> taps, window, mixed, key, query, result;
        std::vector<H> scratch;

        explicit Room(const DeltaNet& net)
            : taps(size_t(net.W * net.channels())),
              window(size_t((net.W - 1 + TOKENS) * net.channels())),
              mixed(size_t(TOKENS * net.channels())),
              key(size_t(TOKENS * net.Dk)),
              query(size_t(TOKENS * net.Dk)),
              result(size_t(TOKENS * net.share() * net.Dv)) {}
    };

    void begin(const DeltaTask& a, Room& room) const {
        int64_t n = channels(), kept = W - 1;
        parts(a.key_head, [&](int64_t from, int64_t to, int64_t count) {
            const T* before = conv_state + (slots[a.sequence] * all_channels() + from) * kept;
            for (int64_t c = 0; c < count; c++) {
                for (int w = 0; w < W; w++) room.taps[size_t(w * n + to + c)] = load(weight + (from + c) * W + w);
                for (int w = 0; w < kept; w++)
                    room.window[size_t(w * n + to + c)] = fresh[a.sequence] ? 0.0f : load(before + c * kept + w);
            }
        });
    }

    // The last W - 1 inputs go to the front of the window; `tokens` rows lie behind those that were there.
    void roll(int64_t tokens, Room& room) const {
        int64_t n = channels();
        std::copy_n(room.window.begin() + tokens * n, (W - 1) * n, room.window.begin());
    }

    void end(const DeltaTask& a, const Room& room) const {
        int64_t n = channels(), kept = W - 1;
        parts(a.key_head, [&](int64_t from, int64_t to, int64_t count) {
            T* after = conv_state + (slots[a.sequence] * all_channels() + from) * kept;
            for (int64_t c = 0; c < count; c++)
                for (int w = 0; w < kept; w++) store(after + c * kept + w, room.window[size_t(w * n + to + c)]);
        });
    }

    // Convolution of a piece; q and k normalised.
    void mix(const DeltaTask& a, int64_t first, int64_t tokens, Room& room) const {
        int64_t n = channels();
        float scale = 1.0f / std::sqrt(float(Dk));
        for (int64_t t = 0; t < tokens; t++) {
            float *input = room.window.data() + (W - 1 + t) * n, *mixed = room.mixed.data() + t * n;
            const T* row = x + (first + t) * row_size();
            parts(a.key_head,
                  [&](int64_t from, int64_t to, int64_t count) { path.rows(x).widen(row + from, count, input + to); });
            path.rows(x).convolve(input - (W - 1) * n, n, room.taps.data(), W, mixed);
            path.unit(mixed, Dk, scale, room.query.data() + t * Dk);
            path.unit(mixed + Dk, Dk, 1.0f, room.key.data() + t * Dk);
        }
    }

    // The rule and the gated norm of a piece, for one of the key head's value heads.
    void advance_head(int64_t head, int64_t index, H* held, int64_t first, int64_t tokens, Room& room) const {
        float beta[TOKENS], decay[TOKENS];
        float* result = room.result.data() + index * Dv;
        int64_t stride = channels(), out_stride = share() * Dv;
        for (int64_t t = 0; t < tokens; t++) {
            const T *b = x + (first + t) * row_size() + all_channels() + V * Dv + head, *a = b + V;
            float step = load(a) + dt_bias[head];
            beta[t] = rounded<T>(sigmoid(load(b)));
            // Like torch: above 20 softplus(x) is x.
            decay[t] = exp_f32(-exp_f32(a_log[head]) * (step > 20.0f ? step : std::log1p(exp_f32(step))));
        }
        path.delta(DeltaTile<H>{held, Dv, stride, out_stride, int(Dk), int(Dv), int(tokens), room.key.data(), room.query.data(),
                    room.mixed.data() + 2 * Dk + index * Dv, beta, decay, result});
        for (int64_t t = 0; t < tokens; t++) {
            const T* gate = x + (first + t) * row_size() + all_channels() + head * Dv;
            T* to = out + ((first + t) * V + head) * Dv;
            path.rows(x).gated_norm(result + t * out_stride, gate, norm, to, Dv, eps);
        }
    }

    // States of the task's value heads; a copy where the sequence is not to advance.
    H* find_state(const DeltaTask& a, Room& room) const {
        int64_t size = share() * Dk * Dv;
        H* held = state + (slots[a.sequence] * V + a.key_head * share()) * Dk * Dv;
        if (!advances(a.sequence)) {
            room.scratch.assign(held, held + size);
            held = room.scratch.data();
        }
        if (fresh[a.sequence]) std::fill_n(held, size, H(0));
        return held;
    }

    void task(const DeltaTask& a, Room& room) const {
        H* held = find_state(a, room);
        begin(a, room);
        for (int64_t t = query_start[a.sequence]; t < query_start[a.sequence + 1]; t += TOKENS) {
            int64_t tokens = std::min(TOKENS, query_start[a.sequence + 1] - t);
            mix(a, t, tokens, room);
            for (int64_t i = 0; i < share(); i++)
                advance_head(a.key_head * share() + i, i, held + i * Dk * Dv, t, tokens, room);
            roll(tokens, room);
        }
        if (advances(a.sequence)) end(a, room);
    }

    void run(int threads) const {
        std::vector<DeltaTask> all;
        for (int64_t s = 0; s < S; s++)
            for (int64_t k = 0; k < K && query_start[s] < query_start[s + 1]; k++) all.push_back({s, k});
        Queue queue(int64_t(all.size()));
        together(crew_for(query_start[S] * V * Dk * Dv / 4, threads), [&](int) {
            Room room(*this);
            queue.share([&](int64_t i) { task(all[size_t(i)], room); });
        });
    }
};

template <class T, class H>
void delta_net(int path, int threads, const void* x, const void* weight, void* conv_state, const float* a_log,
               const float* dt_bias, const void* norm, void* state, const int64_t* slots, const int64_t* query_start,
               const bool* fresh, const bool* advance, void* out, int64_t S, int64_t K, int64_t V, int64_t Dk,
               int64_t Dv, int W, float eps) {
    DeltaNet<T, H>{*find_path(path), (const T*)x, (const T*)weight, (T*)conv_state, a_log, dt_bias, (const T*)norm, (H*)state,
                slots, query_start, fresh, advance, (T*)out, S, K, V, Dk, Dv, W, eps}
        .run(threads);
}

}  // namespace
}  // namespace kernels

KERNELS_EXPORT void kernels_delta_net(int path, int threads, int dtype, int state_dtype, const void* x,
                                      const void* weight, void* conv_state, const float* a_log, const float* dt_bias,
                                      const void* norm, void* state, const int64_t* slots, const int64_t* query_start,
                                      const bool* fresh, const bool* advance, void* out, int64_t S, int64_t K,
                                      int64_t V, int64_t Dk, int64_t Dv, int W, float eps) {
    using kernels::bf16;
    using kernels::delta_net;
    auto run = delta_net<float, float>;
    if (dtype == kernels::BFLOAT16)
        run = state_dtype == kernels::BFLOAT16 ? delta_net<bf16, bf16> : delta_net<bf16, float>;
    else if (state_dtype == kernels::BFLOAT16)
        run = delta_net<float, bf16>;
    run(path, threads, x, weight, conv_state, a_log, dt_bias, norm, state, slots, query_start, fresh, advance, out, S,
        K, V, Dk, Dv, W, eps);
}

KERNELS_REPLAY(kernels_delta_net)
