// Dense layers: x @ weight.T (+ bias). A task takes some weight rows through a chunk of x's rows, packed beforehand.
#include <algorithm>

#include "matmul.h"
#include "replay.h"
#include "team.h"

namespace kernels {
namespace {

// x of a chunk stays in the second-level cache while weights pass by.
constexpr int64_t CHUNK_BYTES = int64_t(1) << 20;
// Weights of a task: enough to pay for its ticket, little enough to share out evenly.
constexpr int64_t TASK_BYTES = int64_t(128) << 10;
constexpr int64_t TASKS_A_THREAD = 8;
// Most memory for packed rows of x: those beyond it go in another pass. shards/step_memory.py counts it.
constexpr int64_t PASS_BYTES = int64_t(32) << 20;

template <class T>
struct Linear {
    const Path& path;
    const Matmul<T>& matmul;
    const T* x;
    const T* weight;
    const T* bias;
    float* wide_out;
    T* out;
    int64_t rows, N, K;
    int groups;
    int64_t chunk, step;  // rows and weight rows of a task
    const T* panel;

    void task(int64_t row, int64_t column, const T* next) const {
        int64_t rows_end = std::min(row + chunk, rows), end = std::min(column + step, N);
        int64_t width = matmul.packed_width(K, groups);
        if (few(column, end, next)) return;
        alignas(64) float sums[CALL_ROWS * COLUMNS];
        for (; column < end; column += COLUMNS) {
            int columns = int(std::min<int64_t>(COLUMNS, end - column));
            const T* w = weight + column * K;
            const T* after = w + int64_t(columns) * K;
            Ahead ahead(column + columns < end ? after : next, int64_t(sizeof(T)) * columns * K);
            for (int64_t r = row; r < rows_end; r += matmul.call_rows(), ahead.lines = 0) {
                int count = int(std::min(matmul.call_rows(), rows_end - r));
                if (wide_out == nullptr && bias == nullptr) {
                    T* to[CALL_ROWS];
                    for (int i = 0; i < count; i++) to[i] = out + (r + i) * N + column;
                    matmul.round_to(panel + r * width, count, w, columns, K, groups, ahead, to);
                } else {
                    matmul.multiply(panel + r * width, count, w, columns, K, groups, ahead, sums);
                    put(sums, r, count, column, columns);
                }
            }
        }
    }

    // Few rows in one call, where the instruction set has one; whether it was done.
    bool few(int64_t column, int64_t end, const T* next) const {
        if (matmul.few_round_to == nullptr || rows > matmul.block || wide_out != nullptr || bias != nullptr) return false;
        T* to[BLOCK];
        for (int i = 0; i < int(rows); i++) to[i] = out + i * N + column;
        Lead lead{COLUMNS, Ahead(next, int64_t(sizeof(T)) * COLUMNS * K)};
        return matmul.few_round_to(panel, int(rows), weight + column * K, int(end - column), K, groups, lead, to);
    }

    void put(const float* sums, int64_t row, int count, int64_t column, int columns) const {
        const T* added = bias == nullptr ? nullptr : bias + column;
        for (int r = 0; r < count; r++, sums += COLUMNS) {
            int64_t at = (row + r) * N + column;
            if (wide_out == nullptr)
                path.finish(sums, added, columns, out + at);
            else
                for (int n = 0; n < columns; n++) wide_out[at + n] = added == nullptr ? sums[n] : sums[n] + load(added + n);
        }
    }

    void pack(T* to, int64_t row) const {
        const T* xs[BLOCK];
        int count = int(std::min<int64_t>(matmul.block, rows - row));
        for (int r = 0; r < count; r++) xs[r] = x + (row + r) * K;
        matmul.pack(xs, count, K, groups, to + row * matmul.packed_width(K, groups));
    }

    void run(int threads) {
        Crew crew = crew_for(rows * N * K / 8, threads);
        T* packed = (T*)scratch(size_t(matmul.panel_rows(rows) * matmul.packed_width(K, groups)) * sizeof(T));
        panel = packed;
        int64_t row_bytes = std::max<int64_t>(K * int64_t(sizeof(T)), 1);
        int64_t packed_bytes = std::max<int64_t>(matmul.packed_width(K, groups) * int64_t(sizeof(T)), 1);
        chunk = std::max<int64_t>(CHUNK_BYTES / packed_bytes / matmul.block, 1) * matmul.block;
        step = std::min(TASK_BYTES / row_bytes, N / (crew.threads * TASKS_A_THREAD)) / COLUMNS * COLUMNS;
        step = std::max<int64_t>(step, COLUMNS);
        int64_t column_tasks = blocks_of(N, step);
        Tickets tickets(blocks_of(rows, chunk) * column_tasks, crew.threads);
        int64_t blocks = blocks_of(rows, matmul.block);
        for_each(blocks, blocks > 1 ? crew : Crew{}, [&](int64_t i) { pack(packed, i * matmul.block); });
        together(crew, [&](int thread) {
            MatmulSession session(matmul);
            tickets.share(thread, [&](int64_t i, int64_t next) {
                const T* then = next < 0 ? nullptr : weight + next % column_tasks * step * K;
                task(i / column_tasks * chunk, i % column_tasks * step, then);
            });
        });
    }
};

template <class T>
void linear(int index, int threads, const void* x, const void* w, const void* bias, void* out, bool wide, int64_t rows,
            int64_t N, int64_t K, int groups) {
    const Path& path = *find_path(index);
    const Matmul<T>& matmul = path.matmul((const T*)x);
    int64_t row_bytes = std::max<int64_t>(matmul.packed_width(K, groups) * int64_t(sizeof(T)), 1);
    int64_t most = std::max<int64_t>(PASS_BYTES / row_bytes / CALL_ROWS, 1) * CALL_ROWS;
    for (int64_t row = 0; row < rows; row += most)
        Linear<T>{path, matmul, (const T*)x + row * K, (const T*)w, (const T*)bias,
                  wide ? (float*)out + row * N : nullptr, wide ? nullptr : (T*)out + row * N,
                  std::min(most, rows - row), N, K, groups, 0, 0, nullptr}
            .run(threads);
}

}  // namespace
}  // namespace kernels

KERNELS_EXPORT void kernels_linear(int path, int threads, int dtype, const void* x, const void* w, const void* bias,
                                   void* out, int wide, int64_t rows, int64_t N, int64_t K, int groups) {
    auto run = dtype == kernels::BFLOAT16 ? kernels::linear<kernels::bf16> : kernels::linear<float>;
    run(path, threads, x, w, bias, out, wide != 0, rows, N, K, groups);
}

KERNELS_REPLAY(kernels_linear)
