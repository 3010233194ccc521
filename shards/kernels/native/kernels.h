// What the native operators share: number formats, exp, and the table of functions that each instruction set fills.
//
// The contract: a result row has the same bits whatever rows are computed with it. So a sum always runs in one order
// that depends on its own length only, and every element of a vector goes through the same IEEE operations (the build
// forbids the compiler to fuse or reorder them; where we fuse, we say so by intrinsics).
#pragma once

#include <cstdint>
#include <cstring>

#define KERNELS_EXPORT extern "C" __attribute__((visibility("default")))

namespace kernels {

constexpr int ABI = 7;

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

using bf16 = uint16_t;

// Lanes of every vector in this library, real or emulated: sums over K use this many partial sums.
constexpr int LANES = 16;
// Weight rows that a product takes at once: two strips or tiles of them.
constexpr int COLUMNS = 2 * LANES;
// Key positions that attention takes at once, counted from position 0.
constexpr int KEYS = 64;
// Most query rows that attention takes over a block of keys at once.
constexpr int QUERY_ROWS = 64;

template <class T>
using Rows = const T* const*;

template <class T, class W>
struct Matmul;
struct IntRows;

// Query rows on their way over the keys of one sequence: online softmax (Milakov and Gimelshein, 2018).
struct Attending {
    int rows, D;
    int stride;  // floats between rows of `acc`: D rounded up to 2 * LANES
    float scale;
    int* counts;   // keys of the block (or range) that each row may see; may be below 0
    float* top;    // largest score so far
    float* total;  // sum of weights e^(score - top) so far
    float* acc;    // [rows, stride] weighted sum of values so far
    // Room for QUERY_ROWS rows over one block: what it leaves of earlier weights, and the path's own layouts of
    // `stride` x KEYS floats at most.
    float *keep, *queries, *keys, *values, *scores, *weights;
};

// `a` over a whole range of keys from a clean start; k and v point to rows of zeros behind `keys`, up to a multiple of
// 2 * LANES.
using AttendRange = void (*)(Rows<bf16> q, Rows<bf16> k, Rows<bf16> v, int keys, const Attending& a);
// By AMX tiles; null where the compiler knows none.
AttendRange amx_attend_range();

// Loops over single rows; all round where transformers does.
template <class T>
struct RowLoops {
    // sum = x + y, and its RMS norm; without y that of x.
    void (*add_norm)(const T* x, const T* y, const T* weight, T* sum, T* out, int64_t D, float eps, bool zero_centred);
    // weight * rms(x) * silu(gate), of x as T holds it.
    void (*gated_norm)(const float* x, const T* gate, const T* weight, T* out, int64_t D, float eps);
    // RMS norm (without weight: none) and rotary of one head.
    void (*turn_head)(const T* x, const T* weight, float eps, bool zero_centred, const float* cos, const float* sin,
                      int64_t D, int64_t R, T* out);
    // acc / total, times sigmoid(gate) where there is one.
    void (*finish_head)(const float* acc, float total, const T* gate, int64_t D, T* out);
    void (*silu_mul)(const T* gate, const T* up, T* out, int64_t I);
    void (*softmax)(const T* logits, int64_t E, float* p);
    // Sum over K of weight * y [K, C].
    void (*combine)(const T* y, const float* weights, int64_t K, int64_t C, T* out);
    // x + shared * sigmoid(*gate)
    void (*add_gated)(const T* x, const T* shared, const T* gate, int64_t C, T* out);
    void (*widen)(const T* from, int64_t n, float* to);
    // silu of the sum over W rows of window * taps, both [W, channels], as T holds it.
    void (*convolve)(const float* window, int64_t channels, const float* taps, int W, float* out);
};

// Tokens of one value head: state [Dk, columns], k and q [tokens, Dk], v and out [tokens, columns], with the floats from
// one row to the next.
template <class T>
struct DeltaTile {
    T* state;  // rounded to T behind every token
    int64_t stride, v_stride, out_stride;
    int Dk, columns, tokens;
    const float *k, *q, *v, *beta, *decay;
    float* out;
};

// The inner loops of one instruction set.
struct Path {
    // Lay out the query rows of `a` for its key blocks.
    void (*take_queries_f32)(Rows<float> q, const Attending& a);
    void (*take_queries_bf16)(Rows<bf16> q, const Attending& a);
    // Take `a` over a block of `keys` <= KEYS keys and values; KEYS pointers each, behind `keys` to rows of zeros.
    void (*attend_f32)(Rows<float> k, Rows<float> v, int keys, Attending& a);
    void (*attend_bf16)(Rows<bf16> k, Rows<bf16> v, int keys, Attending& a);
    // Query rows merge what they have of one more range of keys: largest scores, sums of weights, weighted sums.
    void (*merge)(const Attending& into, const Attending& range);
    const RowLoops<float>* rows_f32;
    const RowLoops<bf16>* rows_bf16;
    // x / |x| * scale
    void (*unit)(const float* x, int64_t n, float scale, float* out);
    // The first largest of n numbers, or -1 where one is NaN or the largest is infinite.
    int64_t (*best)(const float* x, int64_t n);
    // A value head's tokens through the gated delta rule.
    void (*delta_f32)(const DeltaTile<float>& tile);
    void (*delta_bf16)(const DeltaTile<bf16>& tile);
    // Products for linear layers and experts; see matmul.h.
    const Matmul<float, const float*>* matmul_f32;
    const Matmul<bf16, const bf16*>* matmul_bf16;
    const Matmul<float, IntRows>* ints_f32;
    const Matmul<bf16, IntRows>* ints_bf16;
    // out = sums + bias (null: none) in out's type; n of them.
    void (*finish_f32)(const float* sums, const float* bias, int n, float* out);
    void (*finish_bf16)(const float* sums, const bf16* bias, int n, bf16* out);
    // Instead of take_queries_bf16 and attend_bf16, any number of query rows over a range; null: there is no such way.
    AttendRange attend_range_bf16;

    const RowLoops<float>& rows(const float*) const { return *rows_f32; }
    const RowLoops<bf16>& rows(const bf16*) const { return *rows_bf16; }
    void take_queries(Rows<float> q, const Attending& a) const { take_queries_f32(q, a); }
    void take_queries(Rows<bf16> q, const Attending& a) const { take_queries_bf16(q, a); }
    void attend(Rows<float> k, Rows<float> v, int keys, Attending& a) const { attend_f32(k, v, keys, a); }
    void attend(Rows<bf16> k, Rows<bf16> v, int keys, Attending& a) const { attend_bf16(k, v, keys, a); }
    AttendRange attend_range(const float*) const { return nullptr; }
    AttendRange attend_range(const bf16*) const { return attend_range_bf16; }
    void delta(const DeltaTile<float>& tile) const { delta_f32(tile); }
    void delta(const DeltaTile<bf16>& tile) const { delta_bf16(tile); }
    const Matmul<float, const float*>& matmul(const float*) const { return *matmul_f32; }
    const Matmul<bf16, const bf16*>& matmul(const bf16*) const { return *matmul_bf16; }
    const Matmul<float, IntRows>& ints(const float*) const { return *ints_f32; }
    const Matmul<bf16, IntRows>& ints(const bf16*) const { return *ints_bf16; }
    void finish(const float* sums, const float* bias, int n, float* out) const { finish_f32(sums, bias, n, out); }
    void finish(const float* sums, const bf16* bias, int n, bf16* out) const { finish_bf16(sums, bias, n, out); }
};

// Null where this machine cannot run it. 0 plain, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 dot products, 4 the same
// with AMX tiles.
constexpr int PATHS = 5;
const Path* find_path(int index);
const Path* plain_path();
const Path* avx2_path();
const Path* avx512_path();
const Path* avx512bf16_path();
const Path* amx_path();

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) { return float_of(uint32_t(*p) << 16); }
static inline void store(float* p, float x) { *p = x; }
// Round to nearest, ties to even; NaN stays NaN.
static inline void store(bf16* p, float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = bf16(x != x ? 0x7fc0 : rounded);
}

// The float of a float16's bits.
static inline float load_half(uint16_t half) {
    // Moving the exponent's end also makes subnormal numbers right; those of all ones are not numbers.
    float x = float_of(uint32_t(half & 0x7fff) << 13) * float_of(uint32_t(127 + 112) << 23);
    uint32_t bits = (half & 0x7c00) == 0x7c00 ? bits_of(x) | 0x7f800000u : bits_of(x);
    return float_of(bits | uint32_t(half & 0x8000) << 16);
}

// x as it reads back from storage in T: the rounding points of a model in bfloat16.
template <class T>
static inline float rounded(float x) {
    T stored;
    store(&stored, x);
    return load(&stored);
}

// e^x to about 1 ulp, from additions and multiplications only, so that a vectorised loop gives the same bits.
static inline float exp_f32(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -110.0f ? -110.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    float shifted = x * 1.44269504f + shift;
    float n = shifted - shift;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = (p * (r * r) + r) + 1.0f;
    // 2^n in two factors: one alone would overflow at the ends of the range.
    int32_t power = int32_t(bits_of(shifted) - bits_of(shift));
    int32_t half = power >> 1;
    y = y * float_of(uint32_t(half + 127) << 23);
    return y * float_of(uint32_t(power - half + 127) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }
static inline float silu(float x) { return x / (1.0f + exp_f32(-x)); }

// Sum of LANES partial sums, in one fixed order.
static inline float sum_lanes(const float* lane) {
    float a[8], b[4];
    for (int i = 0; i < 8; i++) a[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++) b[i] = a[i] + a[i + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

template <class T>
static inline float sum_of_squares(const T* x, int64_t n) {
    float lane[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int l = 0; l < LANES; l++) {
            float value = load(x + i + l);
            lane[l] += value * value;
        }
    }
    for (int l = 0; i + l < n; l++) {
        float value = load(x + i + l);
        lane[l] += value * value;
    }
    return sum_lanes(lane);
}

}  // namespace kernels
