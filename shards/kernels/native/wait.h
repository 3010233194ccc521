// How threads and ranks wait for each other: most waits end within microseconds, and behind others one sleeps.
#pragma once

#include <sched.h>
#include <time.h>

#include <chrono>
#include <thread>

namespace waiting {

using Clock = std::chrono::steady_clock;

// To sleep and be woken costs a step some 60 us, so who has its core to itself looks for longer than lies between two
// steps that follow each other. Else it looks for no longer than lies between most loops: who sleeps is preferred when it
// wakes, who looks on waits for its turn.
constexpr std::chrono::microseconds LONG{300};
constexpr std::chrono::microseconds SHORT{40};
// Others want a core that they had for so long since one last looked, and count as wanting it for a while.
constexpr std::chrono::microseconds TAKEN{1500};
constexpr std::chrono::milliseconds WANTED{200};
constexpr int YIELDS = 200;
constexpr int LOOKS = 16;  // between looks at the clock

// Whether `count` that wait for each other have as many cores that they may run on.
inline bool roomy_for(int count) {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof(cores), &cores) == 0 && CPU_COUNT(&cores) >= count;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How a thread waits.
class Patience {
  public:
    // knows: whether the thread sleeps here only, and so knows when others had its core. Else it looks for SHORT.
    explicit Patience(bool knows) : knows_(knows) {}

    // Whether it comes before one should sleep. Where there are more that wait than cores, others have the core between
    // looks: it would be kept from the very one that is waited for. Else they do not: Linux takes a yield for the end of
    // a turn.
    template <class Came>
    bool soon(bool roomy, const Came& came) {
        if (knows_ && slept_) look_at_clocks(Clock::now());
        slept_ = !(roomy ? comes(came) : comes_after_yields(came));
        // What others took while one looked is no part of the sleep.
        if (knows_ && slept_) wanted(Clock::now());
        return !slept_;
    }

  private:
    template <class Came>
    static bool comes_after_yields(const Came& came) {
        for (int i = 0; i < YIELDS; i++) {
            if (came()) return true;
            std::this_thread::yield();
        }
        return false;
    }
    template <class Came>
    bool comes(const Came& came) {
        if (came()) return true;
        Clock::time_point now = Clock::now();
        return comes_by(now + SHORT, came) || (knows_ && !wanted(now) && comes_by(now + LONG, came));
    }
    template <class Came>
    static bool comes_by(Clock::time_point end, const Came& came) {
        do {
            for (int i = 0; i < LOOKS; i++) {
                if (came()) return true;
                relax();
            }
        } while (Clock::now() < end);
        return false;
    }
    bool wanted(Clock::time_point now) {
        if (look_at_clocks(now) > TAKEN) wanted_until_ = now + WANTED;
        return now < wanted_until_;
    }
    // Time since it was last called in which this thread did not run.
    Clock::duration look_at_clocks(Clock::time_point now) {
        timespec used;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
        auto ran = std::chrono::seconds(used.tv_sec) + std::chrono::nanoseconds(used.tv_nsec);
        Clock::duration lost = (now - looked_) - (ran - ran_);
        looked_ = now;
        ran_ = ran;
        return lost;
    }
    const bool knows_;
    bool slept_ = true;
    Clock::time_point looked_{}, wanted_until_{};
    std::chrono::nanoseconds ran_{0};
};

}  // namespace waiting
