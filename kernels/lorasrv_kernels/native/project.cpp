// A linear module: the base model's product with packed bf16 weights and all that adapters add to it.
#include <omp.h>

#include "lora.h"

using namespace lorasrv;

namespace {

// A panel is 16 outputs' weights, [in_features / 2, 16, 2]: what one instruction multiplies lies in one vector.
constexpr int64_t PANEL = 16;

thread_local std::vector<ShrinkItem> items;

#if defined(__AVX512BF16__)

// Far enough ahead for memory, whose next pages the hardware does not fetch by itself.
constexpr int64_t PREFETCH_BYTES = 4096;
// What a thread takes at a time: for a few rows little, so that none waits long for another; for many rows what fits
// into its cache, so that rows are read once for all of it.
constexpr int64_t FEW_ROWS_PANELS = 2, MANY_ROWS_PANELS = 8;
constexpr int64_t STRIP_PAIRS = 32;
constexpr int MOST_ROWS = 24;

// What a caller gives, the same for all tiles.
struct Product {
  const bf16* x;  // [num_rows, in_features]
  int64_t num_rows, in_features;
  const bf16* weight;  // [num_panels, in_features / 2, PANEL, 2]
  int64_t num_panels;
  const bf16* bias;          // [num_panels * PANEL]
  bf16* out;                 // [num_rows, num_panels * PANEL]
  const Adapters* adapters;  // shrunk
};

// acc += rows [row, row + R) of C panels, over the pairs [first, last) of input columns.
template <int R, int C, bool prefetching = true>
inline void accumulate(const Product& p, int64_t row, int64_t panel, int64_t first, int64_t last, __m512 (&acc)[R][C]) {
  const int64_t panel_elems = p.in_features * PANEL, pairs = p.in_features / 2;
  const bf16* weight = p.weight + panel * panel_elems;
  const auto* x = reinterpret_cast<const int32_t*>(p.x + row * p.in_features);
  for (int64_t pair = first; pair < last; ++pair) {
    __m512bh columns[C];
    for (int c = 0; c < C; ++c) {
      const bf16* from = weight + c * panel_elems + pair * 2 * PANEL;
      columns[c] = (__m512bh)_mm512_loadu_si512(from);
      if (prefetching) _mm_prefetch(reinterpret_cast<const char*>(from) + PREFETCH_BYTES, _MM_HINT_T0);
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
  if (p.adapters) {
    constexpr int64_t stride = C * PANEL + LANES;
    float total[R * stride];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(total + r * stride + c * PANEL, (Vec)acc[r][c]);
    expand<bf16>(*p.adapters, row, row + R, col, col + C * PANEL, total, stride);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = (__m512)load(total + r * stride + c * PANEL);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(p.out + (row + r) * width + col + c * PANEL, (Vec)acc[r][c]);
}

template <int R, int C>
void multiply_tile(const Product& p, int64_t row, int64_t panel) {
  __m512 acc[R][C] = {};
  accumulate(p, row, panel, 0, p.in_features / 2, acc);
  finish(p, row, panel, acc);
}

// More rows than registers hold beside two panels: in halves, strip by strip, while the next strip comes from memory.
template <int R, int S>
void multiply_halves(const Product& p, int64_t row, int64_t panel) {
  __m512 upper[R][2] = {}, lower[S][2] = {};
  for (int64_t first = 0; first < p.in_features / 2; first += STRIP_PAIRS) {
    const int64_t last = std::min(first + STRIP_PAIRS, p.in_features / 2);
    accumulate<R, 2>(p, row, panel, first, last, upper);
    accumulate<S, 2, false>(p, row + R, panel, first, last, lower);
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
  if (p.adapters)
    each_share<bf16>(*p.adapters, 0, p.num_rows, first_panel * PANEL, end * PANEL, [](const Share<bf16>& share) {
      for (int64_t r = 0; r < share.num_rows; ++r)
        prefetch(share.weights + r * share.stride, share.num_cols * sizeof(bf16));
    });
  const int64_t num_blocks = p.num_rows <= MOST_ROWS ? 1 : up(p.num_rows, 12);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t row = block * p.num_rows / num_blocks, next = (block + 1) * p.num_rows / num_blocks;
    for (int64_t panel = first_panel; panel < end; panel += 2) multiply_rows<MOST_ROWS>(p, row, next - row, panel);
  }
}

#endif

// By all threads of a team, each every num_threads-th item, so that it knows what it reads next.
template <typename T>
void shrink_listed(const Adapters& adapters, const std::vector<ShrinkItem>& list, const T* x, int64_t in_features) {
  const int64_t count = list.size(), step = omp_get_num_threads();
  int64_t i = omp_get_thread_num();
  if (i < count) fetch<T>(adapters, list[i], in_features);
  for (; i < count; i += step) {
    if (i + step < count) fetch<T>(adapters, list[i + step], in_features);
    shrink<T>(adapters, list[i], x, in_features);
  }
}

template <typename T>
void shrink_all(const Adapters& adapters, const T* x, int64_t in_features) {
  list_shrinks(adapters, items);
  const std::vector<ShrinkItem>& list = items;
#pragma omp parallel if (list.size() > 1)
  shrink_listed(adapters, list, x, in_features);
}

constexpr int64_t EXPAND_TOKENS = 8, EXPAND_COLS = 256;

template <typename T>
void expand_all(const Adapters& adapters, T* out, int64_t out_features) {
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t start = 0; start < adapters.num_tokens; start += EXPAND_TOKENS)
    for (int64_t low = 0; low < out_features; low += EXPAND_COLS) {
      constexpr int64_t stride = EXPAND_COLS + LANES;
      float total[EXPAND_TOKENS * stride];
      const int64_t end = std::min(start + EXPAND_TOKENS, adapters.num_tokens);
      const int64_t width = std::min(EXPAND_COLS, out_features - low);
      const auto each_vector = [&](auto f) {
        for (int64_t token = start; token < end; ++token)
          for (int64_t at = 0; at < width; at += LANES)
            f(total + (token - start) * stride + at, out + token * out_features + low + at, width - at);
      };
      each_vector([](float* wide, T* stored, int64_t left) { store(wide, load_upto(stored, left)); });
      expand<T>(adapters, start, end, low, low + width, total, stride);
      each_vector([](float* wide, T* stored, int64_t left) { store_upto(stored, load(wide), left); });
    }
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

// out = x @ weight^T + bias + what the adapters add, if there are any, whose `h` is written on the way.
LORASRV_EXPORT void lorasrv_project(const bf16* x, int64_t num_rows, int64_t in_features, const bf16* weight,
                                    int64_t out_features, const bf16* bias, bf16* out, const Adapters* adapters) {
#if defined(__AVX512BF16__)
  const Product product{x, num_rows, in_features, weight, out_features / PANEL, bias, out, adapters};
  items.clear();
  if (adapters) list_shrinks(*adapters, items);
  const std::vector<ShrinkItem>& list = items;
  const int64_t step = panels_per_task(product);
#pragma omp parallel
  {
    if (!list.empty()) {
      shrink_listed(*adapters, list, x, in_features);
#pragma omp barrier
    }
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < product.num_panels; panel += step) multiply_panels(product, panel);
  }
#endif
}

LORASRV_EXPORT void lorasrv_shrink(int is_bf16, const void* x, int64_t in_features, const Adapters* adapters) {
  if (is_bf16)
    shrink_all(*adapters, static_cast<const bf16*>(x), in_features);
  else
    shrink_all(*adapters, static_cast<const float*>(x), in_features);
}

LORASRV_EXPORT void lorasrv_expand(int is_bf16, const Adapters* adapters, void* out, int64_t out_features) {
  if (is_bf16)
    expand_all(*adapters, static_cast<bf16*>(out), out_features);
  else
    expand_all(*adapters, static_cast<float*>(out), out_features);
}
