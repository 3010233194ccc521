// The inner loops for AVX-512 with bfloat16: products of bfloat16 by the dot-product instruction.
#if defined(__x86_64__)
#define ENTRY __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define FN inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512bf16")))

#include "vec_avx512.h"

#include "paired.h"
#include "table.h"

namespace kernels {
namespace {

// A lane takes two neighbours of K a step; a float's place holds such a pair.
struct Paired {
    using scalar = bf16;
    using stored = bf16;
    static constexpr int DEPTH = 2, ITEMS = 1;
    struct Line {
        vec part[ITEMS];
    };
    static FN vec pairs(__m512i x) { return _mm512_castsi512_ps(x); }
    static FN Line take(const bf16* w) { return {{pairs(_mm512_loadu_si512(w))}}; }
    static FN Line take(const bf16* w, int rows) { return {{pairs(_mm512_maskz_loadu_epi32(lanes(rows), w))}}; }
    static FN Line take_odd(const bf16* w, int rows) {
        return {{pairs(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(rows), w)))}};
    }
    static FN vec add(vec acc, float item, vec part) {
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(int(bits_of(item))), (__m512bh)_mm512_castps_si512(part));
    }
    static FN vec items(const bf16* x) { return pairs(_mm512_loadu_si512(x)); }
    static FN vec items(const bf16* x, int n) { return pairs(_mm512_maskz_loadu_epi16((1u << n) - 1, x)); }
    static FN void put(float* items, int64_t k, int apart, bf16 x) {
        memcpy((char*)(items + k / DEPTH * apart) + k % DEPTH * sizeof x, &x, sizeof x);
    }
};

// Both of a pair in one operand.
template <>
struct IntPairs<Paired, 4> {
    static constexpr int PARTS = 1;
    __m512i words;
    FN explicit IntPairs(const char* unit) : words(_mm512_loadu_si512(unit)) {}
    FN void next(vec (&part)[PARTS]) {
        // -8 .. 7 in bfloat16, twice: of an index five bits count, and the fifth is the next number's.
        alignas(64) static constexpr bf16 NUMBERS[2 * LANES] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
            0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
            0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        part[0] = Paired::pairs(_mm512_permutexvar_epi16(words, _mm512_load_si512(NUMBERS)));
        words = _mm512_srli_epi16(words, 4);
    }
    static FN vec add(vec acc, float item, vec part) { return Paired::add(acc, item, part); }
};

template <>
struct IntPairs<Paired, 8> {
    static constexpr int PARTS = 1;
    Ints<8> unit;
    FN explicit IntPairs(const char* from) : unit(from) {}
    FN void next(vec (&part)[PARTS]) {
        // Integers of 8 bits are the upper halves of their floats.
        vec first, second;
        unit.next(first, second);
        __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
        part[0] = Paired::pairs(_mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(second)));
    }
    static FN vec add(vec acc, float item, vec part) { return Paired::add(acc, item, part); }
};

}  // namespace

const Path* avx512bf16_path() {
    static const Path path = make_path<Paired, PairedKeys>();
    return avx512_path() != nullptr && __builtin_cpu_supports("avx512bf16") ? &path : nullptr;
}

}  // namespace kernels
#else
#include "kernels.h"
const kernels::Path* kernels::avx512bf16_path() { return nullptr; }
#endif
