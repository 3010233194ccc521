// Dense layers and experts: tasks of (up to ROWS rows) x (up to COLUMNS weight rows), each a call of a path's `dots`.
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

namespace kernels {
namespace {

constexpr int ROWS = 64;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class T>
struct Linear {
    const Path& path;
    const T* x;
    const T* weight;
    const T* bias;
    float* wide_out;
    T* out;
    int64_t T_, N, K;
    int groups;

    void task(int64_t row, int64_t column) const {
        int rows = int(std::min<int64_t>(ROWS, T_ - row)), columns = int(std::min<int64_t>(COLUMNS, N - column));
        const T *xs[ROWS], *ws[COLUMNS];
        float sums[ROWS * COLUMNS];
        for (int r = 0; r < rows; r++) xs[r] = x + (row + r) * K;
        for (int n = 0; n < columns; n++) ws[n] = weight + (column + n) * K;
        path.dots(xs, rows, ws, columns, K, groups, sums, COLUMNS);
        for (int r = 0; r < rows; r++) {
            float* sum = sums + r * COLUMNS;
            int64_t at = (row + r) * N + column;
            if (bias != nullptr)
                for (int n = 0; n < columns; n++) sum[n] += load(bias + column + n);
            if (wide_out != nullptr)
                std::copy(sum, sum + columns, wide_out + at);
            else
                for (int n = 0; n < columns; n++) store(out + at + n, sum[n]);
        }
    }

    void run(int threads) const {
        int64_t row_blocks = blocks_of(T_, ROWS), tasks = row_blocks * blocks_of(N, COLUMNS);
        // Neighbouring tasks share weight rows, so that these are read from memory once.
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(T_ * N * K / 8, threads))
        for (int64_t i = 0; i < tasks; i++) task(i % row_blocks * ROWS, i / row_blocks * COLUMNS);
    }
};

// Rows [first, first + rows) of the pairs sorted by expert, through weight rows from `column` on.
struct ExpertTask {
    int64_t expert, first, column;
    int rows;
};

template <class T>
struct Experts {
    const Path& path;
    const T* x;
    const int64_t* ids;
    const T* gate_up;
    const T* down;
    float* wide_out;
    T* out;
    int64_t pairs, top_k, E, C, I;
    int groups;
    std::vector<int64_t> starts;  // [E + 1] first place of each expert in `order`
    std::vector<int64_t> order;   // pairs t * top_k + k, by expert
    std::unique_ptr<T[]> inner;   // [pairs, I] by place in `order`

    // Counting sort; false when an id is too large.
    bool sort() {
        starts.assign(size_t(E + 1), 0);
        for (int64_t i = 0; i < pairs; i++) {
            if (ids[i] >= E) return false;
            if (ids[i] >= 0) starts[size_t(ids[i] + 1)]++;
        }
        for (int64_t e = 0; e < E; e++) starts[size_t(e + 1)] += starts[size_t(e)];
        order.resize(size_t(starts[size_t(E)]));
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < pairs; i++)
            if (ids[i] >= 0) order[size_t(next[size_t(ids[i])]++)] = i;
        return true;
    }

    std::vector<ExpertTask> tasks(int64_t columns, int64_t step) const {
        std::vector<ExpertTask> all;
        for (int64_t e = 0; e < E; e++)
            for (int64_t column = 0; column < columns; column += step)
                for (int64_t first = starts[size_t(e)]; first < starts[size_t(e + 1)]; first += ROWS)
                    all.push_back({e, first, column, int(std::min<int64_t>(ROWS, starts[size_t(e + 1)] - first))});
        return all;
    }

    void gate_up_task(const ExpertTask& t) const {
        int columns = int(std::min<int64_t>(COLUMNS / 2, I - t.column));
        const T *xs[ROWS], *ws[COLUMNS];
        float sums[ROWS * COLUMNS];
        for (int r = 0; r < t.rows; r++) xs[r] = x + order[size_t(t.first + r)] / top_k * C;
        for (int n = 0; n < columns; n++) {
            ws[n] = gate_up + (t.expert * 2 * I + t.column + n) * C;
            ws[columns + n] = ws[n] + I * C;
        }
        path.dots(xs, t.rows, ws, 2 * columns, C, 1, sums, COLUMNS);
        for (int r = 0; r < t.rows; r++) {
            const float *gate = sums + r * COLUMNS, *up = gate + columns;
            T* to = inner.get() + (t.first + r) * I + t.column;
            for (int n = 0; n < columns; n++)
                store(to + n, rounded<T>(silu(rounded<T>(gate[n]))) * rounded<T>(up[n]));
        }
    }

    void down_task(const ExpertTask& t) const {
        int columns = int(std::min<int64_t>(COLUMNS, C - t.column));
        const T *xs[ROWS], *ws[COLUMNS];
        float sums[ROWS * COLUMNS];
        for (int r = 0; r < t.rows; r++) xs[r] = inner.get() + (t.first + r) * I;
        for (int n = 0; n < columns; n++) ws[n] = down + (t.expert * C + t.column + n) * I;
        path.dots(xs, t.rows, ws, columns, I, groups, sums, COLUMNS);
        for (int r = 0; r < t.rows; r++) {
            const float* sum = sums + r * COLUMNS;
            int64_t at = order[size_t(t.first + r)] * C + t.column;
            if (wide_out != nullptr)
                std::copy(sum, sum + columns, wide_out + at);
            else
                for (int n = 0; n < columns; n++) store(out + at + n, sum[n]);
        }
    }

    bool run(int threads) {
        if (!sort()) return false;
        for (int64_t i = 0; i < pairs; i++) {
            if (ids[i] >= 0) continue;
            if (wide_out != nullptr)
                std::fill_n(wide_out + i * C, C, 0.0f);
            else
                std::fill_n(out + i * C, C, T(0));
        }
        inner.reset(new T[order.size() * size_t(I)]);
        threads = threads_for(int64_t(order.size()) * C * I / 4, threads);
        std::vector<ExpertTask> first = tasks(I, COLUMNS / 2), second = tasks(C, COLUMNS);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (size_t i = 0; i < first.size(); i++) gate_up_task(first[i]);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (size_t i = 0; i < second.size(); i++) down_task(second[i]);
        return true;
    }
};

template <class T>
void linear(int path, int threads, const void* x, const void* w, const void* bias, void* out, bool wide, int64_t rows,
            int64_t N, int64_t K, int groups) {
    Linear<T>{*find_path(path), (const T*)x, (const T*)w, (const T*)bias, wide ? (float*)out : nullptr,
              wide ? nullptr : (T*)out, rows, N, K, groups}
        .run(threads);
}

template <class T>
bool experts(int path, int threads, const void* x, const int64_t* ids, const void* gate_up, const void* down, void* out,
             bool wide, int64_t rows, int64_t top_k, int64_t E, int64_t C, int64_t I, int groups) {
    return Experts<T>{*find_path(path), (const T*)x, ids, (const T*)gate_up, (const T*)down,
                      wide ? (float*)out : nullptr, wide ? nullptr : (T*)out, rows * top_k, top_k, E, C, I, groups,
                      {}, {}, nullptr}
        .run(threads);
}

}  // namespace
}  // namespace kernels

KERNELS_EXPORT void kernels_linear(int path, int threads, int dtype, const void* x, const void* w, const void* bias,
                                   void* out, int wide, int64_t rows, int64_t N, int64_t K, int groups) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::linear<kernels::bf16> : kernels::linear<float>;
    run(path, threads, x, w, bias, out, wide != 0, rows, N, K, groups);
}

// 0, or 1 when an expert id is too large.
KERNELS_EXPORT int kernels_experts(int path, int threads, int dtype, const void* x, const int64_t* ids,
                                   const void* gate_up, const void* down, void* out, int wide, int64_t rows,
                                   int64_t top_k, int64_t E, int64_t C, int64_t I, int groups) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::experts<kernels::bf16> : kernels::experts<float>;
    return run(path, threads, x, ids, gate_up, down, out, wide != 0, rows, top_k, E, C, I, groups) ? 0 : 1;
}
