// Carries out calls of this library that were written down: the operators of a decode step, with no interpreter between
// them. The Python half is shards/tape.py.
#include <chrono>
#include <cstdint>

#include "kernels.h"

namespace {

using Function = int (*)(const int64_t*);

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

}  // namespace

// calls: `count` rows of `pitch` numbers, each a function made by KERNELS_REPLAY and its arguments. ns: when each call
// ended less when it began, or null. Returns -1 when all went well, else the index of the first that did not; its code goes to
// *code.
KERNELS_EXPORT int64_t kernels_carry_out(const int64_t* calls, int64_t count, int64_t pitch, int64_t* ns, int64_t* code) {
    int64_t before = ns == nullptr ? 0 : now_ns();
    for (int64_t i = 0; i < count; i++) {
        const int64_t* call = calls + i * pitch;
        int failed = reinterpret_cast<Function>(call[0])(call + 1);
        if (failed != 0) {
            *code = failed;
            return i;
        }
        if (ns == nullptr) continue;
        int64_t after = now_ns();
        ns[i] = after - before;
        before = after;
    }
    return -1;
}
