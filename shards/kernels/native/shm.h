// A group of ranks of one host that meet in a shared segment: rounds, waiting, and how a rank that is lost is noticed.
//
// Every rank has a control line and two slots. A round of an operation: copy into my slot of the round's parity,
// publish my round number, wait until every rank has published it, read their slots. A rank publishes a round only
// when it has read the one before, so that a slot is free again two rounds later and one wait a round is enough.
// Big tensors take several rounds.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <ctime>

#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "wait.h"

// Elementwise sums have the same bits on every target. With AVX2 two ranks' all_reduce of 64 KB of bfloat16 took 28 us
// instead of 40. Choosing at load time needs glibc.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define MANY_TARGETS __attribute__((target_clones("default", "avx2")))
#else
#define MANY_TARGETS
#endif

namespace shm {

constexpr int kMaxRanks = 64;
constexpr int kBlock = 256;              // floats summed at once: 64 ranks of them fit the L1 and L2 caches
constexpr int64_t kSliceNs = 5'000'000;  // longest sleep between looks at the stop flag, peers and clock

enum Code { kDone = 0, kTimeout = 1, kStopped = 2, kPeerGone = 3, kMismatch = 4 };
enum Op : uint64_t { kSumFloat = 1, kSumBfloat = 2, kGather = 3, kBroadcast = 4, kAllToAll = 5, kBarrier = 6, kMix = 7 };

struct alignas(128) Line {
  std::atomic<uint32_t> round;     // also the futex word
  std::atomic<uint32_t> sleepers;  // ranks asleep on `round`
  std::atomic<uint32_t> left;      // the rank closed or failed: it will publish no more
  uint64_t meta[2];                // operation and size, by parity of the round that began it
  int64_t bytes_to[2][kMaxRanks];  // all_to_all: bytes for each rank, by parity
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

struct Group {
  int rank, size;
  bool roomy;
  int64_t slot_bytes, segment_bytes;
  Line* lines;
  char* slots;
  uint32_t round = 0;
  uint64_t missing = 0;  // bit r: rank r is why an operation failed
  std::atomic<uint32_t> stop{0};
  waiting::Patience patience{false};
  int pidfds[kMaxRanks];

  char* slot(int r) const { return slots + (2 * r + (round & 1)) * slot_bytes; }
};

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

inline long futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, timeout, nullptr, 0);
}

inline bool came(const Group* g, int r) {
  return static_cast<int32_t>(g->lines[r].round.load(std::memory_order_acquire) - g->round) >= 0;
}

inline bool died(const Group* g, int r) {
  if (g->pidfds[r] < 0) return false;
  pollfd p{g->pidfds[r], POLLIN, 0};
  return poll(&p, 1, 0) == 1 && (p.revents & POLLIN);
}

// Sleep until rank r publishes, a slice is over, or somebody wakes us.
inline void doze(Group* g, int r) {
  Line& line = g->lines[r];
  timespec slice{0, kSliceNs};
  line.sleepers.fetch_add(1);
  uint32_t seen = line.round.load();
  if (static_cast<int32_t>(seen - g->round) < 0) futex(&line.round, FUTEX_WAIT, seen, &slice);
  line.sleepers.fetch_sub(1);
}

// Ranks, as bits, that left the group or died. One that left in good order saw everybody's round before; so when we
// see that it left and still miss somebody, this round will never be complete.
inline uint64_t lost_peers(const Group* g) {
  uint64_t lost = 0;
  for (int r = 0; r < g->size; ++r)
    if (r != g->rank && (g->lines[r].left.load(std::memory_order_acquire) || died(g, r))) lost |= 1ULL << r;
  return lost;
}

inline int wait_slowly(Group* g, int r, int64_t timeout_ns) {
  int64_t start = now_ns();
  for (;;) {
    if (came(g, r)) return kDone;
    if (g->stop.load(std::memory_order_acquire)) return kStopped;
    if (uint64_t lost = lost_peers(g); lost && !came(g, r)) {
      g->missing = lost;
      return kPeerGone;
    }
    if (now_ns() - start > timeout_ns) return kTimeout;
    doze(g, r);
  }
}

inline int wait_for(Group* g, int r, int64_t timeout_ns) {
  if (g->patience.soon(g->roomy, [&] { return came(g, r); })) return kDone;
  return wait_slowly(g, r, timeout_ns);
}

inline void wake(Line& line) {
  if (line.sleepers.load()) futex(&line.round, FUTEX_WAKE, INT32_MAX, nullptr);
}

// No further operation of this group can work: tell the peers, and our own thread that may be inside of one.
inline void leave(Group* g) {
  g->stop.store(1, std::memory_order_release);
  g->lines[g->rank].left.store(1, std::memory_order_release);
  for (int r = 0; r < g->size; ++r) wake(g->lines[r]);
}

inline int fail(Group* g, int code) {
  for (int r = 0; r < g->size && code == kTimeout; ++r)
    if (!came(g, r)) g->missing |= 1ULL << r;
  leave(g);
  return code;
}

// Publish my round and wait for everybody's.
inline int meet(Group* g, int64_t timeout_ns) {
  Line& mine = g->lines[g->rank];
  mine.round.store(g->round);  // sequentially consistent: ordered before the look at `sleepers`
  wake(mine);
  for (int i = 1; i < g->size; ++i)
    if (int code = wait_for(g, (g->rank + i) % g->size, timeout_ns)) return fail(g, code);
  return kDone;
}

// Begin a round; the first of an operation says which one it is.
inline int begin(Group* g, uint64_t meta) {
  if (g->stop.load(std::memory_order_acquire)) return kStopped;
  ++g->round;
  g->lines[g->rank].meta[g->round & 1] = meta;
  return kDone;
}

inline int agree(Group* g, uint64_t meta) {
  for (int r = 0; r < g->size; ++r)
    if (g->lines[r].meta[g->round & 1] != meta) return fail(g, kMismatch);
  return kDone;
}

inline uint64_t describe(Op op, int64_t bytes, int src = 0) {
  return static_cast<uint64_t>(op) << 56 | static_cast<uint64_t>(src) << 48 | static_cast<uint64_t>(bytes);
}

// Rounds over `bytes` in pieces of a slot: put(offset, length) fills my slot, take(offset, length) reads the others'.
template <class Put, class Take>
int in_pieces(Group* g, uint64_t meta, int64_t bytes, int64_t timeout_ns, Put put, Take take) {
  for (int64_t at = 0; at == 0 || at < bytes; at += g->slot_bytes) {
    int64_t length = bytes - at < g->slot_bytes ? bytes - at : g->slot_bytes;
    if (int code = begin(g, meta)) return code;
    put(at, length);
    if (int code = meet(g, timeout_ns)) return code;
    if (int code = agree(g, meta)) return code;
    take(at, length);
  }
  return kDone;
}

inline float load(const uint16_t* x) {
  uint32_t bits = static_cast<uint32_t>(*x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void store(uint16_t* out, float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  *out = f != f ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

inline float load(const float* x) { return *x; }
inline void store(float* out, float f) { *out = f; }

// Sum n rows of `count` floats as a balanced binary tree, the odd last one of a level going up as it is.
inline const float* tree(const float** rows, int n, int count, float (*scratch)[kBlock]) {
  while (n > 1) {
    for (int i = 0; i < n / 2; ++i) {
      const float *a = rows[2 * i], *b = rows[2 * i + 1];
      float* sum = scratch[i];
      for (int j = 0; j < count; ++j) sum[j] = a[j] + b[j];
      rows[i] = sum;
    }
    if (n % 2) rows[n / 2] = rows[n - 1];
    n = (n + 1) / 2;
  }
  return rows[0];
}

}  // namespace shm
