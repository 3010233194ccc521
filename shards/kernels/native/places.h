// Where positions of rows lie: what a step has to know of each of them. As Rows.tensors of shards/rows.py.
#pragma once

#include <cstdint>
#include <cstring>

namespace kernels {

// Those of all rows of a rank: tokens [rows, L], tables [rows, B], stored [rows], cos and sin [.., R]; P positions a block.
struct Places {
    const int64_t* tokens;
    const int32_t* tables;
    const int64_t* stored;
    const float *cos, *sin;
    int64_t L, B, R, P;

    int64_t token(int64_t row, int64_t at) const { return tokens[row * L + at]; }

    // Where its KV goes; -1: nowhere, it is there already.
    int64_t slot(int64_t row, int64_t at) const {
        return at < stored[row] ? -1 : tables[row * B + at / P] * P + at % P;
    }

    void rotary(int64_t at, float* cos_out, float* sin_out) const {
        std::memcpy(cos_out, cos + at * R, size_t(R) * sizeof(float));
        std::memcpy(sin_out, sin + at * R, size_t(R) * sizeof(float));
    }

    // The blocks of positions 0 .. at.
    void table(int64_t row, int64_t at, int32_t* out) const {
        std::memcpy(out, tables + row * B, size_t(at / P + 1) * sizeof(int32_t));
    }
};

}  // namespace kernels
