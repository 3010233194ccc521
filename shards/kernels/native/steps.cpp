// What a step begins and ends with: the rows' tokens and places, embeddings, and the tokens that are chosen.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "places.h"
#include "replay.h"

using namespace kernels;

// Rows of a table of `held` rows that starts with id `first`; zeros for ids that are not in it.
KERNELS_EXPORT void kernels_embed(const char* table, const int64_t* ids, char* out, int64_t count, int64_t row_bytes,
                                  int64_t first, int64_t held) {
    for (int64_t t = 0; t < count; t++, out += row_bytes) {
        int64_t row = ids[t] - first;
        if (row < 0 || row >= held)
            std::memset(out, 0, size_t(row_bytes));
        else
            std::memcpy(out, table + row * row_bytes, size_t(row_bytes));
    }
}

// ids counted from `first`, -1 for those that are not among the `held` from there on.
KERNELS_EXPORT void kernels_local_ids(const int64_t* ids, int64_t* out, int64_t count, int64_t first, int64_t held) {
    for (int64_t i = 0; i < count; i++) {
        int64_t local = ids[i] - first;
        out[i] = local < 0 || local >= held ? -1 : local;
    }
}

// The tensors of a step that computes counts[s] positions, from first[s] on, of each of S rows, as Rows.tensors of
// shards/rows.py makes them. tokens [rows, L], tables [rows, B], stored and states [rows] are those of all rows; the tables that
// are made are B wide too, and filled as far as a row's context reaches.
KERNELS_EXPORT void kernels_decode_inputs(const int64_t* rows, const int64_t* first, const int64_t* counts,
                                          const int64_t* tokens, const int32_t* tables, const int64_t* stored,
                                          const int64_t* states, const float* cos, const float* sin, int64_t* token_out,
                                          float* cos_out, float* sin_out, int64_t* slot_out, int32_t* table_out,
                                          int64_t* start_out, int64_t* context_out, int64_t* state_out, bool* fresh_out,
                                          bool* advance_out, int64_t S, int64_t L, int64_t B, int64_t R, int64_t P) {
    Places places{tokens, tables, stored, cos, sin, L, B, R, P};
    int64_t t = 0;
    start_out[0] = 0;
    for (int64_t s = 0; s < S; s++) {
        int64_t row = rows[s], end = first[s] + counts[s];
        for (int64_t at = first[s]; at < end; at++, t++) {
            token_out[t] = places.token(row, at);
            places.rotary(at, cos_out + t * R, sin_out + t * R);
            slot_out[t] = places.slot(row, at);
        }
        places.table(row, end - 1, table_out + s * B);
        start_out[s + 1] = t;
        context_out[s] = end;
        state_out[s] = states[row];
        fresh_out[s] = first[s] == 0;
        advance_out[s] = counts[s] == 1;
    }
}

// Pairs [rows, 2] of each row's largest number and its place, counted from `first`. The number is NaN where one of the row is
// NaN or the largest is infinite; where all are minus infinity it is that.
KERNELS_EXPORT void kernels_best_of_part(int path, const float* logits, double* pairs, int64_t rows, int64_t V,
                                         int64_t stride, int64_t first) {
    const Path& loops = *find_path(path);
    for (int64_t r = 0; r < rows; r++, logits += stride, pairs += 2) {
        int64_t at = V > 0 ? loops.best(logits, V) : -1;
        bool none = true;
        for (int64_t v = 0; at < 0 && none && v < V; v++) none = logits[v] == -INFINITY;
        pairs[0] = at >= 0 ? double(logits[at]) : none ? -INFINITY : NAN;
        pairs[1] = double(first + at);
    }
}

// The best of `parts` x [rows, 2] pairs, of equals the first part's -> a token a row, or -1 where there is none.
KERNELS_EXPORT void kernels_best_of_pairs(const double* pairs, int64_t* tokens, int64_t parts, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        double best = -INFINITY;
        tokens[r] = -1;
        for (int64_t p = 0; p < parts; p++) {
            const double* pair = pairs + 2 * (p * rows + r);
            if (pair[0] != pair[0]) {
                tokens[r] = -1;
                break;
            }
            if (pair[0] <= best) continue;
            best = pair[0];
            tokens[r] = int64_t(pair[1]);
        }
    }
}

KERNELS_REPLAY(kernels_embed)
KERNELS_REPLAY(kernels_local_ids)
KERNELS_REPLAY(kernels_decode_inputs)
KERNELS_REPLAY(kernels_best_of_part)
KERNELS_REPLAY(kernels_best_of_pairs)
