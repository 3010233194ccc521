// Rows of bytes copied between two buffers; the Python half is shards/row_copy.py.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kLine = 64;
// The processor's own prefetching ends with a page, which a row of a block hardly exceeds. 512 to 4096 bytes gave the
// same for rows of 8 KB; for scattered rows of 1 KB this was the best.
constexpr int64_t kAhead = 1024;

#if defined(__SSE2__)
// One row past the caches, a line at a time: to is not read first. next is where the row behind begins.
void stream_row(char* to, const char* from, int64_t num_bytes, const char* next) {
    const int64_t head = std::min<int64_t>(num_bytes, -reinterpret_cast<intptr_t>(to) & (kLine - 1));
    std::memcpy(to, from, head);
    int64_t at = head;
    for (; at + kLine <= num_bytes; at += kLine) {
        const int64_t ahead = at + kAhead;
        _mm_prefetch(ahead < num_bytes ? from + ahead : next + (ahead - num_bytes), _MM_HINT_T0);
        for (int64_t part = 0; part < kLine; part += 16) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + part));
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + part), bytes);
        }
    }
    std::memcpy(to + at, from + at, num_bytes - at);
}
#endif

}  // namespace

// Row i is num_bytes bytes from from[i] of source to to[i] of target. streamed: past the caches, for what is larger than
// these or not needed soon.
KERNELS_EXPORT int copy_rows(char* target, const int64_t* to, const char* source, const int64_t* from, int64_t rows,
                             int64_t num_bytes, int64_t streamed) {
#if defined(__SSE2__)
    if (streamed) {
        for (int64_t i = 0; i < rows; ++i) {
            const char* row = source + from[i];
            stream_row(target + to[i], row, num_bytes, i + 1 < rows ? source + from[i + 1] : row);
        }
        _mm_sfence();
        return 0;
    }
#endif
    for (int64_t i = 0; i < rows; ++i) std::memcpy(target + to[i], source + from[i], num_bytes);
    return 0;
}
