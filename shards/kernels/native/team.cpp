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

// Where one thread waits for what others change and then ring for.
class Bell {
  public:
    template <class Came>
    void wait(int spins, const Came& came) {
        while (!waiting::soon(spins, came)) {
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_ = true;
            if (!came()) rung_.wait(lock);
            asleep_ = false;
        }
    }
    // Behind a sequentially consistent change, so that one of the two sees the other's.
    void ring() {
        if (!asleep_ || !asleep_.exchange(false)) return;
        { std::lock_guard<std::mutex> lock(mutex_); }
        rung_.notify_one();
    }

  private:
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

    void run(int threads, void (*part)(const void*, int), const void* context) {
        threads = std::min(threads, Door::MOST);
        while (int(helpers_.size()) + 1 < threads && add()) continue;
        part_ = part;
        context_ = context;
        door_ = Door::opened(++loop_, threads).word();
        for (size_t i = 0; i < helpers_.size() && int(i) + 1 < threads; i++) helpers_[i]->bell.ring();
        part(context, 0);
        door_ &= ~Door::OPEN;
        done_.wait(spins_, [this] { return Door(door_).left(); });
    }

  private:
    struct Helper {
        Bell bell;
        std::thread thread;
    };

    // Whether there is one more. Where the system gives no further thread, those that are there do the work.
    bool add() {
        int thread = int(helpers_.size()) + 1;
        spins_ = waiting::spins_for(thread + 1);
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
            bell.wait(spins_, [&] { return ending_ || wanted(Door(door_)); });
            if (ending_) return;
            uint64_t seen = door_;
            if (!wanted(Door(seen)) || !door_.compare_exchange_strong(seen, seen + 1)) continue;
            done = Door(seen).loop();
            part_(context_, thread);
            if (Door(--door_).left()) done_.ring();
        }
    }

    alignas(64) std::atomic<uint64_t> door_{0};
    void (*part_)(const void*, int) = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<bool> ending_{false};
    std::atomic<int> spins_{waiting::SPINS};
    Bell done_;
    uint64_t loop_ = 0;
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

void run_team(int threads, void (*part)(const void*, int), const void* context) {
    static thread_local Own own;
    own.forget_forked();
    if (own.team == nullptr) own.team = std::make_unique<Team>();
    own.team->run(threads, part, context);
}

}  // namespace kernels
