// Experts: pairs of a token and an expert, sorted by expert, through gate_up and down; the weights of an expert that was
// hit are read once a pass. Three loops: gate_up of all experts, down of all, and the sum over a token's experts.
#include <algorithm>
#include <vector>

#include "matmul.h"
#include "replay.h"
#include "team.h"

namespace kernels {
namespace {

// Packed rows of a chunk stay in the second-level cache while an expert's weights pass by.
constexpr int64_t CHUNK_BYTES = int64_t(1024) << 10;
// Weights of a task where they are what takes time, and tasks a thread: each end of a task costs a pause of the requests
// to memory, so most are whole experts.
constexpr int64_t TASK_BYTES = int64_t(2) << 20;
constexpr int64_t TASKS_A_THREAD = 4;
// How far ahead weights are fetched at least: what memory delivers while one request is under way, and more.
constexpr int64_t LEAD_BYTES = int64_t(64) << 10;
// Most memory for results that wait for their sum: tokens beyond it go in another pass.
constexpr int64_t PASS_BYTES = int64_t(64) << 20;

// From how many rows on results wait in the second-level cache until a task is done: written to memory one by one they
// would hold the buffers that bring x to the first-level cache.
constexpr int64_t ASIDE_ROWS = 32;

// Some rows of one expert: places [first, first + rows) of `order`, rows `panel_row` on of `inner`.
struct Chunk {
    int64_t expert, first, rows, panel_row;
};

// W: where weight rows begin.
template <class W>
struct ExpertWeights {
    W gate_up;  // [E, 2I, C]
    W down;     // [E, C, I]
    int64_t E, C, I;
};

// Where results go: each pair's own, or a sum over the pairs of a token.
template <class T>
struct Results {
    float* wide_out;       // [T, K, C], not rounded, or null
    T* out;                // [T, K, C] or, with weights, [T, C], or null
    const float* weights;  // [T, K], or null
};

template <class T, class W>
class Experts {
  public:
    Experts(const Path& path, const Matmul<T, W>& matmul, const T* x, const int64_t* ids, int64_t tokens, int64_t top_k,
            ExpertWeights<W> weights, int groups, Results<T> results)
        : path_(path), matmul_(matmul), x_(x), ids_(ids), pairs_(tokens * top_k), tokens_(tokens), top_k_(top_k),
          w_(weights), groups_(groups), results_(results) {}

    void run(int threads) {
        sort();
        cut();
        zero_missing();
        Crew crew = crew_for(int64_t(order_.size()) * w_.C * w_.I / 4, threads);
        plan(crew.threads);
        int64_t chunks = int64_t(chunks_.size());
        Tickets first(chunks * gate_tasks_, crew.threads), second(chunks * down_tasks_, crew.threads);
        together(crew, [&](int thread) {
            MatmulSession session(matmul_);
            T* panel = panels_ + thread * panel_size_;
            int64_t held = -1;  // chunk in the panel
            int64_t down = second.first(thread);
            first.share(thread, [&](int64_t i, int64_t next) { gate_task(i, next, down, panel, held); });
        });
        together(crew, [&](int thread) {
            MatmulSession session(matmul_);
            T* results = rows_ + thread * rows_size_;
            second.share(thread, [&](int64_t i, int64_t next) { down_task(i, next, results); });
        });
        if (results_.weights == nullptr) return;
        for_each(tokens_, crew_for(tokens_ * top_k_ * w_.C / 4, threads), [&](int64_t t) { mix(t); });
    }

  private:
    const Path& path_;
    const Matmul<T, W>& matmul_;
    const T* x_;
    const int64_t* ids_;
    int64_t pairs_, tokens_, top_k_;
    ExpertWeights<W> w_;
    int groups_;
    Results<T> results_;
    std::vector<int64_t> starts_;  // [E + 1] first place of each expert in `order_`
    std::vector<int64_t> order_;   // pairs t * top_k + k, by expert
    std::vector<Chunk> chunks_;
    int64_t longest_ = 0, inner_rows_ = 0, gate_step_ = 0, down_step_ = 0, gate_tasks_ = 0, down_tasks_ = 0;
    int64_t panel_size_ = 0, rows_size_ = 0;
    T* panels_ = nullptr;       // a chunk of x a thread
    T* inner_ = nullptr;        // [inner rows, I], packed
    T* rows_ = nullptr;         // results of a task a thread, on their way to memory
    T* waiting_ = nullptr;      // [T, K, C], results that wait for their sum

    // Counting sort.
    void sort() {
        starts_.assign(size_t(w_.E + 1), 0);
        for (int64_t i = 0; i < pairs_; i++)
            if (ids_[i] >= 0) starts_[size_t(ids_[i] + 1)]++;
        for (int64_t e = 0; e < w_.E; e++) starts_[size_t(e + 1)] += starts_[size_t(e)];
        order_.resize(size_t(starts_[size_t(w_.E)]));
        std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
        for (int64_t i = 0; i < pairs_; i++)
            if (ids_[i] >= 0) order_[size_t(next[size_t(ids_[i])]++)] = i;
    }

    void cut() {
        int64_t row_bytes = matmul_.packed_width(w_.C, 1) * int64_t(sizeof(T));
        int64_t most = std::max<int64_t>(CHUNK_BYTES / row_bytes / matmul_.block, 1) * matmul_.block, longest = 0;
        for (int64_t e = 0; e < w_.E; e++) {
            int64_t at = starts_[size_t(e)], end = starts_[size_t(e + 1)], left = blocks_of(end - at, most);
            // Chunks of like size: each reads all weights of its expert.
            for (; left > 0; left--) {
                int64_t rows = std::min(blocks_of(blocks_of(end - at, left), 2 * matmul_.block) * 2 * matmul_.block, end - at);
                chunks_.push_back({e, at, rows, inner_rows_});
                inner_rows_ += matmul_.panel_rows(rows);
                longest = std::max(longest, matmul_.panel_rows(rows));
                longest_ = std::max(longest_, rows);
                at += rows;
            }
        }
        panel_size_ = int64_t(aligned(size_t(longest * row_bytes)) / sizeof(T));
    }

    // Weight rows of a task: small tasks share out better, large ones pack x less often.
    int64_t step_of(int64_t rows, int64_t row_bytes, int64_t unit, int threads) const {
        int64_t chunks = std::max<int64_t>(int64_t(chunks_.size()), 1);
        int64_t step = rows * chunks / (threads * TASKS_A_THREAD);
        if (int64_t(order_.size()) < chunks * 2 * matmul_.block)
            step = std::min(step, TASK_BYTES / std::max<int64_t>(row_bytes, 1));
        return std::max(std::min(step, rows) / unit * unit, unit);
    }

    void plan(int threads) {
        gate_step_ = step_of(w_.I, 2 * row_bytes(w_.gate_up, w_.C), COLUMNS / 2, threads);
        down_step_ = step_of(w_.C, row_bytes(w_.down, w_.I), COLUMNS, threads);
        gate_tasks_ = blocks_of(w_.I, gate_step_), down_tasks_ = blocks_of(w_.C, down_step_);
        int64_t width = matmul_.packed_width(w_.I, groups_);
        size_t panels = size_t(threads * panel_size_) * sizeof(T);
        size_t inner = aligned(size_t(inner_rows_ * width) * sizeof(T));
        rows_size_ = int64_t(aligned(size_t(longest_ * down_step_) * sizeof(T)) / sizeof(T));
        size_t rows = size_t(threads * rows_size_) * sizeof(T);
        size_t waiting = results_.weights == nullptr ? 0 : size_t(pairs_ * w_.C) * sizeof(T);
        char* at = scratch(panels + inner + rows + waiting);
        panels_ = (T*)at, inner_ = (T*)(at + panels), rows_ = (T*)(at + panels + inner);
        waiting_ = (T*)(at + panels + inner + rows);
        // What packing adds to a row, in strips a half of a pair, multiplies weights that are not there: zeros.
        if (matmul_.strips ? w_.I / groups_ % 2 != 0 : width != w_.I) std::fill_n(inner_, inner_rows_ * width, T(0));
        if (results_.weights != nullptr)
            for (int64_t i = 0; i < pairs_; i++)
                if (ids_[i] < 0) std::fill_n(waiting_ + i * w_.C, w_.C, T(0));
    }

    void zero_missing() const {
        if (results_.weights != nullptr) return;
        for (int64_t i = 0; i < pairs_; i++) {
            if (ids_[i] >= 0) continue;
            if (results_.wide_out != nullptr)
                std::fill_n(results_.wide_out + i * w_.C, w_.C, 0.0f);
            else
                std::fill_n(results_.out + i * w_.C, w_.C, T(0));
        }
    }

    W gate_of(int64_t task) const {
        int64_t rows = chunks_[size_t(task / gate_tasks_)].expert * 2 * rows_held(w_.gate_up, w_.I);
        return forward(w_.gate_up, rows + task % gate_tasks_ * gate_step_, w_.C);
    }

    W down_of(int64_t task) const {
        int64_t rows = chunks_[size_t(task / down_tasks_)].expert * rows_held(w_.down, w_.C);
        return forward(w_.down, rows + task % down_tasks_ * down_step_, w_.I);
    }

    void pack(const Chunk& chunk, T* panel) const {
        int64_t width = matmul_.packed_width(w_.C, 1);
        for (int64_t row = 0; row < chunk.rows; row += matmul_.block) {
            const T* xs[BLOCK];
            int count = int(std::min<int64_t>(matmul_.block, chunk.rows - row));
            for (int r = 0; r < count; r++) xs[r] = x_ + order_[size_t(chunk.first + row + r)] / top_k_ * w_.C;
            matmul_.pack(xs, count, w_.C, 1, panel + row * width);
        }
    }

    // What to fetch while the last columns of a task are computed: the next task's, or the first of `down`.
    Ahead after_gate(int64_t next, int64_t down) const {
        int64_t bytes = row_bytes(w_.gate_up, w_.C), width = COLUMNS / 2;
        if (next >= 0) return {address(gate_of(next)), std::min(width, w_.I) * bytes,
                               rows_held(w_.gate_up, w_.I) * bytes};
        return {address(down_of(down)), std::min(lead_columns(), w_.C) * row_bytes(w_.down, w_.I)};
    }

    // How far ahead rows of down are fetched.
    int64_t lead_columns() const {
        if (matmul_.strips) return COLUMNS;
        int64_t bytes = COLUMNS * row_bytes(w_.down, w_.I);
        return blocks_of(LEAD_BYTES, std::max<int64_t>(bytes, 1)) * COLUMNS;
    }

    void gate_task(int64_t task, int64_t next, int64_t down, T* panel, int64_t& held) const {
        const Chunk& chunk = chunks_[size_t(task / gate_tasks_)];
        if (held != task / gate_tasks_) {
            pack(chunk, panel);
            held = task / gate_tasks_;
        }
        int64_t column = task % gate_tasks_ * gate_step_, end = std::min(column + gate_step_, w_.I);
        int64_t width = matmul_.packed_width(w_.C, 1), inner_width = matmul_.packed_width(w_.I, groups_);
        int64_t bytes = row_bytes(w_.gate_up, w_.C);
        W gate = gate_of(task), up = forward(gate, rows_held(gate, w_.I), w_.C);
        if (matmul_.few_gate_up != nullptr) {
            Lead lead{COLUMNS / 2, after_gate(next, down)};
            if (matmul_.few_gate_up(panel, int(chunk.rows), gate, up, int(end - column), w_.C, lead,
                                    inner_ + chunk.panel_row * inner_width, w_.I, column, groups_))
                return;
        }
        for (; column < end; column += COLUMNS / 2) {
            int columns = int(std::min<int64_t>(COLUMNS / 2, end - column));
            Ahead ahead(address(forward(gate, COLUMNS / 2, w_.C)), columns * bytes,
                        rows_held(gate, w_.I) * bytes);
            if (column + columns >= end) ahead = after_gate(next, down);
            for (int64_t r = 0; r < chunk.rows; r += matmul_.call_rows(), ahead.lines = 0) {
                int rows = int(std::min(matmul_.call_rows(), chunk.rows - r));
                matmul_.gate_up(panel + r * width, rows, gate, up, columns, w_.C, ahead,
                                inner_ + (chunk.panel_row + r) * inner_width, w_.I, column, groups_);
            }
            gate = forward(gate, COLUMNS / 2, w_.C);
            up = forward(up, COLUMNS / 2, w_.C);
        }
    }

    void down_task(int64_t task, int64_t next, T* mine) const {
        const Chunk& chunk = chunks_[size_t(task / down_tasks_)];
        int64_t column = task % down_tasks_ * down_step_, end = std::min(column + down_step_, w_.C);
        int64_t width = matmul_.packed_width(w_.I, groups_);
        W down = down_of(task);
        int64_t lead = std::min(lead_columns(), end - column);
        alignas(64) float sums[CALL_ROWS * COLUMNS];
        bool aside = chunk.rows > ASIDE_ROWS && results_.wide_out == nullptr;
        int64_t first = column;
        if (matmul_.few_round_to != nullptr && chunk.rows <= matmul_.block && results_.wide_out == nullptr) {
            T* to[BLOCK];
            places(chunk.first, int(chunk.rows), column, to);
            Lead ahead{int(lead), next < 0 ? Ahead() : Ahead(address(down_of(next)), lead * row_bytes(down, w_.I))};
            if (matmul_.few_round_to(inner_ + chunk.panel_row * width, int(chunk.rows), down, int(end - column), w_.I,
                                     groups_, ahead, to))
                return;
        }
        for (; column < end; column += COLUMNS) {
            int columns = int(std::min<int64_t>(COLUMNS, end - column));
            const void* after = address(forward(down, lead, w_.I));
            if (column + lead >= end) after = next < 0 ? nullptr : address(forward(down_of(next), column + lead - end, w_.I));
            Ahead ahead(after, columns * row_bytes(down, w_.I));
            for (int64_t r = 0; r < chunk.rows; r += matmul_.call_rows(), ahead.lines = 0) {
                int rows = int(std::min(matmul_.call_rows(), chunk.rows - r));
                const T* panel = inner_ + (chunk.panel_row + r) * width;
                T* to[CALL_ROWS];
                if (results_.wide_out == nullptr) {
                    if (aside)
                        for (int i = 0; i < rows; i++) to[i] = mine + (r + i) * down_step_ + column - first;
                    else
                        places(chunk.first + r, rows, column, to);
                    matmul_.round_to(panel, rows, down, columns, w_.I, groups_, ahead, to);
                } else {
                    matmul_.multiply(panel, rows, down, columns, w_.I, groups_, ahead, sums);
                    put(sums, chunk.first + r, rows, column, columns);
                }
            }
            down = forward(down, COLUMNS, w_.I);
        }
        if (!aside) return;
        for (int64_t r = 0; r < chunk.rows; r++) {
            T* to;
            places(chunk.first + r, 1, first, &to);
            std::copy_n(mine + r * down_step_, end - first, to);
        }
    }

    // Where the rounded results of `rows` places go.
    void places(int64_t first, int rows, int64_t column, T** to) const {
        T* base = results_.weights != nullptr ? waiting_ : results_.out;
        for (int r = 0; r < rows; r++) to[r] = base + order_[size_t(first + r)] * w_.C + column;
    }

    void put(const float* sums, int64_t first, int rows, int64_t column, int columns) const {
        for (int r = 0; r < rows; r++, sums += COLUMNS)
            std::copy_n(sums, columns, results_.wide_out + order_[size_t(first + r)] * w_.C + column);
    }

    // The weighted sum over the results of token `t`.
    void mix(int64_t t) const {
        path_.rows(x_).combine(waiting_ + t * top_k_ * w_.C, results_.weights + t * top_k_, top_k_, w_.C,
                               results_.out + t * w_.C);
    }
};

// What a call is given beside weights.
struct Call {
    int path, threads;
    const void* x;
    const int64_t* ids;
    const float* mix;
    void* out;
    bool wide;
    int64_t tokens, top_k;
    int groups;
};

template <class T, class W>
void experts(const Call& call, const Matmul<T, W>& matmul, const ExpertWeights<W>& weights) {
    const Path& path = *find_path(call.path);
    const T* x = (const T*)call.x;
    if (call.mix == nullptr) {
        Results<T> each = {call.wide ? (float*)call.out : nullptr, call.wide ? nullptr : (T*)call.out, nullptr};
        Experts<T, W>(path, matmul, x, call.ids, call.tokens, call.top_k, weights, call.groups, each).run(call.threads);
        return;
    }
    int64_t row_bytes = std::max<int64_t>(call.top_k * weights.C * int64_t(sizeof(T)), 1);
    int64_t most = std::max<int64_t>(PASS_BYTES / row_bytes, CALL_ROWS);
    for (int64_t t = 0; t < call.tokens; t += most) {
        Results<T> sums = {nullptr, (T*)call.out + t * weights.C, call.mix + t * call.top_k};
        Experts<T, W>(path, matmul, x + t * weights.C, call.ids + t * call.top_k, std::min(most, call.tokens - t),
                      call.top_k, weights, call.groups, sums)
            .run(call.threads);
    }
}

bool ids_fit(const Call& call, int64_t E) {
    for (int64_t i = 0; i < call.tokens * call.top_k; i++)
        if (call.ids[i] >= E) return false;
    return true;
}

template <class T>
void plain_experts(const Call& call, const void* gate_up, const void* down, int64_t E, int64_t C, int64_t I) {
    const Matmul<T>& matmul = find_path(call.path)->matmul((const T*)nullptr);
    experts<T, const T*>(call, matmul, {(const T*)gate_up, (const T*)down, E, C, I});
}

template <class T>
void int_experts(const Call& call, const IntRows& gate_up, const IntRows& down, int64_t E, int64_t C, int64_t I) {
    experts<T, IntRows>(call, find_path(call.path)->ints((const T*)nullptr), {gate_up, down, E, C, I});
}

}  // namespace
}  // namespace kernels

// With `mix` [T, K] the weighted sum over K of rounded results goes to out [T, C], else every result, rounded or `wide`, to
// out [T, K, C]. Returns 0, or 1 when an expert id is too large.
KERNELS_EXPORT int kernels_experts(int path, int threads, int dtype, const void* x, const int64_t* ids, const float* mix,
                                   const void* gate_up, const void* down, void* out, int wide, int64_t tokens,
                                   int64_t top_k, int64_t E, int64_t C, int64_t I, int groups) {
    kernels::Call call = {path, threads, x, ids, mix, out, wide != 0, tokens, top_k, groups};
    if (!kernels::ids_fit(call, E)) return 1;
    auto run = dtype == kernels::BFLOAT16 ? kernels::plain_experts<kernels::bf16> : kernels::plain_experts<float>;
    run(call, gate_up, down, E, C, I);
    return 0;
}

// The same of weights in integers (shards/int_weights.py) of `bits`, with a scale for each `gate_up_group` of C and
// `down_group` of I, which divides I / groups.
KERNELS_EXPORT int kernels_int_experts(int path, int threads, int dtype, const void* x, const int64_t* ids,
                                       const float* mix, const void* gate_up, const void* gate_up_scales,
                                       const void* down, const void* down_scales, void* out, int wide, int64_t tokens,
                                       int64_t top_k, int64_t E, int64_t C, int64_t I, int groups, int bits,
                                       int scale_type, int64_t gate_up_group, int64_t down_group) {
    kernels::Call call = {path, threads, x, ids, mix, out, wide != 0, tokens, top_k, groups};
    if (!kernels::ids_fit(call, E)) return 1;
    kernels::IntRows first = {(const char*)gate_up, (const char*)gate_up_scales, gate_up_group, bits, scale_type};
    kernels::IntRows second = {(const char*)down, (const char*)down_scales, down_group, bits, scale_type};
    auto run = dtype == kernels::BFLOAT16 ? kernels::int_experts<kernels::bf16> : kernels::int_experts<float>;
    run(call, first, second, E, C, I);
    return 0;
}

KERNELS_REPLAY(kernels_experts)
KERNELS_REPLAY(kernels_int_experts)
