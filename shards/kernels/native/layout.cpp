// How weights lie in memory for products in strips: a strip is 16 rows of a matrix (the last one what is left), line by
// line, and a line holds for each row the 32 bits of it that come next along K: [line][row][DEPTH]. Where K / groups is
// odd, a group's last line holds one number a row. Strips take the place of their rows: nothing moves between them.
#include <algorithm>

#include "matmul.h"
#include "replay.h"
#include "team.h"

namespace kernels {
namespace {

template <class T>
constexpr int DEPTH = int(sizeof(float) / sizeof(T));
// Words of a row, a cache line of them, that are moved before those of the next row.
constexpr int64_t PIECE = 16;

// Rows [first, first + rows) of a matrix of N.
struct Strip {
    int64_t first;
    int rows;
    Strip(int64_t index, int64_t N) : first(index * LANES), rows(int(std::min<int64_t>(LANES, N - first))) {}
};

// How many numbers of a row its line from k on holds, where every group of K begins a line.
template <class T>
int line_depth(int64_t k, int64_t width) {
    return int(std::min<int64_t>(DEPTH<T>, width - k % width));
}

// `copy` has room for the strip.
template <class T>
void lay_strip(T* strip, int rows, int64_t K, int groups, T* copy) {
    std::copy_n(strip, rows * K, copy);
    int64_t width = K / groups, words = K / DEPTH<T>;
    if (width % DEPTH<T> == 0) {
        for (int64_t first = 0; first < words; first += PIECE)
            for (int n = 0; n < rows; n++)
                for (int64_t k = first; k < std::min(first + PIECE, words); k++)
                    memcpy(strip + (k * rows + n) * DEPTH<T>, copy + n * K + k * DEPTH<T>, sizeof(float));
        return;
    }
    for (int64_t k = 0, depth; k < K; k += depth) {
        depth = line_depth<T>(k, width);
        for (int n = 0; n < rows; n++) std::copy_n(copy + n * K + k, depth, strip + k * rows + n * depth);
    }
}

template <class T>
void lay_out(T* weights, int threads, int64_t matrices, int64_t N, int64_t K, int groups) {
    int64_t strips = blocks_of(N, LANES);
    for_each(matrices * strips, crew_for(matrices * N * K / 8, threads), [=](int64_t i) {
        Strip strip(i % strips, N);
        T* at = weights + (i / strips * N + strip.first) * K;
        lay_strip(at, strip.rows, K, groups, (T*)staging(size_t(strip.rows * K) * sizeof(T)));
    });
}

template <class T>
void take_rows(const T* weights, int threads, bool strips, const int64_t* ids, int64_t count, int64_t N, int64_t K, T* out) {
    for_each(count, crew_for(count * K, threads), [=](int64_t i) {
        if (ids[i] < 0) {
            std::fill_n(out + i * K, K, T(0));
            return;
        }
        if (!strips) {
            std::copy_n(weights + ids[i] * K, K, out + i * K);
            return;
        }
        Strip strip(ids[i] / LANES, N);
        const T* from = weights + strip.first * K;
        for (int64_t k = 0, depth; k < K; k += depth) {
            depth = line_depth<T>(k, K);
            std::copy_n(from + k * strip.rows + (ids[i] - strip.first) * depth, depth, out + i * K + k);
        }
    });
}

template <class T>
bool in_strips(int path) {
    return find_path(path)->matmul((const T*)nullptr).strips;
}

}  // namespace
}  // namespace kernels

// Lays out `matrices` matrices [N, K] one behind the other, each of K in `groups`, in place, as products of the path and
// dtype read them.
KERNELS_EXPORT void kernels_lay_out(int path, int threads, int dtype, void* weights, int64_t matrices, int64_t N, int64_t K,
                                    int groups) {
    using namespace kernels;
    if (dtype == BFLOAT16 && in_strips<bf16>(path)) lay_out((bf16*)weights, threads, matrices, N, K, groups);
    if (dtype == FLOAT32 && in_strips<float>(path)) lay_out((float*)weights, threads, matrices, N, K, groups);
}

// Rows ids [count] of a matrix [N, K] that was laid out in one group, as they were before; zeros for an id below zero.
// Returns 0, or 1 when an id is too large.
KERNELS_EXPORT int kernels_take_rows(int path, int threads, int dtype, const void* weights, const int64_t* ids,
                                     int64_t count, int64_t N, int64_t K, void* out) {
    using namespace kernels;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] >= N) return 1;
    if (dtype == BFLOAT16)
        take_rows((const bf16*)weights, threads, in_strips<bf16>(path), ids, count, N, K, (bf16*)out);
    else
        take_rows((const float*)weights, threads, in_strips<float>(path), ids, count, N, K, (float*)out);
    return 0;
}

KERNELS_REPLAY(kernels_lay_out)
KERNELS_REPLAY(kernels_take_rows)
