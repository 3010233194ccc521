// Collectives of the ranks of one host over a shared segment; see shm.h. The Python half is shards/shm.py.
#include "replay.h"
#include "shm.h"

using namespace shm;

namespace {

// Sums the slots' floats T, and stores them as Out.
template <class T, class Out>
MANY_TARGETS void sum_slots(const Group* g, Out* __restrict out, int64_t count) {
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
  auto take = [&](int64_t at, int64_t n) { sum_slots<T>(g, x + at / static_cast<int64_t>(sizeof(T)), n / sizeof(T)); };
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
  g->roomy = waiting::roomy_for(size);
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

// Sums x and rounds it to out.
int shmcomm_sum_to_bfloat16(void* handle, const float* x, uint16_t* out, int64_t count, int64_t timeout_ns) {
  Group* g = static_cast<Group*>(handle);
  auto put = [&](int64_t at, int64_t n) { std::memcpy(g->slot(g->rank), reinterpret_cast<const char*>(x) + at, n); };
  auto take = [&](int64_t at, int64_t n) { sum_slots<float>(g, out + at / 4, n / 4); };
  return in_pieces(g, describe(kSumFloat, count * 4), count * 4, timeout_ns, put, take);
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

KERNELS_REPLAY(shmcomm_sum_float32)
KERNELS_REPLAY(shmcomm_sum_bfloat16)
KERNELS_REPLAY(shmcomm_sum_to_bfloat16)
KERNELS_REPLAY(shmcomm_all_gather)
KERNELS_REPLAY(shmcomm_broadcast)
