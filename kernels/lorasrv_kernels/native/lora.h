// Adapters in the pool: what `reference` says of directories and tiles, and the two products with them.
#pragma once

#include <vector>

#include "vectors.h"

namespace lorasrv {

constexpr int ADDRESS_BYTES = 128;
constexpr int TILE_ROWS = 16;
constexpr int HEADER_FIELDS = 4;

// As `tiles.Matrix` and `tiles.Module`.
struct Matrix {
  int64_t cols, chunk, odd_chunk;
  int64_t chunk_for(int64_t num_rows) const { return num_rows & (num_rows - 1) ? odd_chunk : chunk; }
};

struct Module {
  int64_t index;
  Matrix a, b;
};

// As `tiles.Segments` and `tiles.Delta`: what is the same for all that a step's layers ask of one group of modules.
struct Adapters {
  const uint8_t* pool;
  const int32_t* starts;  // [num_segments]
  const int32_t* ends;
  const int32_t* directories;
  const float* scales;
  int64_t num_segments;
  int64_t num_modules;  // of a directory
  const Module* modules;  // [group]
  int64_t group;
  int64_t layer;
  float* h;  // [group, num_tokens, stride]
  int64_t num_tokens;
  int64_t stride;

  float* row(int64_t module, int64_t token) const { return h + (module * num_tokens + token) * stride; }
};

struct Header {
  int32_t rank, first_a, first_b;
  float scale;
};

inline const int32_t* directory_of(const Adapters& adapters, int64_t segment) {
  return reinterpret_cast<const int32_t*>(adapters.pool + int64_t{adapters.directories[segment]} * ADDRESS_BYTES);
}

inline Header header_of(const Adapters& adapters, int64_t segment, int64_t module) {
  const int64_t at = (adapters.layer * adapters.num_modules + adapters.modules[module].index) * HEADER_FIELDS;
  Header header;
  std::memcpy(&header, directory_of(adapters, segment) + at, sizeof header);
  return header;
}

// Calls f(tile, first column, number of columns) for the tiles of a row block that meet the columns [low, high).
template <typename T, typename F>
inline void each_tile(const Adapters& adapters, int64_t segment, int32_t first, const Matrix& matrix, int64_t row,
                      int64_t num_rows, int64_t low, int64_t high, F f) {
  // Full row blocks come first, and are cut alike.
  const int64_t before = row / TILE_ROWS * up(matrix.cols, matrix.chunk_for(TILE_ROWS));
  const int64_t chunk = matrix.chunk_for(num_rows);
  const int32_t* addresses = directory_of(adapters, segment) + first + before;
  for (int64_t number = low / chunk; number * chunk < high; ++number) {
    const int64_t col = number * chunk;
    const auto* tile = reinterpret_cast<const T*>(adapters.pool + int64_t{addresses[number]} * ADDRESS_BYTES);
    f(tile, col, std::min(chunk, matrix.cols - col));
  }
}

// Rows [row, row + num_rows) of one module's A, within a row block of `block_rows`, met by a segment's tokens
// [start, end).
struct ShrinkItem {
  int64_t segment, module, row, num_rows, block_rows, start, end;
  Header header;
};

// Little, so that threads share one adapter's.
constexpr int64_t SHRINK_TOKENS = 32, SHRINK_ROWS = 8;

inline void list_shrinks(const Adapters& adapters, std::vector<ShrinkItem>& items) {
  items.clear();
  for (int64_t segment = 0; segment < adapters.num_segments; ++segment)
    for (int64_t module = 0; module < adapters.group; ++module) {
      const Header header = header_of(adapters, segment, module);
      for (int64_t row = 0; row < header.rank; row += SHRINK_ROWS) {
        const int64_t block = row / TILE_ROWS * TILE_ROWS;
        for (int64_t start = adapters.starts[segment]; start < adapters.ends[segment]; start += SHRINK_TOKENS)
          items.push_back({segment, module, row, std::min<int64_t>(SHRINK_ROWS, header.rank - row),
                           std::min<int64_t>(TILE_ROWS, header.rank - block), start,
                           std::min<int64_t>(start + SHRINK_TOKENS, adapters.ends[segment]), header});
      }
    }
}

// Calls f(the item's first row of a tile, first column, number of columns) for the tiles that the item meets.
template <typename T, typename F>
inline void each_shrunk(const Adapters& adapters, const ShrinkItem& item, int64_t in_features, F f) {
  each_tile<T>(adapters, item.segment, item.header.first_a, adapters.modules[item.module].a, item.row, item.block_rows,
               0, in_features, [&](const T* tile, int64_t col, int64_t cols) {
                 f(tile + item.row % TILE_ROWS * cols, col, cols);
               });
}

template <typename T>
inline void fetch(const Adapters& adapters, const ShrinkItem& item, int64_t in_features) {
  each_shrunk<T>(adapters, item, in_features, [&](const T* rows, int64_t, int64_t cols) {
    prefetch(rows, item.num_rows * cols * sizeof(T));
  });
}

// sums[r][t] += tile[r] . x[t] for R rows of a tile and N tokens.
template <typename T, int R, int N>
inline void dots(const T* tile, int64_t tile_stride, const T* x, int64_t x_stride, int64_t cols, Vec (&acc)[R][N]) {
  for (int64_t col = 0; col < cols; col += Wide<T>::count) {
    Wide<T> tokens[N];
    for (int n = 0; n < N; ++n) tokens[n] = Wide<T>::read(x + n * x_stride + col, cols - col);
    for (int r = 0; r < R; ++r) {
      const Wide<T> weights = Wide<T>::read(tile + r * tile_stride + col, cols - col);
      for (int n = 0; n < N; ++n) acc[r][n] = Wide<T>::add(acc[r][n], weights, tokens[n]);
    }
  }
}

template <typename T, int R, int N>
inline void shrink_block(const Adapters& adapters, const ShrinkItem& item, int64_t row, int64_t token, const T* x,
                         int64_t in_features) {
  Vec acc[R][N] = {};
  each_shrunk<T>(adapters, item, in_features, [&](const T* rows, int64_t col, int64_t cols) {
    dots<T, R, N>(rows + (row - item.row) * cols, cols, x + token * in_features + col, in_features, cols, acc);
  });
  const float scale = adapters.scales[item.segment] * item.header.scale;
  if constexpr (R * N == LANES) {
    Vec flat[LANES];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) flat[n * R + r] = acc[r][n];
    const Vec total = sums(flat) * scale;
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) adapters.row(item.module, token + n)[row + r] = total[n * R + r];
  } else {
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) adapters.row(item.module, token + n)[row + r] = sum(acc[r][n]) * scale;
  }
}

// As `reference.sgmv_shrink`, for one item.
template <typename T>
inline void shrink(const Adapters& adapters, const ShrinkItem& item, const T* x, int64_t in_features) {
  const int64_t last_row = item.row + item.num_rows;
  int64_t token = item.start;
  const auto rows = [&](auto num_tokens) {
    constexpr int N = decltype(num_tokens)::value;
    constexpr int R = N == 1 ? 8 : 4;
    int64_t row = item.row;
    for (; row + R <= last_row; row += R) shrink_block<T, R, N>(adapters, item, row, token, x, in_features);
    for (; row < last_row; ++row) shrink_block<T, 1, N>(adapters, item, row, token, x, in_features);
    token += N;
  };
  while (token + 4 <= item.end) rows(std::integral_constant<int, 4>{});
  while (token < item.end) rows(std::integral_constant<int, 1>{});
}

// What `num_rows` rank rows of an adapter's B add to the columns [col, col + num_cols) of the tokens [start, end).
template <typename T>
struct Share {
  int64_t start, end, col, num_cols;
  const T* weights;  // [num_rows, stride]
  int64_t num_rows, stride;
  const float* h;  // of the first token
};

// Calls f(share) for all that is added to the columns [low, high) of the tokens [start, end) of a step; columns are
// those of the modules side by side.
template <typename T, typename F>
inline void each_share(const Adapters& adapters, int64_t start, int64_t end, int64_t low, int64_t high, F f) {
  const int32_t* ends = adapters.ends;
  for (int64_t segment = std::upper_bound(ends, ends + adapters.num_segments, start) - ends;
       segment < adapters.num_segments && adapters.starts[segment] < end; ++segment) {
    const int64_t from = std::max<int64_t>(start, adapters.starts[segment]), to = std::min<int64_t>(end, ends[segment]);
    int64_t first_col = 0;
    for (int64_t module = 0; module < adapters.group && first_col < high; ++module) {
      const Matrix& matrix = adapters.modules[module].b;
      const int64_t own_low = std::max<int64_t>(low - first_col, 0), own_high = std::min(high - first_col, matrix.cols);
      const Header header = own_low < own_high && from < to ? header_of(adapters, segment, module) : Header{};
      for (int64_t row = 0; row < header.rank; row += TILE_ROWS) {
        const int64_t num_rows = std::min<int64_t>(TILE_ROWS, header.rank - row);
        each_tile<T>(adapters, segment, header.first_b, matrix, row, num_rows, own_low, own_high,
                     [&](const T* tile, int64_t col, int64_t cols) {
                       const int64_t left = std::max(own_low, col), right = std::min(own_high, col + cols);
                       f(Share<T>{from, to, first_col + left, right - left, tile + left - col, num_rows, cols,
                                  adapters.row(module, from) + row});
                     });
      }
      first_col += matrix.cols;
    }
  }
}

// total[n][c] += h[n] . weights[:, c] for N tokens and C vectors of columns, of which `left` are there.
template <typename T, int N, int C>
inline void expand_cols(const Share<T>& share, const float* h, int64_t h_stride, int64_t col, float* total,
                        int64_t stride) {
  const T* weights = share.weights + col;
  const int64_t left = share.num_cols - col;
  Vec acc[N][C];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) acc[n][c] = load(total + n * stride + c * LANES);
  for (int64_t row = 0; row < share.num_rows; ++row, weights += share.stride) {
    Vec own[C];
    for (int c = 0; c < C; ++c) own[c] = load_upto(weights + c * LANES, left - c * LANES);
    for (int n = 0; n < N; ++n)
      for (int c = 0; c < C; ++c) acc[n][c] += h[n * h_stride + row] * own[c];
  }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) store(total + n * stride + c * LANES, acc[n][c]);
}

template <typename T, int N>
inline void expand_rows(const Share<T>& share, const float* h, int64_t h_stride, float* total, int64_t stride) {
  int64_t col = 0;
  for (; col + 2 * LANES <= share.num_cols; col += 2 * LANES)
    expand_cols<T, N, 2>(share, h, h_stride, col, total + col, stride);
  for (; col < share.num_cols; col += LANES) expand_cols<T, N, 1>(share, h, h_stride, col, total + col, stride);
}

// As `reference.sgmv_expand`, for the tokens [start, end) and the columns [low, high) of a step: added to `total`, whose
// rows are `stride` apart and end with room for a vector, since a column's neighbours are read and written with it.
template <typename T>
inline void expand(const Adapters& adapters, int64_t start, int64_t end, int64_t low, int64_t high, float* total,
                   int64_t stride) {
  each_share<T>(adapters, start, end, low, high, [&](const Share<T>& share) {
    const float* h = share.h;
    float* target = total + (share.start - start) * stride + share.col - low;
    int64_t left = share.end - share.start;
    const auto rows = [&](auto num_tokens) {
      constexpr int N = decltype(num_tokens)::value;
      expand_rows<T, N>(share, h, adapters.stride, target, stride);
      h += N * adapters.stride;
      target += N * stride;
      left -= N;
    };
    while (left >= 8) rows(std::integral_constant<int, 8>{});
    while (left >= 4) rows(std::integral_constant<int, 4>{});
    while (left > 0) rows(std::integral_constant<int, 1>{});
  });
}

}  // namespace lorasrv
