// Memory that threads keep from call to call.
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "matmul.h"

namespace kernels {
namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

struct Kept {
    char* at = nullptr;
    size_t bytes = 0;

    ~Kept() { std::free(at); }
    char* take(size_t wanted) {
        if (wanted > bytes) grow(wanted);
        return at;
    }
    void grow(size_t wanted) {
        size_t rounded = (wanted + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        std::free(at);
        bytes = 0;
        at = static_cast<char*>(std::aligned_alloc(HUGE_PAGE, rounded));
        if (at == nullptr) throw std::bad_alloc();
        bytes = rounded;
#if defined(__linux__)
        madvise(at, rounded, MADV_HUGEPAGE);
#endif
    }
};

}  // namespace

char* scratch(size_t bytes) {
    static thread_local Kept kept;
    return kept.take(bytes);
}

char* staging(size_t bytes) {
    static thread_local Kept kept;
    return kept.take(bytes);
}

}  // namespace kernels
