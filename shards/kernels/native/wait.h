// How threads and ranks wait for each other: most waits end within microseconds, and a core that others want is let go.
#pragma once

#include <sched.h>

#include <thread>

namespace waiting {

constexpr int SPINS = 1000;  // about 40 us: longer than the skew of threads and ranks that run side by side
constexpr int YIELDS = 200;

// How often one of `count` that wait for each other looks. Where they are more than the cores that they may run on, it
// would keep a core from the very one that it waits for.
inline int spins_for(int count) {
    cpu_set_t cores;
    bool roomy = sched_getaffinity(0, sizeof(cores), &cores) == 0 && CPU_COUNT(&cores) >= count;
    return roomy ? SPINS : 1;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Looks `spins` times, and then lets others have the core between looks; whether it came. Behind that one should sleep.
template <class Came>
bool soon(int spins, const Came& came) {
    for (int i = 0; i < spins; i++) {
        if (came()) return true;
        relax();
    }
    for (int i = 0; i < YIELDS; i++) {
        if (came()) return true;
        std::this_thread::yield();
    }
    return false;
}

}  // namespace waiting
