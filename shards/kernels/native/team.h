// Threads that share the loops of a call.
//
// A thread that calls the library has a team of its own: made when it first wants one, ended with it. Nobody waits for a
// thread that comes late, because another program has its core: the caller goes through a loop alone if need be, and at
// its end waits for those only that are within a task.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace kernels {

// How many threads share a loop, and how much work that is.
struct Crew {
    int threads = 1;
    int64_t work = 0;
};

// Work of some 10 us: with less of it a thread that is awake costs more than it saves.
constexpr int64_t USEFUL = 32768;

static inline Crew crew_for(int64_t work, int threads) {
    int64_t useful = work / USEFUL + 1;
    return {useful < threads ? int(useful) : threads, work};
}

// See `together`.
void run_team(Crew crew, void (*part)(const void* context, int thread), const void* context);

// part(thread) on up to crew.threads threads at once, on the caller's as 0; returns when those that came have ended. As
// any but the caller may not come, parts draw what they do from Tickets or a Queue until nothing is left.
template <class Part>
void together(Crew crew, const Part& part) {
    if (crew.threads <= 1) return part(0);
    auto call = [](const void* context, int thread) { (*static_cast<const Part*>(context))(thread); };
    run_team(crew, call, &part);
}

// Hands out tasks 0 .. count - 1 in order.
class Queue {
  public:
    explicit Queue(int64_t count) : count_(count) {}
    template <class Work>
    void share(const Work& work) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work(i);
    }

  private:
    std::atomic<int64_t> next_{0};
    int64_t count_;
};

// work(i) for 0 .. count - 1, in pieces of neighbours.
template <class Work>
void for_each(int64_t count, Crew crew, const Work& work) {
    int64_t piece = crew.threads <= 1 ? count : std::max<int64_t>(count / (8 * crew.threads), 1);
    if (count <= 0) return;
    Queue pieces((count + piece - 1) / piece);
    together(crew, [&](int) {
        pieces.share([&](int64_t i) {
            for (int64_t at = i * piece, end = std::min(at + piece, count); at < end; at++) work(at);
        });
    });
}

// Hands out tasks 0 .. count - 1. Each thread has its share of neighbours, which it walks in order, as memory likes it,
// and then helps others out from the ends of theirs. It draws its next ticket before it does the one in hand: then it
// knows which weights to fetch ahead.
class Tickets {
  public:
    // At most 2^32 - 1 tasks.
    Tickets(int64_t count, int threads) : shares_(size_t(threads)), count_(count) {
        for (int i = 0; i < threads; i++) shares_[size_t(i)].ends = uint64_t(first(i)) << 32 | uint64_t(first(i + 1));
    }
    // The task that `thread` draws first; where its share is empty, that of the next one's.
    int64_t first(int thread) const { return count_ * thread / int64_t(shares_.size()); }
    // work(task, next): next is -1 behind the last one.
    template <class Work>
    void share(int thread, const Work& work) {
        int64_t task = draw(thread);
        while (task >= 0) {
            int64_t next = draw(thread);
            work(task, next);
            task = next;
        }
    }

  private:
    // [first, end) of what is left, in the upper and the lower half.
    struct alignas(64) Share {
        std::atomic<uint64_t> ends{0};
    };

    int64_t draw(int thread) {
        int64_t task = take(shares_[size_t(thread)], true);
        for (size_t i = 1; task < 0 && i < shares_.size(); i++)
            task = take(shares_[(size_t(thread) + i) % shares_.size()], false);
        return task;
    }
    static int64_t take(Share& share, bool front) {
        uint64_t seen = share.ends.load(std::memory_order_relaxed);
        while ((seen >> 32) < (seen & UINT32_MAX)) {
            uint64_t left = front ? seen + (uint64_t(1) << 32) : seen - 1;
            if (share.ends.compare_exchange_weak(seen, left, std::memory_order_relaxed))
                return int64_t(front ? seen >> 32 : (seen & UINT32_MAX) - 1);
        }
        return -1;
    }
    std::vector<Share> shares_;
    int64_t count_;
};

}  // namespace kernels
