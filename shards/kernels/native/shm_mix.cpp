// The weighted sums of experts' results over the ranks that share them: each rank makes those of some columns for all,
// so that results cross once, and the sums once more. See shm.h; the Python half is shards/shm.py.
#include <type_traits>

#include "replay.h"
#include "shm.h"

using namespace shm;

namespace {

// Out is float or, as bits, bfloat16. Results y [T, K, C] are parts of sums, in float, or with `ids` whole rows in Out, of which
// a rank has those of the experts that it holds.
template <class Out>
struct Mix {
  Group* g;
  const float* parts;    // or null
  const Out* whole;      // or null
  const float* weights;  // [T, K]
  const int64_t* ids;    // [T, K]
  int64_t held;          // experts of a rank
  const float* shared;   // parts of one more row a token, summed alone; or null
  Out* out;              // [T, C]
  Out* shared_out;       // [T, C]
  int64_t T, K, C;

  int64_t begin_of(int r) const { return C * r / g->size; }
  int64_t columns_of(int r) const { return begin_of(r + 1) - begin_of(r); }
  int64_t widest() const { return (C + g->size - 1) / g->size; }
  int64_t rows_of_token() const { return K + (shared != nullptr); }
  size_t item() const { return parts != nullptr ? sizeof(float) : sizeof(Out); }

  // Where rank `from` puts row k of the chunk's token t for rank `to`.
  char* place(int from, int to, int64_t chunk, int64_t t, int64_t k) const {
    int64_t other = to < from ? to : to - 1;
    return g->slot(from) + ((other * chunk + t) * rows_of_token() + k) * widest() * int64_t(item());
  }

  bool mine(int64_t pair) const { return ids == nullptr || ids[pair] / held == g->rank; }

  void put(int64_t first, int64_t chunk, int64_t tokens) const {
    for (int to = 0; to < g->size; ++to) {
      if (to == g->rank) continue;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t k = 0; k < rows_of_token(); ++k)
          if (k == K || mine((first + t) * K + k))
            std::memcpy(place(g->rank, to, chunk, t, k), own(first + t, k, begin_of(to)), columns_of(to) * item());
    }
  }

  const char* own(int64_t t, int64_t k, int64_t column) const {
    if (k == K) return reinterpret_cast<const char*>(shared + t * C + column);
    int64_t at = (t * K + k) * C + column;
    return parts != nullptr ? reinterpret_cast<const char*>(parts + at) : reinterpret_cast<const char*>(whole + at);
  }

  // Row k of token first + t as rank r has it, from column `at` of mine on.
  const char* row(int r, int64_t first, int64_t chunk, int64_t t, int64_t k, int64_t at) const {
    if (r == g->rank) return own(first + t, k, begin_of(r) + at);
    return place(r, g->rank, chunk, t, k) + at * int64_t(item());
  }

  void mix(int64_t first, int64_t chunk, int64_t t) const {
    int64_t columns = columns_of(g->rank), token = first + t;
    Out* to = out + token * C + begin_of(g->rank);
    for (int64_t at = 0; at < columns; at += kBlock) {
      int n = static_cast<int>(columns - at < kBlock ? columns - at : kBlock);
      float total[kBlock] = {};
      for (int64_t k = 0; k < K; ++k) {
        float weight = weights[token * K + k];
        if (ids != nullptr) {
          int owner = static_cast<int>(ids[token * K + k] / held);
          add(reinterpret_cast<const Out*>(row(owner, first, chunk, t, k, at)), n, weight, total);
        } else {
          Out rounded[kBlock];
          sum(first, chunk, t, k, at, n, rounded);
          add(rounded, n, weight, total);
        }
      }
      round(total, n, to + at);
      if (shared != nullptr) sum(first, chunk, t, K, at, n, shared_out + token * C + begin_of(g->rank) + at);
    }
  }

  // The ranks' parts of a row, summed and rounded.
  void sum(int64_t first, int64_t chunk, int64_t t, int64_t k, int64_t at, int n, Out* to) const {
    const float* rows[kMaxRanks];
    for (int r = 0; r < g->size; ++r) rows[r] = reinterpret_cast<const float*>(row(r, first, chunk, t, k, at));
    if (g->size == 2) return round_sum(rows[0], rows[1], n, to);
    float scratch[kMaxRanks][kBlock];
    round(tree(rows, g->size, n, scratch), n, to);
  }

  MANY_TARGETS static void round_sum(const float* a, const float* b, int n, Out* __restrict to) {
    for (int j = 0; j < n; ++j) store(to + j, a[j] + b[j]);
  }
  MANY_TARGETS static void round(const float* x, int n, Out* __restrict to) {
    for (int j = 0; j < n; ++j) store(to + j, x[j]);
  }
  MANY_TARGETS static void add(const Out* x, int n, float weight, float* __restrict total) {
    for (int j = 0; j < n; ++j) total[j] += load(x + j) * weight;
  }

  // My columns of the sums of some tokens into my slot; and everybody's out of theirs.
  void put_sums(int64_t first, int64_t tokens) const {
    Out* slot = reinterpret_cast<Out*>(g->slot(g->rank));
    for (int64_t t = 0; t < tokens; ++t)
      for (const Out* from : {out, shared_out})
        if (from != nullptr) {
          std::memcpy(slot, from + (first + t) * C + begin_of(g->rank), columns_of(g->rank) * sizeof(Out));
          slot += widest();
        }
  }

  void take_sums(int64_t first, int64_t tokens) const {
    for (int r = 0; r < g->size; ++r) {
      if (r == g->rank) continue;
      const Out* slot = reinterpret_cast<const Out*>(g->slot(r));
      for (int64_t t = 0; t < tokens; ++t)
        for (Out* to : {out, shared_out})
          if (to != nullptr) {
            std::memcpy(to + (first + t) * C + begin_of(r), slot, columns_of(r) * sizeof(Out));
            slot += widest();
          }
    }
  }

  int run(int64_t timeout_ns) const {
    uint64_t meta = describe(kMix, T * C * int64_t(sizeof(Out)));
    int64_t token_bytes = (g->size - 1) * rows_of_token() * widest() * int64_t(item());
    int64_t chunk = g->slot_bytes / token_bytes;
    if (chunk < 1) return fail(g, kMismatch);
    for (int64_t first = 0; first == 0 || first < T; first += chunk) {
      int64_t tokens = T - first < chunk ? T - first : chunk;
      if (int code = begin(g, meta)) return code;
      put(first, chunk, tokens);
      if (int code = meet(g, timeout_ns)) return code;
      if (int code = agree(g, meta)) return code;
      for (int64_t t = 0; t < tokens; ++t) mix(first, chunk, t);
      if (int code = begin(g, meta)) return code;
      put_sums(first, tokens);
      if (int code = meet(g, timeout_ns)) return code;
      take_sums(first, tokens);
    }
    return kDone;
  }
};

}  // namespace

// For T tokens the weighted sum over K of y [T, K, C] -> out [T, C], rounded to out's type before and behind. Without `ids` y
// holds parts in float, which are summed over the ranks first, as is `shared` [T, C] -> shared_out (or all null). With
// `ids` [T, K] y has out's type, and rank id / held has the row.
extern "C" int shmcomm_mix(void* handle, int bfloat, const void* y, const float* weights, const int64_t* ids, int64_t held,
                           const float* shared, void* out, void* shared_out, int64_t T, int64_t K, int64_t C,
                           int64_t timeout_ns) {
  auto run = [&](auto* typed_out) {
    using Out = std::remove_pointer_t<decltype(typed_out)>;
    const float* parts = ids == nullptr ? static_cast<const float*>(y) : nullptr;
    const Out* whole = ids == nullptr ? nullptr : static_cast<const Out*>(y);
    return Mix<Out>{static_cast<Group*>(handle), parts, whole, weights, ids, held, shared, typed_out,
                    static_cast<Out*>(shared_out), T, K, C}
        .run(timeout_ns);
  };
  return bfloat ? run(static_cast<uint16_t*>(out)) : run(static_cast<float*>(out));
}

KERNELS_REPLAY(shmcomm_mix)
