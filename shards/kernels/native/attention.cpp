// Paged attention: online softmax over blocks of KEYS positions that start at position 0, whatever the chunk.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace kernels {
namespace {

// Queries [first, last) of sequence s, the query heads [head, head + heads) of kv head `kv`.
struct AttentionTask {
    int64_t sequence, first, last, kv, head, heads;
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
    T* out;
    int64_t S, H, Hkv, D, P, B;
    float scale;

    std::vector<AttentionTask> tasks() const {
        std::vector<AttentionTask> all;
        int64_t share = H / Hkv, heads = std::min<int64_t>(share, QUERY_ROWS), queries = QUERY_ROWS / heads;
        for (int64_t s = 0; s < S; s++)
            for (int64_t kv = 0; kv < Hkv; kv++)
                for (int64_t h = 0; h < share; h += heads)
                    for (int64_t t = query_start[s]; t < query_start[s + 1]; t += queries)
                        all.push_back({s, t, std::min(t + queries, query_start[s + 1]), kv, kv * share + h,
                                       std::min(heads, share - h)});
        return all;
    }

    void task(const AttentionTask& a) const {
        int rows = 0;
        const T* qs[QUERY_ROWS];
        int64_t at[QUERY_ROWS], limit[QUERY_ROWS];  // place in q and out; keys that the row may see
        for (int64_t t = a.first; t < a.last; t++)
            for (int64_t h = a.head; h < a.head + a.heads; h++, rows++) {
                at[rows] = (t * H + h) * D;
                qs[rows] = q + at[rows];
                limit[rows] = contexts[a.sequence] - (query_start[a.sequence + 1] - 1 - t);
            }
        std::vector<float> acc(size_t(rows * D));
        float p[QUERY_ROWS * KEYS], top[QUERY_ROWS], total[QUERY_ROWS] = {}, keep[QUERY_ROWS];
        std::fill(top, top + rows, -INFINITY);
        int counts[QUERY_ROWS];
        const T *ks[KEYS], *vs[KEYS];
        for (int64_t base = 0; base < limit[rows - 1]; base += KEYS) {
            int keys = int(std::min<int64_t>(KEYS, limit[rows - 1] - base));
            find_keys(a, base, keys, ks, vs);
            path.dots(qs, rows, ks, keys, D, 1, p, KEYS);
            for (int r = 0; r < rows; r++) {
                counts[r] = int(std::max<int64_t>(0, std::min<int64_t>(keys, limit[r] - base)));
                keep[r] = path.soften(p + r * KEYS, counts[r], scale, top + r, total + r);
            }
            path.weigh(p, counts, keep, rows, vs, int(D), acc.data());
        }
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < D; d++) store(out + at[r] + d, acc[size_t(r * D + d)] / total[r]);
    }

    void find_keys(const AttentionTask& a, int64_t base, int keys, const T** ks, const T** vs) const {
        const int32_t* table = tables + a.sequence * B;
        for (int j = 0; j < keys; j++) {
            int64_t position = base + j;
            int64_t offset = ((int64_t(table[position / P]) * Hkv + a.kv) * P + position % P) * D;
            ks[j] = k_pool + offset;
            vs[j] = v_pool + offset;
        }
    }

    void run(int threads) const {
        std::vector<AttentionTask> all = tasks();
        int64_t work = 0;
        for (const AttentionTask& a : all) work += contexts[a.sequence] * (a.last - a.first) * a.heads * D / 8;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(work, threads))
        for (size_t i = 0; i < all.size(); i++) task(all[i]);
    }
};

template <class T>
void store_kv(const T* k, const T* v, T* k_pool, T* v_pool, const int64_t* slots, int64_t rows, int64_t H, int64_t P,
              int64_t D) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t h = 0; h < H; h++) {
            int64_t to = ((slots[t] / P * H + h) * P + slots[t] % P) * D, from = (t * H + h) * D;
            std::copy(k + from, k + from + D, k_pool + to);
            std::copy(v + from, v + from + D, v_pool + to);
        }
}

template <class T>
void attention(int path, int threads, const void* q, const void* k_pool, const void* v_pool, const int32_t* tables,
               const int64_t* query_start, const int64_t* contexts, void* out, int64_t S, int64_t H, int64_t Hkv,
               int64_t D, int64_t P, int64_t B, float scale) {
    Attention<T>{*find_path(path), (const T*)q, (const T*)k_pool, (const T*)v_pool, tables, query_start, contexts,
                 (T*)out, S, H, Hkv, D, P, B, scale}
        .run(threads);
}

}  // namespace
}  // namespace kernels

KERNELS_EXPORT void kernels_attention(int path, int threads, int dtype, const void* q, const void* k_pool,
                                      const void* v_pool, const int32_t* tables, const int64_t* query_start,
                                      const int64_t* contexts, void* out, int64_t S, int64_t H, int64_t Hkv, int64_t D,
                                      int64_t P, int64_t B, float scale) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::attention<kernels::bf16> : kernels::attention<float>;
    run(path, threads, q, k_pool, v_pool, tables, query_start, contexts, out, S, H, Hkv, D, P, B, scale);
}

KERNELS_EXPORT void kernels_store_kv(int dtype, const void* k, const void* v, void* k_pool, void* v_pool,
                                     const int64_t* slots, int64_t rows, int64_t H, int64_t P, int64_t D) {
    using namespace kernels;
    if (dtype == BFLOAT16)
        store_kv((const bf16*)k, (const bf16*)v, (bf16*)k_pool, (bf16*)v_pool, slots, rows, H, P, D);
    else
        store_kv((const float*)k, (const float*)v, (float*)k_pool, (float*)v_pool, slots, rows, H, P, D);
}
