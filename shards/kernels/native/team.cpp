#include "team.h"

#include <pthread.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "wait.h"

namespace kernels {
namespace {

// What a fork leaves of a team is memory: its threads stay with the parent.
int forks = 0;
[[maybe_unused]] const int told_of_forks = pthread_atfork(nullptr, nullptr, [] { forks++; });

// A loop of so much work is worth waking helpers for, and so are several that have as much within so long a time.
constexpr int64_t WORTH_WAKING = 4 * USEFUL;
constexpr std::chrono::microseconds OF_LATE{500};

// Where one thread waits for what others change and then ring for.
class Bell {
  public:
    explicit Bell(bool knows) : patience_(knows) {}
    template <class Came>
    void wait(bool roomy, const Came& came) {
        while (!patience_.soon(roomy, came)) {
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_ = true;
            if (!came()) rung_.wait(lock);
            asleep_ = false;
        }
    }
    bool asleep() const { return asleep_; }
    // Whether it was asleep. Behind a sequentially consistent change, so that one of the two sees the other's.
    bool ring() {
        if (!asleep_ || !asleep_.exchange(false)) return false;
        { std::lock_guard<std::mutex> lock(mutex_); }
        rung_.notify_one();
        return true;
    }

  private:
    waiting::Patience patience_;
    std::atomic<bool> asleep_{false};
    std::mutex mutex_;
    std::condition_variable rung_;
};

// A loop's number, whether threads may still come, how many may, and how many are within.
class Door {
  public:
    explicit Door(uint64_t word) : word_(word) {}
    static Door opened(uint64_t loop, int threads) { return Door(loop << 33 | OPEN | uint64_t(threads) << 16); }

    uint64_t word() const { return word_; }
    uint64_t loop() const { return word_ >> 33; }
    bool lets(int thread) const { return (word_ & OPEN) != 0 && thread < int(word_ >> 16 & 0xffff); }
    bool left() const { return (word_ & (OPEN | 0xffff)) == 0; }

    static constexpr uint64_t OPEN = uint64_t(1) << 32;
    static constexpr int MOST = 0xffff;

  private:
    uint64_t word_;
};

class Team {
  public:
    Team() = default;
    Team(const Team&) = delete;
    ~Team() {
        ending_ = true;
        for (auto& helper : helpers_) {
            helper->bell.ring();
            helper->thread.join();
        }
    }

    void run(Crew crew, void (*part)(const void*, int), const void* context) {
        int threads = std::min(crew.threads, Door::MOST);
        while (int(helpers_.size()) + 1 < threads && add()) continue;
        threads = std::min(threads, int(helpers_.size()) + 1);
        part_ = part;
        context_ = context;
        threads_ = threads;
        wakes_ = worth_waking(threads, crew.work);
        door_ = Door::opened(++loop_, threads).word();
        wake(1);
        part(context, 0);
        door_ &= ~Door::OPEN;
        done_.wait(roomy_, [this] { return Door(door_).left(); });
    }

  private:
    struct Helper {
        Bell bell{true};
        std::thread thread;
    };

    // Whether to wake those of a loop's helpers that sleep. A single one costs the caller 12 us and the step 60. Where
    // there is little to do they are left alone: the caller will have ended, or the next loop be long in coming.
    bool worth_waking(int threads, int64_t work) {
        bool asleep = false;
        for (int i = 1; i < threads; i++) asleep |= helper(i).bell.asleep();
        if (!asleep) return true;
        waiting::Clock::time_point now = waiting::Clock::now();
        if (now > alone_from_ + OF_LATE) {
            alone_from_ = now;
            alone_ = 0;
        }
        alone_ += work;
        if (alone_ < WORTH_WAKING) return false;
        alone_ = 0;
        return true;
    }

    // Wakes `thread`, if it is of the loop; it wakes two others in turn: waking many takes one thread long. For one that
    // is awake, and may be without a core, the caller does that.
    void wake(int thread) {
        if (!wakes_ || thread >= threads_ || helper(thread).bell.ring()) return;
        wake(2 * thread);
        wake(2 * thread + 1);
    }

    Helper& helper(int thread) { return *helpers_[size_t(thread) - 1]; }

    // Whether there is one more. Where the system gives no further thread, those that are there do the work.
    bool add() {
        int thread = int(helpers_.size()) + 1;
        roomy_ = waiting::roomy_for(thread + 1);
        auto made = std::make_unique<Helper>();
        Helper* helper = made.get();
        try {
            made->thread = std::thread([this, helper, thread] { help(helper->bell, thread); });
        } catch (const std::system_error&) {
            return false;
        }
        helpers_.push_back(std::move(made));
        return true;
    }

    void help(Bell& bell, int thread) {
        uint64_t done = 0;
        auto wanted = [&](Door door) { return door.loop() != done && door.lets(thread); };
        while (true) {
            bell.wait(roomy_, [&] { return ending_ || wanted(Door(door_)); });
            if (ending_) return;
            uint64_t seen = door_;
            if (!wanted(Door(seen)) || !door_.compare_exchange_strong(seen, seen + 1)) continue;
            done = Door(seen).loop();
            wake(2 * thread);
            wake(2 * thread + 1);
            part_(context_, thread);
            if (Door(--door_).left()) done_.ring();
        }
    }

    alignas(64) std::atomic<uint64_t> door_{0};
    void (*part_)(const void*, int) = nullptr;
    const void* context_ = nullptr;
    int threads_ = 1;
    bool wakes_ = true;
    alignas(64) std::atomic<bool> ending_{false};
    std::atomic<bool> roomy_{true};
    Bell done_{false};
    uint64_t loop_ = 0;
    // Work of loops, since a moment, for which nobody was woken.
    int64_t alone_ = 0;
    waiting::Clock::time_point alone_from_{};
    std::vector<std::unique_ptr<Helper>> helpers_;
};

struct Own {
    std::unique_ptr<Team> team;
    int forks_before = 0;

    ~Own() { forget_forked(); }
    void forget_forked() {
        if (forks_before != forks) (void)team.release();
        forks_before = forks;
    }
};

}  // namespace

void run_team(Crew crew, void (*part)(const void*, int), const void* context) {
    static thread_local Own own;
    own.forget_forked();
    if (own.team == nullptr) own.team = std::make_unique<Team>();
    own.team->run(crew, part, context);
}

}  // namespace kernels
