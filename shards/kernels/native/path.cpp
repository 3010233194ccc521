// Which instruction sets this machine runs, and the library's version.
#include "kernels.h"

namespace kernels {

const Path* find_path(int index) {
    switch (index) {
        case 0: return plain_path();
        case 1: return avx2_path();
        case 2: return avx512_path();
        case 3: return avx512bf16_path();
        case 4: return amx_path();
        default: return nullptr;
    }
}

}  // namespace kernels

KERNELS_EXPORT int kernels_abi() { return kernels::ABI; }

// What the library was compiled from: hatch_build.py looks for it in the file.
KERNELS_EXPORT const char* kernels_made_of() { return KERNELS_MADE_OF; }

KERNELS_EXPORT int kernels_has_path(int index) { return kernels::find_path(index) != nullptr; }

// The dot product of bfloat16 pairs does twice the work of a fused multiply-add, at its rate on AMD's processors (Zen 4)
// but at a quarter of it on Intel's (Emerald Rapids: 2 cycles for one, half a cycle for the other). There widened numbers
// are the faster operands.
KERNELS_EXPORT int kernels_best_path() {
    constexpr int WIDENED = 2, PAIRED = 3;
    int best = kernels::PATHS - 1;
    while (kernels::find_path(best) == nullptr) best--;
#if defined(__x86_64__)
    if (best == PAIRED && __builtin_cpu_is("intel")) best = WIDENED;
#endif
    return best;
}
