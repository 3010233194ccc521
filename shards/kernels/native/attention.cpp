// Paged attention: online softmax over blocks of positions that start at position 0, whatever the chunk.
//
// Keys are taken in ranges of RANGE positions, each with a softmax of its own, that are merged in order: so threads may
// share a long context without a trace in the bits.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "matmul.h"
#include "replay.h"
#include "team.h"

namespace kernels {
namespace {

constexpr int64_t RANGE = 1024;
// Floats of the sums of a task's query rows where a path takes a range at once: they stay in the second-level cache
// beside the range.
constexpr int64_t SUMS = 65536;

// Queries [first, last) of sequence s, the query heads [head, head + heads) of kv head `kv`.
struct AttentionTask {
    int64_t sequence, first, last, kv, head, heads;
    int64_t partial;  // place of its first range among the partial results

    int64_t rows() const { return (last - first) * heads; }
};

// Floats of what query rows have of some ranges: largest score, sum of weights, weighted sum of values.
int64_t sums_size(int64_t rows, int64_t stride) { return rows * (stride + 2); }

void place_sums(Attending& a, float* at) {
    a.top = at;
    a.total = a.top + a.rows;
    a.acc = a.total + a.rows;
}

// A thread's room for query rows under way.
struct AttentionRoom {
    Attending a;
    std::vector<float> floats;
    std::vector<int> counts;

    // `blocks`: with what a path needs that takes block by block.
    AttentionRoom(int64_t D, float scale, int64_t rows, bool blocks) : counts(size_t(rows), 0) {
        a.D = int(D);
        a.stride = int(stride_of(D));
        a.scale = scale;
        a.counts = counts.data();
        if (!blocks) return;
        size_t queries = size_t(QUERY_ROWS) * size_t(a.stride), block = size_t(KEYS) * size_t(a.stride);
        size_t scores = size_t(QUERY_ROWS) * KEYS;
        floats.assign(queries + 2 * block + 2 * scores + QUERY_ROWS, 0.0f);
        a.queries = floats.data();
        a.keys = a.queries + queries;
        a.values = a.keys + block;
        a.scores = a.values + block;
        a.weights = a.scores + scores;
        a.keep = a.weights + scores;
    }
    AttentionRoom(const AttentionRoom&) = delete;

    static int64_t stride_of(int64_t D) { return (D + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }
};

template <class T>
struct Attention {
    const Path& path;
    const T* q;
    const T* k_pool;
    const T* v_pool;
    const int32_t* tables;
    const int64_t* query_start;
    const int64_t* contexts;
    const T* gate;  // null: none; else of each query head, by row_stride and head_stride
    T* out;
    int64_t S, H, Hkv, D, P, B, row_stride, head_stride;
    float scale;
    std::vector<AttentionTask> tasks;
    std::vector<T> zeros;
    int64_t most_rows = 0;  // of a task

    // Keys that the last query row of the task sees.
    int64_t limit(const AttentionTask& a) const {
        return contexts[a.sequence] - (query_start[a.sequence + 1] - a.last);
    }
    int64_t ranges(const AttentionTask& a) const { return (limit(a) + RANGE - 1) / RANGE; }
    bool by_range() const { return path.attend_range(q) != nullptr; }

    // Tasks of up to `rows` query rows; returns the number of partial results of all.
    int64_t plan(int64_t rows) {
        int64_t share = H / Hkv, heads = std::min<int64_t>(share, rows), queries = rows / heads, count = 0;
        tasks.clear();
        for (int64_t s = 0; s < S; s++)
            for (int64_t kv = 0; kv < Hkv; kv++)
                for (int64_t h = 0; h < share; h += heads)
                    for (int64_t t = query_start[s]; t < query_start[s + 1]; t += queries) {
                        tasks.push_back({s, t, std::min(t + queries, query_start[s + 1]), kv, kv * share + h,
                                         std::min(heads, share - h), count});
                        count += ranges(tasks.back());
                    }
        return count;
    }

    // Large tasks where keys are packed once for all rows, but enough of them that threads end together.
    int64_t plan_for(int threads) {
        int64_t rows = by_range() ? std::max<int64_t>(SUMS / AttentionRoom::stride_of(D), QUERY_ROWS) : QUERY_ROWS;
        int64_t count = plan(rows);
        for (; rows > QUERY_ROWS && int64_t(tasks.size()) < 8 * threads; count = plan(rows))
            rows = std::max<int64_t>(rows / 2, QUERY_ROWS);
        for (const AttentionTask& a : tasks) most_rows = std::max(most_rows, a.rows());
        return count;
    }

    // The task's query rows over one range of keys, from a clean start, into sums at `to`.
    void range(const AttentionTask& a, int64_t index, AttentionRoom& room, float* to) const {
        const T *ks[RANGE], *vs[RANGE];
        std::vector<const T*> qs(size_t(a.rows()));
        Attending& at = room.a;
        at.rows = int(a.rows());
        place_sums(at, to);
        int64_t base = index * RANGE;
        int keys = int(std::min(limit(a) - base, RANGE)), r = 0;
        find_keys(a, base, keys, ks, vs);
        for (int64_t t = a.first; t < a.last; t++)
            for (int64_t h = a.head; h < a.head + a.heads; h++, r++) {
                int64_t seen = contexts[a.sequence] - (query_start[a.sequence + 1] - 1 - t) - base;
                qs[size_t(r)] = q + (t * H + h) * D;
                at.counts[r] = int(std::min<int64_t>(std::max<int64_t>(seen, 0), keys));
            }
        if constexpr (std::is_same_v<T, bf16>)
            if (by_range()) return path.attend_range(q)(qs.data(), ks, vs, keys, at);
        attend_blocks(qs.data(), ks, vs, keys, at);
    }

    void attend_blocks(Rows<T> qs, Rows<T> ks, Rows<T> vs, int keys, Attending& at) const {
        path.take_queries(qs, at);
        std::fill_n(at.top, at.rows, -INFINITY);
        std::fill_n(at.total, at.rows, 0.0f);
        std::fill_n(at.acc, at.rows * at.stride, 0.0f);
        int seen[QUERY_ROWS];
        std::copy_n(at.counts, at.rows, seen);
        for (int base = 0; base < keys; base += KEYS) {
            int here = std::min(KEYS, keys - base);
            for (int r = 0; r < at.rows; r++) at.counts[r] = std::min(here, seen[r] - base);
            path.attend(ks + base, vs + base, here, at);
        }
    }

    // Rows of keys and values from position `base` on; rows of zeros behind them fill up a block.
    void find_keys(const AttentionTask& a, int64_t base, int keys, const T** ks, const T** vs) const {
        const int32_t* table = tables + a.sequence * B;
        for (int j = 0; j < keys;) {
            int64_t within = (base + j) % P, offset = ((table[(base + j) / P] * Hkv + a.kv) * P + within) * D;
            for (int end = int(std::min<int64_t>(keys, j + P - within)); j < end; j++, offset += D) {
                ks[j] = k_pool + offset;
                vs[j] = v_pool + offset;
            }
        }
        int filled = (keys + KEYS - 1) / KEYS * KEYS;
        std::fill(ks + keys, ks + filled, zeros.data());
        std::fill(vs + keys, vs + filled, zeros.data());
    }

    void finish(const AttentionTask& a, const Attending& sums) const {
        int64_t r = 0;
        for (int64_t t = a.first; t < a.last; t++)
            for (int64_t h = a.head; h < a.head + a.heads; h++, r++) {
                const T* factor = gate == nullptr ? nullptr : gate + t * row_stride + h * head_stride;
                path.rows(out).finish_head(sums.acc + r * sums.stride, sums.total[r], factor, D, out + (t * H + h) * D);
            }
    }

    // Sums of a task at `at`.
    Attending sums_of(const AttentionTask& a, float* at) const {
        Attending sums = {};
        sums.rows = int(a.rows());
        sums.stride = int(AttentionRoom::stride_of(D));
        place_sums(sums, at);
        return sums;
    }

    // One thread takes a task over all of its ranges; those that see most keys first, so that threads end together.
    void run_whole(Crew crew) {
        std::stable_sort(tasks.begin(), tasks.end(), [&](const AttentionTask& a, const AttentionTask& b) {
            return limit(a) * a.rows() > limit(b) * b.rows();
        });
        Queue queue(int64_t(tasks.size()));
        together(crew, [&](int) {
            AttentionRoom room(D, scale, most_rows, !by_range());
            int64_t size = sums_size(most_rows, room.a.stride);
            float* sums = (float*)staging(size_t(2 * size) * sizeof(float));
            queue.share([&](int64_t i) {
                const AttentionTask& a = tasks[size_t(i)];
                Attending merged = sums_of(a, sums);
                range(a, 0, room, sums);
                for (int64_t index = 1; index < ranges(a); index++) {
                    range(a, index, room, sums + size);
                    path.merge(merged, room.a);
                }
                finish(a, merged);
            });
        });
    }

    // Threads share tasks range by range, then merge.
    void run_split(Crew crew, int64_t count) const {
        std::vector<std::pair<const AttentionTask*, int64_t>> parts;
        for (const AttentionTask& a : tasks)
            for (int64_t index = 0; index < ranges(a); index++) parts.push_back({&a, index});
        int64_t size = sums_size(most_rows, AttentionRoom::stride_of(D));
        std::vector<float> sums(size_t(count * size));
        Queue queue(int64_t(parts.size()));
        together(crew, [&](int) {
            AttentionRoom room(D, scale, most_rows, !by_range());
            queue.share([&](int64_t i) {
                auto [a, index] = parts[size_t(i)];
                range(*a, index, room, sums.data() + (a->partial + index) * size);
            });
        });
        for_each(int64_t(tasks.size()), crew, [&](int64_t i) {
            const AttentionTask& a = tasks[size_t(i)];
            float* first = sums.data() + a.partial * size;
            Attending merged = sums_of(a, first);
            for (int64_t index = 1; index < ranges(a); index++) path.merge(merged, sums_of(a, first + index * size));
            finish(a, merged);
        });
    }

    void run(int threads) {
        zeros.assign(size_t(D), T(0));
        int64_t work = 0;
        for (int64_t s = 0; s < S; s++) work += contexts[s] * (query_start[s + 1] - query_start[s]) * H * D / 8;
        Crew crew = crew_for(work, threads);
        int64_t count = plan_for(crew.threads);
        // Few tasks of many ranges (a long context that is decoded) would leave threads idle.
        if (count > int64_t(tasks.size()) && int64_t(tasks.size()) < 4 * crew.threads)
            run_split(crew, count);
        else
            run_whole(crew);
    }
};

// Rows of [q or per head [q | gate] | k | v]: norm and rotary of q -> out, of k -> k_pool; v -> v_pool.
template <class T>
struct AttentionInputs {
    const Path& path;
    const T* qkv;
    const T* q_norm;
    const T* k_norm;
    const float* cos;
    const float* sin;
    T* k_pool;
    T* v_pool;
    const int64_t* slots;
    T* out;
    int64_t rows, H, Hkv, D, R, P, head_stride;
    float eps;
    bool zero_centred;

    void row(int64_t t) const {
        const RowLoops<T>& loops = path.rows(qkv);
        const T* x = qkv + t * (H * head_stride + 2 * Hkv * D);
        const float *c = cos + t * R, *s = sin + t * R;
        for (int64_t h = 0; h < H; h++, x += head_stride)
            loops.turn_head(x, q_norm, eps, zero_centred, c, s, D, R, out + (t * H + h) * D);
        if (slots[t] < 0) return;  // its key and value are there already
        for (int64_t h = 0; h < Hkv; h++, x += D) {
            int64_t to = ((slots[t] / P * Hkv + h) * P + slots[t] % P) * D;
            loops.turn_head(x, k_norm, eps, zero_centred, c, s, D, R, k_pool + to);
            std::copy(x + Hkv * D, x + Hkv * D + D, v_pool + to);
        }
    }

    void run(int threads) const {
        for_each(rows, crew_for(rows * (H + Hkv) * D * 2, threads), [&](int64_t t) { row(t); });
    }
};

template <class T>
void attention(int path, int threads, const void* q, const void* k_pool, const void* v_pool, const int32_t* tables,
               const int64_t* query_start, const int64_t* contexts, const void* gate, void* out, int64_t S, int64_t H,
               int64_t Hkv, int64_t D, int64_t P, int64_t B, int64_t row_stride, int64_t head_stride, float scale) {
    Attention<T>{*find_path(path), (const T*)q, (const T*)k_pool, (const T*)v_pool, tables, query_start, contexts,
                 (const T*)gate, (T*)out, S, H, Hkv, D, P, B, row_stride, head_stride, scale, {}, {}, 0}
        .run(threads);
}

template <class T>
void attention_inputs(int path, int threads, const void* qkv, const void* q_norm, const void* k_norm, const float* cos,
                      const float* sin, void* k_pool, void* v_pool, const int64_t* slots, void* out, int64_t rows,
                      int64_t H, int64_t Hkv, int64_t D, int64_t R, int64_t P, int64_t head_stride, float eps,
                      int zero_centred) {
    AttentionInputs<T>{*find_path(path), (const T*)qkv, (const T*)q_norm, (const T*)k_norm, cos, sin, (T*)k_pool,
                       (T*)v_pool, slots, (T*)out, rows, H, Hkv, D, R, P, head_stride, eps, zero_centred != 0}
        .run(threads);
}

}  // namespace
}  // namespace kernels

KERNELS_EXPORT void kernels_attention(int path, int threads, int dtype, const void* q, const void* k_pool,
                                      const void* v_pool, const int32_t* tables, const int64_t* query_start,
                                      const int64_t* contexts, const void* gate, void* out, int64_t S, int64_t H,
                                      int64_t Hkv, int64_t D, int64_t P, int64_t B, int64_t row_stride,
                                      int64_t head_stride, float scale) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::attention<kernels::bf16> : kernels::attention<float>;
    run(path, threads, q, k_pool, v_pool, tables, query_start, contexts, gate, out, S, H, Hkv, D, P, B, row_stride,
        head_stride, scale);
}

KERNELS_EXPORT void kernels_attention_inputs(int path, int threads, int dtype, const void* qkv, const void* q_norm,
                                             const void* k_norm, const float* cos, const float* sin, void* k_pool,
                                             void* v_pool, const int64_t* slots, void* out, int64_t rows, int64_t H,
                                             int64_t Hkv, int64_t D, int64_t R, int64_t P, int64_t head_stride,
                                             float eps, int zero_centred) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::attention_inputs<kernels::bf16> : kernels::attention_inputs<float>;
    run(path, threads, qkv, q_norm, k_norm, cos, sin, k_pool, v_pool, slots, out, rows, H, Hkv, D, R, P, head_stride,
        eps, zero_centred);
}

KERNELS_REPLAY(kernels_attention)
KERNELS_REPLAY(kernels_attention_inputs)
