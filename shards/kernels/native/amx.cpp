// Products of bfloat16 by AMX tiles: 16 weight rows x 32 of K, straight from the row-major weights, times 32 of K x 16
// rows of x, which are packed in pairs of K. A sum walks K in steps of 32 whatever is beside it in the tile.
#include "matmul.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16"
#define ENTRY __attribute__((target(TARGET)))
#define FN inline __attribute__((always_inline, target(TARGET)))

namespace kernels {
namespace {

constexpr int STEP = 32;                // of K, a tile
constexpr int TILE = BLOCK * STEP;      // bfloat16 of a tile
constexpr int SUMS = BLOCK * BLOCK;     // floats of a tile of sums
constexpr int LINE = 64;                // bytes

int64_t steps_of(int64_t K, int groups) { return blocks_of(K / groups, STEP); }

int64_t packed_width(int64_t K, int groups) { return groups * steps_of(K, groups) * STEP; }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

ENTRY void enter() {
    static const TileConfig config;
    _tile_loadconfig(&config);
}

ENTRY void leave() { _tile_release(); }

// Rows become columns.
FN void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), odd = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// `left` of K of up to 16 rows -> a tile [pairs of K][16 rows of x][2].
FN void pack_tile(Rows<bf16> x, int rows, int64_t k, int left, bf16* to) {
    __mmask32 here = left < STEP ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
    if (rows <= 4) {
        alignas(64) uint32_t pairs[BLOCK];
        for (int p = 0; p < BLOCK; p++) _mm512_store_si512(to + p * STEP, _mm512_setzero_si512());
        for (int r = 0; r < rows; r++) {
            _mm512_store_si512(pairs, _mm512_maskz_loadu_epi16(here, x[r] + k));
            for (int p = 0; p < BLOCK; p++) memcpy(to + p * STEP + 2 * r, pairs + p, sizeof(uint32_t));
        }
        return;
    }
    __m512i row[BLOCK];
    for (int r = 0; r < BLOCK; r++)
        row[r] = r < rows ? _mm512_maskz_loadu_epi16(here, x[r] + k) : _mm512_setzero_si512();
    transpose(row);
    for (int p = 0; p < BLOCK; p++) _mm512_store_si512(to + p * STEP, row[p]);
}

ENTRY void pack(Rows<bf16> x, int rows, int64_t K, int groups, bf16* to) {
    int64_t width = K / groups;
    for (int g = 0; g < groups; g++)
        for (int64_t k = 0; k < width; k += STEP, to += TILE)
            pack_tile(x, rows, g * width + k, int(width - k < STEP ? width - k : STEP), to);
}

// The weight rows of one or two tiles.
struct Weights {
    const bf16* tile[2];
    int rows[2];
    int64_t K;
};

// A tile whose rows or K end early, zeros behind.
FN const bf16* padded(const bf16* w, int64_t K, int rows, int left, bf16* buffer) {
    __mmask32 here = left < STEP ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
    for (int r = 0; r < BLOCK; r++) {
        __m512i row = r < rows ? _mm512_maskz_loadu_epi16(here, w + r * K) : _mm512_setzero_si512();
        _mm512_store_si512(buffer + r * STEP, row);
    }
    return buffer;
}

// Tiles 0-3 are sums, 4-5 weights, 6-7 x.
template <int A, int B>
FN void multiply_tiles(const bf16* first, const bf16* second, int64_t stride, const bf16* x, int64_t block) {
    _tile_loadd(6, x, LINE);
    _tile_loadd(4, first, stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (A == 2) {
        _tile_loadd(5, second, stride);
        _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (B == 2) {
        _tile_loadd(7, x + block, LINE);
        _tile_dpbf16ps(2, 4, 7);
        if constexpr (A == 2) _tile_dpbf16ps(3, 5, 7);
    }
}

template <int A>
FN void fetch(Ahead& ahead) {
    int lines = ahead.second != 0 ? A * BLOCK / 2 : A * BLOCK;
    for (int i = 0; i < lines; i++) _mm_prefetch(ahead.at + i * LINE, _MM_HINT_T1);
    if (ahead.second != 0)
        for (int i = 0; i < lines; i++) _mm_prefetch(ahead.at + ahead.second + i * LINE, _MM_HINT_T1);
    ahead.at += lines * LINE;
    ahead.bytes -= lines * LINE;
}

// Sums over K from start on, `width` of them -> sums [B][A][weight row][row of x].
template <int A, int B>
FN void part(const Weights& w, int64_t start, int64_t width, const bf16* x, int64_t block, Ahead& ahead, float* sums) {
    alignas(64) bf16 buffers[2][TILE];
    bool whole = w.rows[0] == BLOCK && (A == 1 || w.rows[1] == BLOCK);
    _tile_zero(0);
    if constexpr (A == 2) _tile_zero(1);
    if constexpr (B == 2) _tile_zero(2);
    if constexpr (A == 2 && B == 2) _tile_zero(3);
    int64_t k = 0;
    if (whole) {
        for (; k + STEP <= width; k += STEP, x += TILE) {
            if (ahead.bytes > 0) fetch<A>(ahead);
            multiply_tiles<A, B>(w.tile[0] + start + k, w.tile[1] + start + k, w.K * 2, x, block);
        }
    }
    for (; k < width; k += STEP, x += TILE) {
        int left = int(width - k < STEP ? width - k : STEP);
        padded(w.tile[0] + start + k, w.K, w.rows[0], left, buffers[0]);
        if constexpr (A == 2) padded(w.tile[1] + start + k, w.K, w.rows[1], left, buffers[1]);
        multiply_tiles<A, B>(buffers[0], buffers[1], LINE, x, block);
    }
    _tile_stored(0, sums, LINE);
    if constexpr (A == 2) _tile_stored(1, sums + SUMS, LINE);
    if constexpr (B == 2) _tile_stored(2, sums + A * SUMS, LINE);
    if constexpr (A == 2 && B == 2) _tile_stored(3, sums + 3 * SUMS, LINE);
}

// The parts of K are added like a binary counter carries: (p0 + p1) + (p2 + p3), whatever their number.
template <int A, int B>
FN void tiles(const Weights& w, const bf16* x, int groups, int64_t block, Ahead& ahead, float* sums) {
    constexpr int LEVELS = 16, SIZE = A * B * SUMS;
    if (groups == 1) return part<A, B>(w, 0, w.K, x, block, ahead, sums);
    alignas(64) float levels[LEVELS][SIZE];
    int64_t width = w.K / groups, packed = steps_of(w.K, groups) * TILE;
    for (int g = 0; g < groups; g++) {
        part<A, B>(w, g * width, width, x + g * packed, block, ahead, sums);
        int level = 0;
        for (int carry = g; carry & 1; carry >>= 1, level++)
            for (int i = 0; i < SIZE; i++) sums[i] = levels[level][i] + sums[i];
        if (g + 1 < groups)
            for (int i = 0; i < SIZE; i++) levels[level][i] = sums[i];
    }
}

// Calls use(sums, row, blocks) for two blocks of x rows after another.
template <int A, class Use>
FN void over_blocks(const Weights& w, const bf16* panel, int rows, int groups, Ahead ahead, const Use& use) {
    alignas(64) float sums[2 * A * SUMS];
    int64_t block = BLOCK * packed_width(w.K, groups);
    for (int r = 0; r < rows; r += 2 * BLOCK, panel += 2 * block) {
        if (rows - r > BLOCK)
            tiles<A, 2>(w, panel, groups, block, ahead, sums);
        else
            tiles<A, 1>(w, panel, groups, block, ahead, sums);
        use(sums, r);
        if (rows - r > BLOCK) use(sums + A * SUMS, r + BLOCK);
    }
}

// sums [weight row][row of x] -> to[r * COLUMNS + n].
FN void turn(const float* sums, int rows, float* to) {
    if (rows <= 2) {
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < BLOCK; n++) to[r * COLUMNS + n] = sums[n * BLOCK + r];
        return;
    }
    __m512i row[BLOCK];
    for (int n = 0; n < BLOCK; n++) row[n] = _mm512_load_si512(sums + n * BLOCK);
    transpose(row);
    for (int r = 0; r < rows; r++) _mm512_storeu_si512(to + r * COLUMNS, row[r]);
}

template <int A>
FN void multiply_columns(const Weights& w, const bf16* panel, int rows, int groups, Ahead ahead, float* sums) {
    over_blocks<A>(w, panel, rows, groups, ahead, [&](const float* found, int r) ENTRY {
        int here = rows - r < BLOCK ? rows - r : BLOCK;
        for (int a = 0; a < A; a++) turn(found + a * SUMS, here, sums + r * COLUMNS + a * BLOCK);
    });
}

ENTRY void multiply(const bf16* panel, int rows, const bf16* w, int columns, int64_t K, int groups, Ahead ahead,
                    float* sums) {
    if (columns > BLOCK)
        multiply_columns<2>({{w, w + BLOCK * K}, {BLOCK, columns - BLOCK}, K}, panel, rows, groups, ahead, sums);
    else
        multiply_columns<1>({{w, w}, {columns, columns}, K}, panel, rows, groups, ahead, sums);
}

// A block of rows of a panel of I, which is cut into groups of `width`.
struct Inner {
    bf16* block;
    int64_t width;

    FN bf16* pair(int64_t n) const {
        int64_t in_group = n % width, steps = (width + STEP - 1) / STEP;
        return block + (n / width * steps + in_group / STEP) * TILE + in_group % STEP / 2 * STEP;
    }
};

// silu(gate) * up of one column for 16 rows of x.
FN void activate(const float* gate, const float* up, uint32_t* to) {
    for (int r = 0; r < BLOCK; r++) {
        bf16 product;
        store(&product, rounded<bf16>(silu(rounded<bf16>(gate[r]))) * rounded<bf16>(up[r]));
        to[r] = product;
    }
}

// sums of `columns` gates, then of their ups -> columns [at, at + columns) of `inner`.
FN void put_inner(const float* sums, int columns, const Inner& inner, int64_t at) {
    for (int n = 0; n < columns; n++) {
        uint32_t one[BLOCK], two[BLOCK];
        activate(sums + n * BLOCK, sums + SUMS + n * BLOCK, one);
        bf16* pair = inner.pair(at + n);
        int64_t odd = (at + n) % inner.width % 2;
        bool both = !odd && n + 1 < columns && (at + n) % inner.width + 1 < inner.width;
        if (both) {
            n++;
            activate(sums + n * BLOCK, sums + SUMS + n * BLOCK, two);
            for (int r = 0; r < BLOCK; r++) one[r] |= two[r] << 16;
            memcpy(pair, one, sizeof one);
        } else {
            for (int r = 0; r < BLOCK; r++) pair[2 * r + odd] = bf16(one[r]);
        }
    }
}

ENTRY void gate_up(const bf16* panel, int rows, const bf16* gate, const bf16* up, int columns, int64_t K, Ahead ahead,
                   bf16* inner, int64_t I, int64_t at, int groups) {
    int64_t row = packed_width(I, groups);
    over_blocks<2>({{gate, up}, {columns, columns}, K}, panel, rows, 1, ahead, [&](const float* sums, int r) ENTRY {
        put_inner(sums, columns, Inner{inner + r * row, I / groups}, at);
    });
}

// Whether processor and kernel let this process use tiles; asks the kernel for their state.
bool tiles_allowed() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

const Matmul<bf16>* amx_matmul() {
    static const Matmul<bf16> matmul = {2 * BLOCK, packed_width, pack, multiply, gate_up, enter, leave};
    static const bool allowed = tiles_allowed();
    return allowed ? &matmul : nullptr;
}

}  // namespace kernels
#else
const kernels::Matmul<kernels::bf16>* kernels::amx_matmul() { return nullptr; }
#endif

const kernels::Path* kernels::amx_path() {
    if (avx512bf16_path() == nullptr || amx_matmul() == nullptr) return nullptr;
    static const Path path = [] {
        Path same = *avx512bf16_path();
        same.matmul_bf16 = amx_matmul();
        return same;
    }();
    return &path;
}
