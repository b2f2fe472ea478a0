// A linear module: the base model's product with packed bf16 weights, and the adapters' shrink beside it.
#include <atomic>

#include "lora.h"

using namespace lorasrv;

namespace {

// A panel is 16 outputs' weights, [in_features / 2, 16, 2]: what one instruction multiplies lies in one vector.
constexpr int64_t PANEL = 16;

thread_local std::vector<ShrinkItem> items;

#if defined(__AVX512BF16__)

// Elements: far enough ahead for memory, whose next pages the hardware does not fetch by itself.
constexpr int64_t PREFETCH = 2048;
// What a thread takes at a time: for a few rows little, so that none waits long for another; for many rows what fits
// into its cache, so that rows are read once for all of it.
constexpr int64_t FEW_ROWS_PANELS = 2, MANY_ROWS_PANELS = 8;
constexpr int64_t STRIP_PAIRS = 32;
constexpr int FEW_ROWS = 24, BLOCK_ROWS = 12;

// What a caller gives, the same for all tiles.
struct Product {
  const bf16* x;  // [num_rows, in_features]
  int64_t num_rows, in_features;
  const bf16* weight;  // [num_panels, in_features / 2, PANEL, 2]
  int64_t num_panels;
  const bf16* bias;  // [num_panels * PANEL]
  bf16* out;         // [num_rows, num_panels * PANEL]
};

// Rows of two panels, or of the last one; and the panel that this thread comes to next.
struct Tile {
  int64_t row, panel, next;
};

// acc += rows [row, row + R) of C panels, over the pairs [first, last) of input columns.
template <int R, int C, bool prefetching>
inline void accumulate(const Product& p, int64_t row, const Tile& tile, int64_t first, int64_t last,
                       __m512 (&acc)[R][C]) {
  const int64_t panel_elems = p.in_features * PANEL, pairs = p.in_features / 2;
  const bf16* weight = p.weight + tile.panel * panel_elems;
  const auto* x = reinterpret_cast<const int32_t*>(p.x + row * p.in_features);
  // Behind a panel's end comes the begin of those that are met next.
  const bool within = first * 2 * PANEL + PREFETCH < panel_elems;
  const bf16* ahead = (within ? weight : p.weight + (tile.next - 1) * panel_elems) + PREFETCH;
  for (int64_t pair = first; pair < last; ++pair) {
    __m512bh columns[C];
    for (int c = 0; c < C; ++c) {
      const int64_t at = c * panel_elems + pair * 2 * PANEL;
      columns[c] = (__m512bh)_mm512_loadu_si512(weight + at);
      if (prefetching) _mm_prefetch(reinterpret_cast<const char*>(ahead + at), _MM_HINT_T0);
    }
    for (int r = 0; r < R; ++r) {
      const auto both = (__m512bh)_mm512_set1_epi32(x[r * pairs + pair]);
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], columns[c], both);
    }
  }
}

template <int R, int C>
inline void finish(const Product& p, int64_t row, int64_t panel, __m512 (&acc)[R][C]) {
  const int64_t col = panel * PANEL, width = p.num_panels * PANEL;
  if (p.bias)
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) acc[r][c] += (__m512)load(p.bias + col + c * PANEL);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(p.out + (row + r) * width + col + c * PANEL, (Vec)acc[r][c]);
}

// A task's first rows: strip by strip, while others come from memory. More than registers hold beside two panels: in
// halves.
template <int R, int C>
void multiply_first(const Product& p, const Tile& tile) {
  constexpr int S = R * C > 2 * BLOCK_ROWS ? (R + 1) / 2 : R;
  __m512 upper[S][C] = {}, lower[std::max(R - S, 1)][C] = {};
  for (int64_t first = 0; first < p.in_features / 2; first += STRIP_PAIRS) {
    const int64_t last = std::min(first + STRIP_PAIRS, p.in_features / 2);
    accumulate<S, C, true>(p, tile.row, tile, first, last, upper);
    if constexpr (R > S) accumulate<R - S, C, false>(p, tile.row + S, tile, first, last, lower);
  }
  finish(p, tile.row, tile.panel, upper);
  if constexpr (R > S) finish(p, tile.row + S, tile.panel, lower);
}

// Its other rows, whose weights come from a cache.
template <int R, int C>
void multiply_others(const Product& p, const Tile& tile) {
  __m512 acc[R][C] = {};
  accumulate<R, C, false>(p, tile.row, tile, 0, p.in_features / 2, acc);
  finish(p, tile.row, tile.panel, acc);
}

template <int R>
void multiply_rows(const Product& p, int64_t num_rows, const Tile& tile) {
  if constexpr (R > 0) {
    if (num_rows != R) return multiply_rows<R - 1>(p, num_rows, tile);
    const bool last = tile.panel + 1 == p.num_panels;
    if (tile.row == 0)
      last ? multiply_first<R, 1>(p, tile) : multiply_first<R, 2>(p, tile);
    else if constexpr (R <= BLOCK_ROWS)
      last ? multiply_others<R, 1>(p, tile) : multiply_others<R, 2>(p, tile);
  }
}

int64_t panels_per_task(const Product& p) { return p.num_rows <= FEW_ROWS ? FEW_ROWS_PANELS : MANY_ROWS_PANELS; }

// All rows of the panels of a task, in blocks as even as can be; `following` is the first panel of the next task.
void multiply_panels(const Product& p, int64_t first_panel, int64_t following) {
  const int64_t end = std::min(first_panel + panels_per_task(p), p.num_panels);
  const int64_t num_blocks = p.num_rows <= FEW_ROWS ? 1 : up(p.num_rows, BLOCK_ROWS);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t row = block * p.num_rows / num_blocks, next = (block + 1) * p.num_rows / num_blocks;
    for (int64_t panel = first_panel; panel < end; panel += 2)
      multiply_rows<FEW_ROWS>(p, next - row, {row, panel, panel + 2 < end ? panel + 2 : following});
  }
}

#endif

template <typename T>
void shrink_all(const Adapters& adapters, const T* x, int64_t in_features) {
  list_shrinks(adapters, items);
  const std::vector<ShrinkItem>& list = items;
  const int64_t count = list.size();
#pragma omp parallel for schedule(dynamic) if (count > 1)
  for (int64_t i = 0; i < count; ++i) shrink<T>(adapters, list[i], x, in_features);
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
#pragma omp parallel
  {
    std::vector<uint32_t> rows(PANEL * pairs);
#pragma omp for
    for (int64_t panel = 0; panel < out_features / PANEL; ++panel) {
      uint32_t* packed = weight + panel * PANEL * pairs;
      std::copy_n(packed, rows.size(), rows.data());
      for (int64_t pair = 0; pair < pairs; ++pair)
        for (int64_t col = 0; col < PANEL; ++col) packed[pair * PANEL + col] = rows[col * pairs + pair];
    }
  }
}

// out = x @ weight^T + bias; and the adapters' shrink of x, if there are any.
LORASRV_EXPORT void lorasrv_project(const bf16* x, int64_t num_rows, int64_t in_features, const bf16* weight,
                                    int64_t out_features, const bf16* bias, bf16* out, const Adapters* adapters) {
#if defined(__AVX512BF16__)
  const Product product{x, num_rows, in_features, weight, out_features / PANEL, bias, out};
  items.clear();
  if (adapters) list_shrinks(*adapters, items);
  const std::vector<ShrinkItem>& list = items;
  const int64_t step = panels_per_task(product);
  const int64_t count = list.size();
  std::atomic<int64_t> taken{0};
#pragma omp parallel
  {
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < count; ++i) shrink<bf16>(*adapters, list[i], x, in_features);
    // A thread takes panels before it begins those that it has: while it ends these it fetches those.
    for (int64_t panel = taken.fetch_add(step); panel < product.num_panels;) {
      const int64_t following = taken.fetch_add(step);
      multiply_panels(product, panel, std::min(following, product.num_panels - 1));
      panel = following;
    }
  }
#endif
}

LORASRV_EXPORT void lorasrv_shrink(int is_bf16, const void* x, int64_t in_features, const Adapters* adapters) {
  if (is_bf16)
    shrink_all(*adapters, static_cast<const bf16*>(x), in_features);
  else
    shrink_all(*adapters, static_cast<const float*>(x), in_features);
}
