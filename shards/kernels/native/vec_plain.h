// Vectors of 16 floats in the compiler's own vector type: SSE2, NEON or whatever the machine's baseline has.
#pragma once

#include "kernels.h"

namespace kernels {
namespace {

typedef float vec __attribute__((vector_size(64)));

// Rows of x that a tile of products takes.
constexpr int TILE_ROWS = 2;
// Attention's tiles: rows, and vectors of keys or columns.
constexpr int ATTEND_ROWS = 2, ATTEND_VECS = 1;

FN vec zero() { return vec{}; }
FN vec fill(float x) { return vec{} + x; }
FN vec plus(vec a, vec b) { return a + b; }
FN vec multiply(vec a, vec b) { return a * b; }
FN vec subtract(vec a, vec b) { return a - b; }
FN vec fused(vec a, vec b, vec c) { return a * b + c; }
FN vec read(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
FN vec read(const bf16* p) {
    vec x;
    for (int i = 0; i < LANES; i++) x[i] = load(p + i);
    return x;
}
template <class T>
FN vec read(const T* p, int n) {
    T padded[LANES] = {};
    for (int i = 0; i < n; i++) padded[i] = p[i];
    return read(padded);
}
// The firsts and the seconds of n pairs.
FN void read_pairs(const bf16* p, int n, vec& first, vec& second) {
    first = second = zero();
    for (int i = 0; i < n; i++) {
        first[i] = load(p + 2 * i);
        second[i] = load(p + 2 * i + 1);
    }
}
FN void read_pairs(const bf16* p, vec& first, vec& second) { read_pairs(p, LANES, first, second); }
FN vec read_halves(const uint16_t* p) {
    vec x;
    for (int i = 0; i < LANES; i++) x[i] = load_half(p[i]);
    return x;
}
// A unit of integers (ints.h): the firsts and the seconds of each pair of columns, pair by pair.
template <int BITS>
struct Ints {
    const char* unit;
    int pair = 0;
    FN explicit Ints(const char* from) : unit(from) {}
    FN float number(int place) const {
        if (BITS == 8) return float(((const signed char*)unit)[pair * 2 * LANES + place]);
        uint16_t word;
        memcpy(&word, unit + place * sizeof word, sizeof word);
        return float(word >> 4 * pair & 15) - 8.0f;
    }
    FN void next(vec& first, vec& second) {
        for (int i = 0; i < LANES; i++) {
            first[i] = number(2 * i);
            second[i] = number(2 * i + 1);
        }
        pair++;
    }
};
FN void write(float* p, vec x) { memcpy(p, &x, sizeof x); }
FN void write(float* p, vec x, int n) {
    for (int i = 0; i < n; i++) p[i] = x[i];
}
// Write, and give x as it reads back.
FN vec put(float* p, vec x) {
    write(p, x);
    return x;
}
FN vec put(float* p, vec x, int n) {
    write(p, x, n);
    return x;
}
FN vec put(bf16* p, vec x) {
    for (int i = 0; i < LANES; i++) store(p + i, x[i]);
    return read(p);
}
FN vec put(bf16* p, vec x, int n) {
    for (int i = 0; i < n; i++) store(p + i, x[i]);
    return read(p, n);
}
// x[i] lane j becomes x[j] lane i.
FN void transpose(vec* x) {
    float lane[LANES][LANES], turned[LANES][LANES];
    for (int i = 0; i < LANES; i++) write(lane[i], x[i]);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) turned[i][j] = lane[j][i];
    for (int i = 0; i < LANES; i++) x[i] = read(turned[i]);
}

}  // namespace
}  // namespace kernels
