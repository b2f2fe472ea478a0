// A linear module: the base model's product with packed bf16 weights, and the adapters' shrink beside it.
#include "lora.h"
#include "team.h"

using namespace lorasrv;

namespace {

// A panel is 16 outputs' weights, [in_features / 2, 16, 2]: what one instruction multiplies lies in one vector.
constexpr int64_t PANEL = 16;

thread_local std::vector<ShrinkItem> items;

#if defined(__AVX512BF16__)

// Far enough ahead for memory, whose next pages the hardware does not fetch by itself. Weights are read strip by strip.
constexpr int64_t STRIP_PAIRS = 8, PREFETCH_STRIPS = 8;
// What a thread takes at a time: for a few rows little, so that none waits long for another; for many rows what fits
// into its cache, so that rows are read once for all of it.
constexpr int64_t FEW_ROWS_PANELS = 2, MANY_ROWS_PANELS = 8;
constexpr int MOST_ROWS = 24;

// What a caller gives, the same for all tiles.
struct Product {
  const bf16* x;  // [num_rows, in_features]
  int64_t num_rows, in_features;
  const bf16* weight;  // [num_panels, in_features / 2, PANEL, 2]
  int64_t num_panels;
  const bf16* bias;  // [num_panels * PANEL]
  void* out;         // [num_rows, num_panels * PANEL]
  bool is_bf16;      // what `out` is of, else of float

  int64_t pairs() const { return in_features / 2; }
  const bf16* strip(int64_t panel, int64_t pair) const { return weight + (panel * pairs() + pair) * 2 * PANEL; }
};

// acc += rows [row, row + R) of C panels, over `count` pairs of input columns, or as many as there are. The panels [A, B)
// of those are read ahead.
template <int R, int C, int A, int B>
inline void accumulate(const Product& p, int64_t row, int64_t panel, int64_t first, int64_t count,
                       __m512 (&acc)[R][C]) {
  const int64_t pairs = p.pairs();
  count = std::min(count, pairs - first);
  const auto* x = reinterpret_cast<const int32_t*>(p.x + row * p.in_features) + first;
  const bf16 *from[C], *ahead[C];
  for (int c = 0; c < C; ++c) {
    from[c] = p.strip(panel + c, first);
    // Behind a panel comes the one that this thread takes next.
    const int64_t pair = first + PREFETCH_STRIPS * STRIP_PAIRS;
    ahead[c] = pair < pairs ? p.strip(panel + c, pair) : p.strip(panel + C + c, pair - pairs);
  }
  for (int64_t pair = 0; pair < count; ++pair) {
    __m512bh columns[C];
    for (int c = 0; c < C; ++c) {
      columns[c] = (__m512bh)_mm512_loadu_si512(from[c] + pair * 2 * PANEL);
      if (A <= c && c < B) _mm_prefetch(reinterpret_cast<const char*>(ahead[c] + pair * 2 * PANEL), _MM_HINT_T0);
    }
    for (int r = 0; r < R; ++r) {
      const auto both = (__m512bh)_mm512_set1_epi32(x[r * pairs + pair]);
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], columns[c], both);
    }
  }
}

template <int R, int C>
inline void finish(const Product& p, int64_t row, int64_t panel, const __m512 (&acc)[R][C]) {
  for (int c = 0; c < C; ++c) {
    const int64_t col = (panel + c) * PANEL;
    const Vec bias = p.bias ? load(p.bias + col) : Vec{};
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * p.num_panels * PANEL + col;
      const Vec total = (Vec)acc[r][c] + bias;
      p.is_bf16 ? store(static_cast<bf16*>(p.out) + at, total) : store(static_cast<float*>(p.out) + at, total);
    }
  }
}

template <int R, int C>
void multiply_tile(const Product& p, int64_t row, int64_t panel) {
  __m512 acc[R][C] = {};
  if (row == 0)
    for (int64_t first = 0; first < p.pairs(); first += STRIP_PAIRS)
      accumulate<R, C, 0, C>(p, row, panel, first, STRIP_PAIRS, acc);
  else  // the weights come from a cache by now
    accumulate<R, C, 0, 0>(p, row, panel, 0, p.pairs(), acc);
  finish(p, row, panel, acc);
}

// More rows than registers hold beside two panels: in halves, each of which reads one panel ahead, so that memory is
// asked evenly.
template <int R, int S>
void multiply_halves(const Product& p, int64_t row, int64_t panel) {
  __m512 upper[R][2] = {}, lower[S][2] = {};
  for (int64_t first = 0; first < p.pairs(); first += STRIP_PAIRS) {
    accumulate<R, 2, 0, 1>(p, row, panel, first, STRIP_PAIRS, upper);
    accumulate<S, 2, 1, 2>(p, row + R, panel, first, STRIP_PAIRS, lower);
  }
  finish(p, row, panel, upper);
  finish(p, row + R, panel, lower);
}

// Rows [row, row + num_rows) of two panels, or of the last one.
template <int R>
void multiply_rows(const Product& p, int64_t row, int64_t num_rows, int64_t panel) {
  if constexpr (R > 0) {
    if (num_rows != R) return multiply_rows<R - 1>(p, row, num_rows, panel);
    if (panel + 1 == p.num_panels) return multiply_tile<R, 1>(p, row, panel);
    if constexpr (R <= 12)
      multiply_tile<R, 2>(p, row, panel);
    else
      multiply_halves<(R + 1) / 2, R / 2>(p, row, panel);
  }
}

int64_t panels_per_task(const Product& p) { return p.num_rows <= MOST_ROWS ? FEW_ROWS_PANELS : MANY_ROWS_PANELS; }

// All rows of the panels of a task, in blocks as even as can be.
void multiply_panels(const Product& p, int64_t first_panel) {
  const int64_t end = std::min(first_panel + panels_per_task(p), p.num_panels);
  const int64_t num_blocks = p.num_rows <= MOST_ROWS ? 1 : up(p.num_rows, 12);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t row = block * p.num_rows / num_blocks, next = (block + 1) * p.num_rows / num_blocks;
    for (int64_t panel = first_panel; panel < end; panel += 2) multiply_rows<MOST_ROWS>(p, row, next - row, panel);
  }
}

// Each thread goes through a stretch of tasks of its own, so that what it reads ahead is what it takes next; who is
// through helps others from where they are.
class Stretches {
 public:
  Stretches(int64_t num_tasks, int64_t num_threads) : num_tasks_(num_tasks), num_threads_(num_threads) {
    for (int64_t thread = 0; thread < num_threads; ++thread) next_[thread] = start(thread);
  }

  template <typename F>
  void run(int64_t thread, F f) {
    for (int64_t i = 0; i < num_threads_; ++i) {
      const int64_t owner = (thread + i) % num_threads_, end = start(owner + 1);
      for (int64_t task; (task = next_[owner].fetch_add(1, std::memory_order_relaxed)) < end;) f(task);
    }
  }

 private:
  int64_t start(int64_t thread) const { return thread * num_tasks_ / num_threads_; }

  int64_t num_tasks_, num_threads_;
  std::atomic<int64_t> next_[Team::MOST_THREADS];
};

#endif

template <typename T>
void shrink_all(const Adapters& adapters, const T* x, int64_t in_features) {
  list_shrinks(adapters, items);
  const std::vector<ShrinkItem>& list = items;
  const int64_t count = list.size();
  each_task(count, [&](int64_t i) {
    shrink<T>(adapters, list[i], list[std::min(i + 1, count - 1)], x, in_features);
  });
}

}  // namespace

LORASRV_EXPORT int lorasrv_lanes() { return LANES; }

// Whether products with packed weights are here.
LORASRV_EXPORT int lorasrv_multiplies() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// [out_features, in_features] to panels, in place: a panel's weights lie where its rows were. out_features is a multiple
// of 16, in_features of 2.
LORASRV_EXPORT void lorasrv_pack(uint32_t* weight, int64_t out_features, int64_t in_features) {
  const int64_t pairs = in_features / 2;
  each_task(out_features / PANEL, [=](int64_t panel) {
    uint32_t* packed = weight + panel * PANEL * pairs;
    const std::vector<uint32_t> rows(packed, packed + PANEL * pairs);
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t col = 0; col < PANEL; ++col) packed[pair * PANEL + col] = rows[col * pairs + pair];
  });
}

// out = x @ weight^T + bias; and the adapters' shrink of x, if there are any.
LORASRV_EXPORT void lorasrv_project(const bf16* x, int64_t num_rows, int64_t in_features, const bf16* weight,
                                    int64_t out_features, const bf16* bias, int out_is_bf16, void* out,
                                    const Adapters* adapters) {
#if defined(__AVX512BF16__)
  const Product product{x, num_rows, in_features, weight, out_features / PANEL, bias, out, out_is_bf16 != 0};
  items.clear();
  if (adapters) list_shrinks(*adapters, items);
  const std::vector<ShrinkItem>& list = items;
  const int64_t count = list.size();
  const int64_t step = panels_per_task(product);
  const int num_threads = std::min(omp_get_max_threads(), Team::MOST_THREADS);
  Stretches shrinks(count, num_threads), panels(up(product.num_panels, step), num_threads);
  Team::shared().run(num_threads, [&](int thread) {
    shrinks.run(thread, [&](int64_t i) {
      shrink<bf16>(*adapters, list[i], list[std::min(i + 1, count - 1)], x, in_features);
    });
    panels.run(thread, [&](int64_t task) { multiply_panels(product, task * step); });
  });
#endif
}

LORASRV_EXPORT void lorasrv_shrink(int is_bf16, const void* x, int64_t in_features, const Adapters* adapters) {
  if (is_bf16)
    shrink_all(*adapters, static_cast<const bf16*>(x), in_features);
  else
    shrink_all(*adapters, static_cast<const float*>(x), in_features);
}
