// Collectives of the ranks of one host over a shared segment. The Python half is shards/shm.py.
//
// Every rank has a control line and two slots. A round of an operation: copy into my slot of the round's parity,
// publish my round number, wait until every rank has published it, read their slots. A rank publishes a round only
// when it has read the one before, so that a slot is free again two rounds later and one wait a round is enough.
// Big tensors take several rounds.

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <ctime>

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// Elementwise sums have the same bits on every target. With AVX2 two ranks' all_reduce of 64 KB of bfloat16 took 28 us
// instead of 40. Choosing at load time needs glibc.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define MANY_TARGETS __attribute__((target_clones("default", "avx2")))
#else
#define MANY_TARGETS
#endif

namespace {

constexpr int kMaxRanks = 64;
constexpr int kBlock = 256;              // floats summed at once: 64 ranks of them fit the L1 and L2 caches
constexpr int kSpins = 1000;             // about 40 us: longer than the skew of ranks that run side by side
constexpr int kYields = 200;
constexpr int64_t kSliceNs = 5'000'000;  // longest sleep between looks at the stop flag, peers and clock

enum Code { kDone = 0, kTimeout = 1, kStopped = 2, kPeerGone = 3, kMismatch = 4 };
enum Op : uint64_t { kSumFloat = 1, kSumBfloat = 2, kGather = 3, kBroadcast = 4, kAllToAll = 5, kBarrier = 6 };

struct alignas(128) Line {
  std::atomic<uint32_t> round;     // also the futex word
  std::atomic<uint32_t> sleepers;  // ranks asleep on `round`
  std::atomic<uint32_t> left;      // the rank closed or failed: it will publish no more
  uint64_t meta[2];                // operation and size, by parity of the round that began it
  int64_t bytes_to[2][kMaxRanks];  // all_to_all: bytes for each rank, by parity
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

struct Group {
  int rank, size, spins;
  int64_t slot_bytes, segment_bytes;
  Line* lines;
  char* slots;
  uint32_t round = 0;
  uint64_t missing = 0;  // bit r: rank r is why an operation failed
  std::atomic<uint32_t> stop{0};
  int pidfds[kMaxRanks];

  char* slot(int r) const { return slots + (2 * r + (round & 1)) * slot_bytes; }
};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, timeout, nullptr, 0);
}

bool came(const Group* g, int r) {
  return static_cast<int32_t>(g->lines[r].round.load(std::memory_order_acquire) - g->round) >= 0;
}

bool died(const Group* g, int r) {
  if (g->pidfds[r] < 0) return false;
  pollfd p{g->pidfds[r], POLLIN, 0};
  return poll(&p, 1, 0) == 1 && (p.revents & POLLIN);
}

// Sleep until rank r publishes, a slice is over, or somebody wakes us.
void doze(Group* g, int r) {
  Line& line = g->lines[r];
  timespec slice{0, kSliceNs};
  line.sleepers.fetch_add(1);
  uint32_t seen = line.round.load();
  if (static_cast<int32_t>(seen - g->round) < 0) futex(&line.round, FUTEX_WAIT, seen, &slice);
  line.sleepers.fetch_sub(1);
}

// Ranks, as bits, that left the group or died. One that left in good order saw everybody's round before; so when we
// see that it left and still miss somebody, this round will never be complete.
uint64_t lost_peers(const Group* g) {
  uint64_t lost = 0;
  for (int r = 0; r < g->size; ++r)
    if (r != g->rank && (g->lines[r].left.load(std::memory_order_acquire) || died(g, r))) lost |= 1ULL << r;
  return lost;
}

int wait_slowly(Group* g, int r, int64_t timeout_ns) {
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

int wait_for(Group* g, int r, int64_t timeout_ns) {
  for (int i = 0; i < g->spins; ++i) {
    if (came(g, r)) return kDone;
    relax();
  }
  for (int i = 0; i < kYields; ++i) {
    if (came(g, r)) return kDone;
    sched_yield();
  }
  return wait_slowly(g, r, timeout_ns);
}

void wake(Line& line) {
  if (line.sleepers.load()) futex(&line.round, FUTEX_WAKE, INT32_MAX, nullptr);
}

// No further operation of this group can work: tell the peers, and our own thread that may be inside of one.
void leave(Group* g) {
  g->stop.store(1, std::memory_order_release);
  g->lines[g->rank].left.store(1, std::memory_order_release);
  for (int r = 0; r < g->size; ++r) wake(g->lines[r]);
}

int fail(Group* g, int code) {
  for (int r = 0; r < g->size && code == kTimeout; ++r)
    if (!came(g, r)) g->missing |= 1ULL << r;
  leave(g);
  return code;
}

// Publish my round and wait for everybody's.
int meet(Group* g, int64_t timeout_ns) {
  Line& mine = g->lines[g->rank];
  mine.round.store(g->round);  // sequentially consistent: ordered before the look at `sleepers`
  wake(mine);
  for (int i = 1; i < g->size; ++i)
    if (int code = wait_for(g, (g->rank + i) % g->size, timeout_ns)) return fail(g, code);
  return kDone;
}

// Begin a round; the first of an operation says which one it is.
int begin(Group* g, uint64_t meta) {
  if (g->stop.load(std::memory_order_acquire)) return kStopped;
  ++g->round;
  g->lines[g->rank].meta[g->round & 1] = meta;
  return kDone;
}

int agree(Group* g, uint64_t meta) {
  for (int r = 0; r < g->size; ++r)
    if (g->lines[r].meta[g->round & 1] != meta) return fail(g, kMismatch);
  return kDone;
}

uint64_t describe(Op op, int64_t bytes, int src = 0) {
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

float load(const uint16_t* x) {
  uint32_t bits = static_cast<uint32_t>(*x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void store(uint16_t* out, float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  *out = f != f ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

float load(const float* x) { return *x; }
void store(float* out, float f) { *out = f; }

// Sum n rows of `count` floats as a balanced binary tree, the odd last one of a level going up as it is.
const float* tree(const float** rows, int n, int count, float (*scratch)[kBlock]) {
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

template <class T>
MANY_TARGETS void sum_slots(const Group* g, T* __restrict out, int64_t count) {
  if (g->size == 2) {
    const T *a = reinterpret_cast<const T*>(g->slot(0)), *b = reinterpret_cast<const T*>(g->slot(1));
    for (int64_t i = 0; i < count; ++i) store(out + i, load(a + i) + load(b + i));
    return;
  }
  float wide[kMaxRanks][kBlock];
  for (int64_t at = 0; at < count; at += kBlock) {
    int n = static_cast<int>(count - at < kBlock ? count - at : kBlock);
    const float* rows[kMaxRanks];
    for (int r = 0; r < g->size; ++r) {
      const T* x = reinterpret_cast<const T*>(g->slot(r)) + at;
      for (int j = 0; j < n; ++j) wide[r][j] = load(x + j);
      rows[r] = wide[r];
    }
    const float* sum = tree(rows, g->size, n, wide);
    for (int j = 0; j < n; ++j) store(out + at + j, sum[j]);
  }
}

template <class T>
int all_reduce(Group* g, Op op, T* x, int64_t count, int64_t timeout_ns) {
  auto put = [&](int64_t at, int64_t n) { std::memcpy(g->slot(g->rank), reinterpret_cast<char*>(x) + at, n); };
  auto take = [&](int64_t at, int64_t n) { sum_slots(g, x + at / static_cast<int64_t>(sizeof(T)), n / sizeof(T)); };
  int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  return in_pieces(g, describe(op, bytes), bytes, timeout_ns, put, take);
}

}  // namespace

extern "C" {

int64_t shmcomm_segment_bytes(int size, int64_t slot_bytes) {
  return size * (static_cast<int64_t>(sizeof(Line)) + 2 * slot_bytes);
}

// Map the zero-filled segment behind fd (which the caller may close). pids: the ranks' processes, to notice a death.
// slot_bytes: a multiple of 128. Returns null, with errno set, when it cannot be mapped.
void* shmcomm_attach(int fd, int rank, int size, int64_t slot_bytes, const int64_t* pids) {
  int64_t bytes = shmcomm_segment_bytes(size, slot_bytes);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return nullptr;
  Group* g = new Group();
  g->rank = rank;
  g->size = size;
  g->slot_bytes = slot_bytes;
  g->segment_bytes = bytes;
  g->lines = static_cast<Line*>(base);
  g->slots = static_cast<char*>(base) + size * sizeof(Line);
  cpu_set_t cores;
  bool roomy = sched_getaffinity(0, sizeof(cores), &cores) == 0 && CPU_COUNT(&cores) >= size;
  g->spins = roomy ? kSpins : 1;
  for (int r = 0; r < size; ++r)
    g->pidfds[r] = r == rank ? -1 : static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pids[r]), 0));
  return g;
}

// Free a thread that is inside of an operation; allowed from any thread until shmcomm_detach.
void shmcomm_stop(void* handle) { leave(static_cast<Group*>(handle)); }

// Unmap; no operation may be running.
void shmcomm_detach(void* handle) {
  Group* g = static_cast<Group*>(handle);
  for (int r = 0; r < g->size; ++r)
    if (g->pidfds[r] >= 0) close(g->pidfds[r]);
  munmap(g->lines, g->segment_bytes);
  delete g;
}

// Bit r: rank r did not come in time, or was lost, when an operation failed.
uint64_t shmcomm_missing(const void* handle) { return static_cast<const Group*>(handle)->missing; }

// In place; sums in float32.
int shmcomm_sum_float32(void* handle, float* x, int64_t count, int64_t timeout_ns) {
  return all_reduce(static_cast<Group*>(handle), kSumFloat, x, count, timeout_ns);
}

int shmcomm_sum_bfloat16(void* handle, uint16_t* x, int64_t count, int64_t timeout_ns) {
  return all_reduce(static_cast<Group*>(handle), kSumBfloat, x, count, timeout_ns);
}

// out: size x bytes, in rank order.
int shmcomm_all_gather(void* handle, const char* x, char* out, int64_t bytes, int64_t timeout_ns) {
  Group* g = static_cast<Group*>(handle);
  auto put = [&](int64_t at, int64_t n) { std::memcpy(g->slot(g->rank), x + at, n); };
  auto take = [&](int64_t at, int64_t n) {
    for (int r = 0; r < g->size; ++r) std::memcpy(out + r * bytes + at, r == g->rank ? x + at : g->slot(r), n);
  };
  return in_pieces(g, describe(kGather, bytes), bytes, timeout_ns, put, take);
}

int shmcomm_broadcast(void* handle, char* x, int64_t bytes, int src, int64_t timeout_ns) {
  Group* g = static_cast<Group*>(handle);
  auto put = [&](int64_t at, int64_t n) { if (g->rank == src) std::memcpy(g->slot(src), x + at, n); };
  auto take = [&](int64_t at, int64_t n) { if (g->rank != src) std::memcpy(x + at, g->slot(src), n); };
  return in_pieces(g, describe(kBroadcast, bytes, src), bytes, timeout_ns, put, take);
}

int shmcomm_barrier(void* handle, int64_t timeout_ns) {
  auto nothing = [](int64_t, int64_t) {};
  return in_pieces(static_cast<Group*>(handle), describe(kBarrier, 0), 0, timeout_ns, nothing, nothing);
}

// send and recv: bytes to and from each rank. A slot is cut into a part for each other rank; the ranks learn in the
// first round how many rounds the biggest piece of all takes.
int shmcomm_all_to_all(
    void* handle, const char* x, char* out, const int64_t* send, const int64_t* recv, int64_t timeout_ns) {
  Group* g = static_cast<Group*>(handle);
  const int64_t part = g->slot_bytes / (g->size - 1) / 64 * 64;
  auto part_of = [&](int from, int to) { return g->slot(from) + (to < from ? to : to - 1) * part; };
  auto length = [&](int64_t bytes, int64_t at) { return bytes - at < part ? bytes - at : part; };
  int64_t longest = 0;
  for (int64_t at = 0; at == 0 || at < longest; at += part) {
    if (int code = begin(g, describe(kAllToAll, 0))) return code;
    Line& mine = g->lines[g->rank];
    std::memcpy(mine.bytes_to[g->round & 1], send, g->size * sizeof(int64_t));
    const char* from = x;
    for (int r = 0; r < g->size; from += send[r], ++r)
      if (r != g->rank && at < send[r]) std::memcpy(part_of(g->rank, r), from + at, length(send[r], at));
    if (int code = meet(g, timeout_ns)) return code;
    if (int code = agree(g, describe(kAllToAll, 0))) return code;
    char* to = out;
    const char* own = x;
    for (int r = 0; r < g->rank; ++r) own += send[r];
    for (int r = 0; r < g->size; to += recv[r], ++r) {
      const int64_t* sent = g->lines[r].bytes_to[g->round & 1];
      if (sent[g->rank] != recv[r]) return fail(g, kMismatch);
      for (int k = 0; k < g->size; ++k) longest = sent[k] > longest && k != r ? sent[k] : longest;
      if (r == g->rank) {
        if (at == 0) std::memcpy(to, own, recv[r]);
      } else if (at < recv[r]) {
        std::memcpy(to + at, part_of(r, g->rank), length(recv[r], at));
      }
    }
  }
  return kDone;
}

}  // extern "C"
