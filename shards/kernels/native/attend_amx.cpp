// Attention over bfloat16 by AMX tiles: 16 query rows x 32 of the summed axis, times 32 of it x 16 keys or columns, which
// lie in pairs as the path for bfloat16 dot products packs them. What is behind the last row, key or D is zero or unused.
#include "matmul.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define TARGET "avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"
#define ENTRY __attribute__((target(TARGET)))
#define FN inline __attribute__((always_inline, target(TARGET)))

#include "vec_avx512.h"

#include "attend.h"
#include "paired.h"

namespace kernels {
namespace {

struct alignas(64) WholeTiles {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// N <= 4 tiles of c side by side.
template <int N>
FN void tiles(const float* a, int a_stride, const float* b, int b_stride, int steps, bool add, float* c, int c_stride) {
    int64_t a_bytes = int64_t(a_stride) * 4, b_bytes = int64_t(b_stride) * 4, c_bytes = int64_t(c_stride) * 4;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (N > 1) _tile_loadd(1, c + LANES, c_bytes);
        if constexpr (N > 2) _tile_loadd(2, c + 2 * LANES, c_bytes);
        if constexpr (N > 3) _tile_loadd(3, c + 3 * LANES, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (N > 2) _tile_zero(2);
        if constexpr (N > 3) _tile_zero(3);
    }
    for (int s = 0; s < steps; s += LANES) {
        const float* columns = b + int64_t(s) * b_stride;
        _tile_loadd(4, a + s, a_bytes);
        _tile_loadd(5, columns, b_bytes);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (N > 1) _tile_loadd(6, columns + LANES, b_bytes);
        if constexpr (N > 1) _tile_dpbf16ps(1, 4, 6);
        if constexpr (N > 2) _tile_loadd(7, columns + 2 * LANES, b_bytes);
        if constexpr (N > 2) _tile_dpbf16ps(2, 4, 7);
        if constexpr (N > 3) _tile_loadd(5, columns + 3 * LANES, b_bytes);
        if constexpr (N > 3) _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (N > 1) _tile_stored(1, c + LANES, c_bytes);
    if constexpr (N > 2) _tile_stored(2, c + 2 * LANES, c_bytes);
    if constexpr (N > 3) _tile_stored(3, c + 3 * LANES, c_bytes);
}

struct TiledKeys : PairedKeys {
    static constexpr int ROWS = LANES, KEY_STEP = 2 * LANES;
    static FN void product(int rows, const float* a, int a_stride, const float* b, int b_stride, int steps,
                           const float* keep, float* c, int c_stride, int vectors) {
        for (int r = 0; r < rows && keep != nullptr; r++)
            for (int n = 0; n < vectors; n++) {
                float* at = c + r * c_stride + n * LANES;
                write(at, multiply(read(at), fill(keep[r])));
            }
        int n = 0;
        for (; n + 4 <= vectors; n += 4)
            tiles<4>(a, a_stride, b + n * LANES, b_stride, steps, keep != nullptr, c + n * LANES, c_stride);
        for (; n < vectors; n++)
            tiles<1>(a, a_stride, b + n * LANES, b_stride, steps, keep != nullptr, c + n * LANES, c_stride);
    }
};

ENTRY void attend_tiles(Rows<bf16> k, Rows<bf16> v, int keys, Attending& a) {
    static const WholeTiles config;
    _tile_loadconfig(&config);
    attend<TiledKeys>(k, v, keys, a);
    _tile_release();
}

}  // namespace

void (*amx_attend())(Rows<bf16>, Rows<bf16>, int, Attending&) { return attend_tiles; }

}  // namespace kernels
#else
void (*kernels::amx_attend())(Rows<bf16>, Rows<bf16>, int, Attending&) { return nullptr; }
#endif
