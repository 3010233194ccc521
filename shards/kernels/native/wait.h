// How threads and ranks wait for each other: most waits end within microseconds, and behind others one sleeps.
#pragma once

#include <sched.h>

#include <thread>

namespace waiting {

constexpr int SPINS = 2500;  // about 100 us: longer than the skew of threads and ranks that run side by side
constexpr int YIELDS = 200;

// How often one of `count` that wait for each other looks; 0 where they are more than the cores that they may run on: it
// would keep a core from the very one that it waits for.
inline int spins_for(int count) {
    cpu_set_t cores;
    bool roomy = sched_getaffinity(0, sizeof(cores), &cores) == 0 && CPU_COUNT(&cores) >= count;
    return roomy ? SPINS : 0;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether it comes before one should sleep. Without `spins` others have the core between looks. They do not with spins:
// Linux takes a yield for the end of a turn. Beside a program of lowest priority (nice 19) a decode step that takes 9 ms
// alone took 13.5 and 13.9 where threads yielded, 10.0 and 9.1 where they do not.
template <class Came>
bool soon(int spins, const Came& came) {
    for (int i = 0; i < spins; i++) {
        if (came()) return true;
        relax();
    }
    for (int i = 0; spins == 0 && i < YIELDS; i++) {
        if (came()) return true;
        std::this_thread::yield();
    }
    return false;
}

}  // namespace waiting
