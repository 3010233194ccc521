// Behind the tokens that a step has drawn: which drafts were right, and what drafting anew needs. Rows draw behind each of
// their positions; their tokens, and the step's, lie one row after the other.
#include <cstring>

#include "kernels.h"
#include "places.h"
#include "replay.h"

using namespace kernels;

// Row s, rows[s] of tokens [rows, L], computed counts[s] positions from first[s] on, all but the first of them drafts, and
// drew a token behind each. kept[s]: right drafts and the draw behind the last of them. All draws go to their places; for one
// that is no token a token that can be embedded, as in next. last[s]: which of the step's tokens the last draw that stays is
// behind. replay[s + 1] - replay[s]: over how many tokens the state of a row that verified drafts advances.
KERNELS_EXPORT void kernels_accept(const int64_t* rows, const int64_t* first, const int64_t* counts,
                                   const int64_t* drawn, int64_t* tokens, int64_t* kept, int64_t* next, int64_t* last,
                                   int64_t* replay, int64_t S, int64_t L) {
    int64_t begin = 0;
    replay[0] = 0;
    for (int64_t s = 0; s < S; s++) {
        int64_t* held = tokens + rows[s] * L + first[s] + 1;
        int64_t right = 0, drafts = counts[s] - 1;
        while (right < drafts && drawn[begin + right] == held[right]) right++;
        for (int64_t i = 0; i <= drafts; i++) held[i] = next[begin + i] = drawn[begin + i] < 0 ? 0 : drawn[begin + i];
        kept[s] = right + 1;
        last[s] = begin + right;
        replay[s + 1] = replay[s] + (drafts ? right + 1 : 0);
        begin += counts[s];
    }
}

// Of each row the first replay[s + 1] - replay[s] of its tokens, which begin at starts[s], one row after the other.
KERNELS_EXPORT void kernels_take_spans(const char* x, const int64_t* starts, const int64_t* replay, char* out, int64_t S,
                                       int64_t row_bytes) {
    for (int64_t s = 0; s < S; s++)
        std::memcpy(out + replay[s] * row_bytes, x + starts[s] * row_bytes,
                    size_t((replay[s + 1] - replay[s]) * row_bytes));
}

// a beside b: [T, a_bytes + b_bytes].
KERNELS_EXPORT void kernels_beside(const char* a, const char* b, char* out, int64_t T, int64_t a_bytes, int64_t b_bytes) {
    for (int64_t t = 0; t < T; t++, out += a_bytes + b_bytes) {
        std::memcpy(out, a + t * a_bytes, size_t(a_bytes));
        std::memcpy(out + a_bytes, b + t * b_bytes, size_t(b_bytes));
    }
}

namespace {

// The position that a row drafts from; one that does not draft this far stays behind its last draw, which is computed.
int64_t draft_from(const int64_t* first, const int64_t* kept, const int64_t* drafts, int64_t s, int64_t depth) {
    return first[s] + kept[s] - 1 + (drafts[s] > depth ? depth : 0);
}

}  // namespace

// The tensors of a step of the draft layer that drafts for the depth'th time (0 is the first) behind rows that have drawn
// their tokens: one position a row, and the token behind it. Rows that draft less far take part and store nothing.
KERNELS_EXPORT void kernels_draft_inputs(const int64_t* rows, const int64_t* first, const int64_t* kept,
                                         const int64_t* drafts, const int64_t* tokens, const int32_t* tables,
                                         const int64_t* stored, const float* cos, const float* sin, int64_t* next_out,
                                         float* cos_out, float* sin_out, int64_t* slot_out, int32_t* table_out,
                                         int64_t* context_out, int64_t S, int64_t L, int64_t B, int64_t R, int64_t P,
                                         int64_t depth) {
    Places places{tokens, tables, stored, cos, sin, L, B, R, P};
    for (int64_t s = 0; s < S; s++) {
        int64_t row = rows[s], at = draft_from(first, kept, drafts, s, depth);
        next_out[s] = places.token(row, at + 1);
        places.rotary(at, cos_out + s * R, sin_out + s * R);
        slot_out[s] = drafts[s] > depth ? places.slot(row, at) : -1;
        places.table(row, at, table_out + s * B);
        context_out[s] = at + 1;
    }
}

// Each row's draft to the place two behind the position it was drafted from.
KERNELS_EXPORT void kernels_store_drafts(const int64_t* rows, const int64_t* first, const int64_t* kept,
                                         const int64_t* drafts, const int64_t* drafted, int64_t* tokens, int64_t S,
                                         int64_t L, int64_t depth) {
    for (int64_t s = 0; s < S; s++) {
        if (drafts[s] <= depth) continue;
        int64_t at = draft_from(first, kept, drafts, s, depth);
        tokens[rows[s] * L + at + 2] = drafted[s] < 0 ? 0 : drafted[s];
    }
}

KERNELS_REPLAY(kernels_accept)
KERNELS_REPLAY(kernels_take_spans)
KERNELS_REPLAY(kernels_beside)
KERNELS_REPLAY(kernels_draft_inputs)
KERNELS_REPLAY(kernels_store_drafts)
