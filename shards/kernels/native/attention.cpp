// Paged attention: online softmax over blocks of KEYS positions that start at position 0, whatever the chunk.
//
// Keys are taken in ranges of RANGE positions, each with a softmax of its own, that are merged in order: so threads may
// share a long context without a trace in the bits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace kernels {
namespace {

constexpr int64_t RANGE = 1024;

// Queries [first, last) of sequence s, the query heads [head, head + heads) of kv head `kv`.
struct AttentionTask {
    int64_t sequence, first, last, kv, head, heads;
    int64_t partial;  // place of its first range among the partial results
};

// A thread's room for query rows under way.
struct AttentionRoom {
    Attending a;
    std::vector<float> floats;

    AttentionRoom(int64_t D, float scale) {
        a.D = int(D);
        a.stride = int((D + 2 * LANES - 1) / (2 * LANES) * (2 * LANES));
        a.scale = scale;
        size_t rows = size_t(QUERY_ROWS) * size_t(a.stride), block = size_t(KEYS) * size_t(a.stride);
        size_t scores = size_t(QUERY_ROWS) * KEYS;
        floats.assign(2 * rows + 2 * block + 2 * scores, 0.0f);
        a.acc = floats.data();
        a.queries = a.acc + rows;
        a.keys = a.queries + rows;
        a.values = a.keys + block;
        a.scores = a.values + block;
        a.weights = a.scores + scores;
    }
    AttentionRoom(const AttentionRoom&) = delete;
};

// What query rows have of some ranges: largest score, sum of weights, weighted sum of values.
struct Partial {
    float *top, *total, *acc;
};

void merge(const Partial& into, const Partial& part, int rows, int64_t stride) {
    for (int r = 0; r < rows; r++) {
        float highest = std::max(into.top[r], part.top[r]);
        float kept = exp_f32(into.top[r] - highest), taken = exp_f32(part.top[r] - highest);
        into.top[r] = highest;
        into.total[r] = into.total[r] * kept + part.total[r] * taken;
        float *to = into.acc + r * stride, *from = part.acc + r * stride;
        for (int64_t d = 0; d < stride; d++) to[d] = to[d] * kept + from[d] * taken;
    }
}

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

    // Keys that the last query row of the task sees.
    int64_t limit(const AttentionTask& a) const {
        return contexts[a.sequence] - (query_start[a.sequence + 1] - a.last);
    }
    int64_t ranges(const AttentionTask& a) const { return (limit(a) + RANGE - 1) / RANGE; }

    // Returns the number of partial results of all tasks.
    int64_t plan() {
        int64_t share = H / Hkv, heads = std::min<int64_t>(share, QUERY_ROWS), queries = QUERY_ROWS / heads, count = 0;
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

    // The task's query rows over one range of keys, from a clean start.
    void range(const AttentionTask& a, int64_t index, AttentionRoom& room) const {
        const T *qs[QUERY_ROWS], *ks[KEYS], *vs[KEYS];
        int64_t seen[QUERY_ROWS];
        Attending& at = room.a;
        at.rows = 0;
        for (int64_t t = a.first; t < a.last; t++)
            for (int64_t h = a.head; h < a.head + a.heads; h++, at.rows++) {
                qs[at.rows] = q + (t * H + h) * D;
                seen[at.rows] = contexts[a.sequence] - (query_start[a.sequence + 1] - 1 - t);
            }
        path.take_queries(qs, at);
        std::fill_n(at.top, at.rows, -INFINITY);
        std::fill_n(at.total, at.rows, 0.0f);
        std::fill_n(at.acc, at.rows * at.stride, 0.0f);
        int64_t end = std::min(limit(a), (index + 1) * RANGE);
        for (int64_t base = index * RANGE; base < end; base += KEYS) {
            int keys = int(std::min<int64_t>(KEYS, end - base));
            find_keys(a, base, keys, ks, vs);
            for (int r = 0; r < at.rows; r++)
                at.counts[r] = int(std::max<int64_t>(0, std::min<int64_t>(keys, seen[r] - base)));
            path.attend(ks, vs, keys, at);
        }
    }

    void find_keys(const AttentionTask& a, int64_t base, int keys, const T** ks, const T** vs) const {
        const int32_t* table = tables + a.sequence * B;
        for (int j = 0; j < keys; j++) {
            int64_t position = base + j;
            int64_t offset = ((int64_t(table[position / P]) * Hkv + a.kv) * P + position % P) * D;
            ks[j] = k_pool + offset;
            vs[j] = v_pool + offset;
        }
        std::fill(ks + keys, ks + KEYS, zeros.data());
        std::fill(vs + keys, vs + KEYS, zeros.data());
    }

    void finish(const AttentionTask& a, const Partial& part, int64_t stride) const {
        int64_t r = 0;
        for (int64_t t = a.first; t < a.last; t++)
            for (int64_t h = a.head; h < a.head + a.heads; h++, r++) {
                const T* factor = gate == nullptr ? nullptr : gate + t * row_stride + h * head_stride;
                path.rows(out).finish_head(part.acc + r * stride, part.total[r], factor, D, out + (t * H + h) * D);
            }
    }

    // One thread takes a task over all of its ranges.
    void run_whole(int threads) const {
#pragma omp parallel num_threads(threads)
        {
            AttentionRoom room(D, scale);
            std::vector<float> sums(size_t(QUERY_ROWS) * size_t(room.a.stride + 2));
            Partial under_way = {room.a.top, room.a.total, room.a.acc};
            Partial merged = {sums.data(), sums.data() + QUERY_ROWS, sums.data() + 2 * QUERY_ROWS};
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < tasks.size(); i++) {
                int64_t count = ranges(tasks[i]);
                for (int64_t index = 0; index < count; index++) {
                    range(tasks[i], index, room);
                    if (count == 1) break;
                    if (index == 0)
                        copy(under_way, merged, room.a);
                    else
                        merge(merged, under_way, room.a.rows, room.a.stride);
                }
                finish(tasks[i], count == 1 ? under_way : merged, room.a.stride);
            }
        }
    }

    static void copy(const Partial& from, const Partial& to, const Attending& a) {
        std::copy_n(from.top, a.rows, to.top);
        std::copy_n(from.total, a.rows, to.total);
        std::copy_n(from.acc, a.rows * a.stride, to.acc);
    }

    // Threads share tasks range by range, then merge.
    void run_split(int threads, int64_t count) const {
        std::vector<std::pair<const AttentionTask*, int64_t>> parts;
        for (const AttentionTask& a : tasks)
            for (int64_t index = 0; index < ranges(a); index++) parts.push_back({&a, index});
        int64_t stride = AttentionRoom(D, scale).a.stride, size = QUERY_ROWS * (stride + 2);
        std::vector<float> sums(size_t(count * size));
        auto partial = [&](int64_t place) {
            float* at = sums.data() + place * size;
            return Partial{at, at + QUERY_ROWS, at + 2 * QUERY_ROWS};
        };
#pragma omp parallel num_threads(threads)
        {
            AttentionRoom room(D, scale);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < parts.size(); i++) {
                const AttentionTask& a = *parts[i].first;
                range(a, parts[i].second, room);
                copy({room.a.top, room.a.total, room.a.acc}, partial(a.partial + parts[i].second), room.a);
            }
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < tasks.size(); i++) {
                const AttentionTask& a = tasks[i];
                int rows = int((a.last - a.first) * a.heads);
                for (int64_t index = 1; index < ranges(a); index++)
                    merge(partial(a.partial), partial(a.partial + index), rows, stride);
                finish(a, partial(a.partial), stride);
            }
        }
    }

    void run(int threads) {
        zeros.assign(size_t(D), T(0));
        int64_t count = plan(), work = 0;
        for (const AttentionTask& a : tasks) work += limit(a) * (a.last - a.first) * a.heads * D / 8;
        threads = threads_for(work, threads);
        // Few tasks of many ranges (a long context that is decoded) would leave threads idle.
        if (count > int64_t(tasks.size()) && int64_t(tasks.size()) < 4 * threads)
            run_split(threads, count);
        else
            run_whole(threads);
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
        for (int64_t h = 0; h < Hkv; h++, x += D) {
            int64_t to = ((slots[t] / P * Hkv + h) * P + slots[t] % P) * D;
            loops.turn_head(x, k_norm, eps, zero_centred, c, s, D, R, k_pool + to);
            std::copy(x + Hkv * D, x + Hkv * D + D, v_pool + to);
        }
    }

    void run(int threads) const {
#pragma omp parallel for num_threads(threads_for(rows * (H + Hkv) * D * 2, threads))
        for (int64_t t = 0; t < rows; t++) row(t);
    }
};

template <class T>
void attention(int path, int threads, const void* q, const void* k_pool, const void* v_pool, const int32_t* tables,
               const int64_t* query_start, const int64_t* contexts, const void* gate, void* out, int64_t S, int64_t H,
               int64_t Hkv, int64_t D, int64_t P, int64_t B, int64_t row_stride, int64_t head_stride, float scale) {
    Attention<T>{*find_path(path), (const T*)q, (const T*)k_pool, (const T*)v_pool, tables, query_start, contexts,
                 (const T*)gate, (T*)out, S, H, Hkv, D, P, B, row_stride, head_stride, scale, {}, {}}
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
