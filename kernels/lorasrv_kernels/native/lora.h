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

// Rows [row, row + num_rows) of one module's A, met by a segment's tokens [start, end).
struct ShrinkItem {
  int64_t segment, module, row, num_rows, start, end;
  Header header;
};

constexpr int64_t SHRINK_TOKENS = 32;

inline void list_shrinks(const Adapters& adapters, std::vector<ShrinkItem>& items) {
  items.clear();
  for (int64_t segment = 0; segment < adapters.num_segments; ++segment)
    for (int64_t module = 0; module < adapters.group; ++module) {
      const Header header = header_of(adapters, segment, module);
      for (int64_t row = 0; row < header.rank; row += TILE_ROWS)
        for (int64_t start = adapters.starts[segment]; start < adapters.ends[segment]; start += SHRINK_TOKENS)
          items.push_back({segment, module, row, std::min<int64_t>(TILE_ROWS, header.rank - row), start,
                           std::min<int64_t>(start + SHRINK_TOKENS, adapters.ends[segment]), header});
    }
}

// sums[r][t] += tile[r] . x[t] for R rows of a tile and N tokens.
template <typename T, int R, int N>
inline void dots(const T* tile, int64_t tile_stride, const T* x, int64_t x_stride, int64_t cols, Vec (&acc)[R][N]) {
  for (int64_t col = 0; col < cols; col += Wide<T>::count) {
    Wide<T> tokens[N];
    for (int n = 0; n < N; ++n) tokens[n] = Wide<T>::read(x + n * x_stride + col, cols - col);
    for (int r = 0; r < R; ++r) {
      const Wide<T> weights = Wide<T>::read(tile + r * tile_stride + col, cols - col);
      __builtin_prefetch(tile + (r + R) * tile_stride + col);
      for (int n = 0; n < N; ++n) acc[r][n] = Wide<T>::add(acc[r][n], weights, tokens[n]);
    }
  }
}

template <typename T, int R, int N>
inline void shrink_block(const Adapters& adapters, const ShrinkItem& item, int64_t row, int64_t token, const T* x,
                         int64_t in_features) {
  Vec acc[R][N] = {};
  const Matrix& matrix = adapters.modules[item.module].a;
  each_tile<T>(adapters, item.segment, item.header.first_a, matrix, item.row, item.num_rows, 0, in_features,
               [&](const T* tile, int64_t col, int64_t cols) {
                 dots<T, R, N>(tile + (row - item.row) * cols, cols, x + token * in_features + col, in_features, cols,
                               acc);
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

constexpr int64_t EXPAND_TOKENS = 8;
constexpr int64_t EXPAND_COLS = 256;

// total[n][c] += h[n] . tile[:, c] for N tokens and C vectors of columns; h is [num_rows, N].
template <typename T, int N, int C>
inline void expand_cols(const T* tile, int64_t num_rows, int64_t stride, int64_t left, const float* h, float* total) {
  Vec acc[N][C];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) acc[n][c] = load(total + n * EXPAND_COLS + c * LANES);
  for (int64_t row = 0; row < num_rows; ++row, tile += stride) {
    Vec weights[C];
    for (int c = 0; c < C; ++c) weights[c] = load_upto(tile + c * LANES, left - c * LANES);
    __builtin_prefetch(tile + EXPAND_COLS);
    for (int n = 0; n < N; ++n)
      for (int c = 0; c < C; ++c) acc[n][c] += h[row * N + n] * weights[c];
  }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) store(total + n * EXPAND_COLS + c * LANES, acc[n][c]);
}

template <typename T, int N>
inline void expand_tile(const T* tile, int64_t num_rows, int64_t stride, int64_t cols, const float* h, float* total) {
  int64_t col = 0;
  for (; col + 2 * LANES <= cols; col += 2 * LANES)
    expand_cols<T, N, 2>(tile + col, num_rows, stride, cols - col, h, total + col);
  for (; col < cols; col += LANES)
    expand_cols<T, N, 1>(tile + col, num_rows, stride, cols - col, h, total + col);
}

template <typename T, int N>
inline void expand_rows(const Adapters& adapters, int64_t segment, int64_t token, T* out, int64_t out_stride) {
  int64_t first_col = 0;
  for (int64_t module = 0; module < adapters.group; ++module) {
    const Header header = header_of(adapters, segment, module);
    const Matrix& matrix = adapters.modules[module].b;
    for (int64_t low = 0; header.rank && low < matrix.cols; low += EXPAND_COLS) {
      // A row's tail is read and written as a whole vector.
      float total[N * EXPAND_COLS + LANES];
      const int64_t high = std::min(low + EXPAND_COLS, matrix.cols);
      T* target = out + first_col + low;
      for (int n = 0; n < N; ++n)
        for (int64_t col = 0; col < high - low; col += LANES)
          store(total + n * EXPAND_COLS + col, load_upto(target + n * out_stride + col, high - low - col));
      for (int64_t row = 0; row < header.rank; row += TILE_ROWS) {
        const int64_t num_rows = std::min<int64_t>(TILE_ROWS, header.rank - row);
        float h[TILE_ROWS * N];
        for (int n = 0; n < N; ++n)
          for (int64_t r = 0; r < num_rows; ++r) h[r * N + n] = adapters.row(module, token + n)[row + r];
        each_tile<T>(adapters, segment, header.first_b, matrix, row, num_rows, low, high,
                     [&](const T* tile, int64_t col, int64_t cols) {
                       const int64_t from = std::max(low, col), to = std::min(high, col + cols);
                       expand_tile<T, N>(tile + from - col, num_rows, cols, to - from, h, total + from - low);
                     });
      }
      for (int n = 0; n < N; ++n)
        for (int64_t col = 0; col < high - low; col += LANES)
          store_upto(target + n * out_stride + col, load(total + n * EXPAND_COLS + col), high - low - col);
    }
    first_col += matrix.cols;
  }
}

// As `reference.sgmv_expand`, for the tokens [start, end) of a step; `out` is of the step's first token.
template <typename T>
inline void expand(const Adapters& adapters, int64_t start, int64_t end, T* out, int64_t out_stride) {
  for (int64_t segment = 0; segment < adapters.num_segments; ++segment) {
    int64_t token = std::max<int64_t>(start, adapters.starts[segment]);
    const int64_t last = std::min<int64_t>(end, adapters.ends[segment]);
    const auto rows = [&](auto num_tokens) {
      expand_rows<T, decltype(num_tokens)::value>(adapters, segment, token, out + token * out_stride, out_stride);
      token += decltype(num_tokens)::value;
    };
    while (token + 8 <= last) rows(std::integral_constant<int, 8>{});
    while (token + 4 <= last) rows(std::integral_constant<int, 4>{});
    while (token < last) rows(std::integral_constant<int, 1>{});
  }
}

}  // namespace lorasrv
