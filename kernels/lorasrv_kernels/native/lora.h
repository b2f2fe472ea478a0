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

// Up to 16 rows of a matrix in the pool, as tiles one behind the other.
template <typename T>
struct RowBlock {
  const uint8_t* pool;
  const int32_t* addresses;
  int64_t num_rows, cols, chunk;

  struct Stretch {
    const T* from;  // of the first row
    int64_t stride, count;  // elements from row to row, and in each
  };

  // The columns from `col` on, as many as one tile has of them, and no more than `most`.
  Stretch at(int64_t col, int64_t most) const {
    const int64_t number = uint32_t(col) / uint32_t(chunk), first = number * chunk;
    const int64_t width = std::min(chunk, cols - first);
    const auto* tile = reinterpret_cast<const T*>(pool + int64_t{addresses[number]} * ADDRESS_BYTES);
    return {tile + col - first, width, std::min(width - (col - first), most)};
  }
};

template <typename T>
inline RowBlock<T> row_block(const Adapters& adapters, int64_t segment, int32_t first, const Matrix& matrix,
                             int64_t row, int64_t rank) {
  const int64_t num_rows = std::min<int64_t>(TILE_ROWS, rank - row);
  // Full row blocks come first, and are cut alike.
  const int64_t before = row / TILE_ROWS * up(matrix.cols, matrix.chunk_for(TILE_ROWS));
  return {adapters.pool, directory_of(adapters, segment) + first + before, num_rows, matrix.cols,
          matrix.chunk_for(num_rows)};
}

// Rows of one module's A, met by a segment's tokens [start, end).
struct ShrinkItem {
  int64_t segment, module, row, start, end;
  Header header;
};

constexpr int64_t SHRINK_TOKENS = 32;
// How many columns of R rows are read ahead of those that are multiplied, be they in another tile: some 100 lines.
constexpr int64_t shrink_ahead(int R) { return R < 8 ? 512 : 256; }

inline void list_shrinks(const Adapters& adapters, std::vector<ShrinkItem>& items) {
  items.clear();
  for (int64_t segment = 0; segment < adapters.num_segments; ++segment)
    for (int64_t module = 0; module < adapters.group; ++module) {
      const Header header = header_of(adapters, segment, module);
      for (int64_t row = 0; row < header.rank; row += TILE_ROWS)
        for (int64_t start = adapters.starts[segment]; start < adapters.ends[segment]; start += SHRINK_TOKENS)
          items.push_back({segment, module, row, start,
                           std::min<int64_t>(start + SHRINK_TOKENS, adapters.ends[segment]), header});
    }
}

template <typename T>
inline RowBlock<T> row_block(const Adapters& adapters, const ShrinkItem& item) {
  return row_block<T>(adapters, item.segment, item.header.first_a, adapters.modules[item.module].a, item.row,
                      item.header.rank);
}

// acc[r][n] += row r . x[n] for R rows of a stretch and N tokens; `ahead` is read ahead.
template <typename T, int R, int N>
inline void dots(const typename RowBlock<T>::Stretch& rows, const typename RowBlock<T>::Stretch& ahead, const T* x,
                 int64_t x_stride, Vec (&acc)[R][N]) {
  for (int64_t col = 0; col < rows.count; col += Wide<T>::count) {
    Wide<T> tokens[N];
    for (int n = 0; n < N; ++n) tokens[n] = Wide<T>::read(x + n * x_stride + col, rows.count - col);
    for (int r = 0; r < R; ++r) {
      const Wide<T> weights = Wide<T>::read(rows.from + r * rows.stride + col, rows.count - col);
      __builtin_prefetch(ahead.from + r * ahead.stride + col);
      for (int n = 0; n < N; ++n) acc[r][n] = Wide<T>::add(acc[r][n], weights, tokens[n]);
    }
  }
}

// Rows [row, row + R) of an item's block. Behind its last ones come the first ones of `next`.
template <typename T, int R, int N>
inline void shrink_rows(const Adapters& adapters, const ShrinkItem& item, const RowBlock<T>& block,
                        const RowBlock<T>& next, int64_t row, int64_t token, const T* x, int64_t in_features) {
  Vec acc[R][N] = {};
  const bool more = row + R < block.num_rows;
  const RowBlock<T>& behind = more ? block : next;
  const int64_t row_behind = more ? row + R : 0;
  for (int64_t col = 0; col < in_features;) {
    auto rows = block.at(col, in_features);
    rows.from += row * rows.stride;
    int64_t far = col + shrink_ahead(R);
    const bool here = far < in_features;
    if (!here) far = far - in_features < behind.cols ? far - in_features : 0;
    auto ahead = (here ? block : behind).at(far, rows.count);
    ahead.from += (here ? row : row_behind) * ahead.stride;
    rows.count = ahead.count;
    dots<T, R, N>(rows, ahead, x + token * in_features + col, in_features, acc);
    col += rows.count;
  }
  const float scale = adapters.scales[item.segment] * item.header.scale;
  if constexpr (R * N == LANES) {
    Vec flat[LANES];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) flat[n * R + r] = acc[r][n];
    const Vec total = sums(flat) * scale;
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) adapters.row(item.module, token + n)[item.row + row + r] = total[n * R + r];
  } else {
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) adapters.row(item.module, token + n)[item.row + row + r] = sum(acc[r][n]) * scale;
  }
}

// As `reference.sgmv_shrink`, for one item; its thread takes `then` next.
template <typename T>
inline void shrink(const Adapters& adapters, const ShrinkItem& item, const ShrinkItem& then, const T* x,
                   int64_t in_features) {
  const RowBlock<T> block = row_block<T>(adapters, item), next = row_block<T>(adapters, then);
  int64_t token = item.start;
  const auto rows = [&](auto num_tokens) {
    constexpr int N = decltype(num_tokens)::value;
    int64_t row = 0;
    const auto as_many = [&](auto num_rows) {
      constexpr int R = decltype(num_rows)::value;
      for (; row + R <= block.num_rows; row += R)
        shrink_rows<T, R, N>(adapters, item, block, next, row, token, x, in_features);
    };
    if constexpr (N == 1 && LANES == 16) as_many(std::integral_constant<int, 16>{});
    if constexpr (N == 1) as_many(std::integral_constant<int, 8>{});
    if constexpr (N > 1) as_many(std::integral_constant<int, 4>{});
    as_many(std::integral_constant<int, 1>{});
    token += N;
  };
  while (token + 4 <= item.end) rows(std::integral_constant<int, 4>{});
  while (token < item.end) rows(std::integral_constant<int, 1>{});
}

constexpr int64_t EXPAND_TOKENS = 8;
constexpr int64_t EXPAND_COLS = 256;

// Their sum stays in registers; with more of them the output is rounded in between.
constexpr int64_t EXPAND_ROWS = 256;

// Rows [row, row + num_rows) and columns [low, high) of one module's B, for a segment's tokens.
struct ExpandItem {
  int64_t segment, module, row, num_rows, low, high;
  int64_t out_col;  // of the output, where `low` is
  Header header;
};

inline void list_expands(const Adapters& adapters, int64_t segment, std::vector<ExpandItem>& items) {
  int64_t out_col = 0;
  for (int64_t module = 0; module < adapters.group; ++module) {
    const Header header = header_of(adapters, segment, module);
    const int64_t cols = adapters.modules[module].b.cols;
    for (int64_t row = 0; row < header.rank; row += EXPAND_ROWS)
      for (int64_t low = 0; low < cols; low += EXPAND_COLS)
        items.push_back({segment, module, row, std::min(EXPAND_ROWS, header.rank - row), low,
                         std::min(low + EXPAND_COLS, cols), out_col + low, header});
    out_col += cols;
  }
}

// Some columns of all rows of an item, as many as its tiles have side by side.
template <typename T>
struct Columns {
  typename RowBlock<T>::Stretch blocks[EXPAND_ROWS / TILE_ROWS];
  int64_t count;

  // Of as many blocks as `num_rows` has; those that the item lacks are its last one's.
  Columns(const Adapters& adapters, const ExpandItem& item, int64_t col, int64_t most, int64_t num_rows) : count(most) {
    const Matrix& matrix = adapters.modules[item.module].b;
    for (int64_t row = 0; row < num_rows; row += TILE_ROWS) {
      const int64_t there = item.row + std::min(row, (item.num_rows - 1) / TILE_ROWS * TILE_ROWS);
      auto& block = blocks[row / TILE_ROWS];
      block = row_block<T>(adapters, item.segment, item.header.first_b, matrix, there, item.header.rank).at(col, count);
      count = block.count;
    }
  }
};

// out[n] += h[n] . columns for N tokens and C vectors of columns from `col` on; h is [num_rows, N].
template <typename T, int N, int C>
inline void expand_cols(const Columns<T>& columns, const Columns<T>& ahead, int64_t num_rows, int64_t col,
                        const float* h, T* out, int64_t out_stride) {
  const int64_t left = columns.count - col;
  Vec acc[N][C];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) acc[n][c] = load_upto(out + n * out_stride + c * LANES, left - c * LANES);
  for (int64_t first = 0; first < num_rows; first += TILE_ROWS) {
    const auto &rows = columns.blocks[first / TILE_ROWS], &next = ahead.blocks[first / TILE_ROWS];
    const int64_t count = std::min<int64_t>(TILE_ROWS, num_rows - first);
    for (int64_t row = 0; row < count; ++row, h += N) {
      const T* from = rows.from + row * rows.stride + col;
      Vec weights[C];
      for (int c = 0; c < C; ++c) weights[c] = load_upto(from + c * LANES, left - c * LANES);
      for (int c = 0; c < C; c += 64 / (LANES * sizeof(T)))
        __builtin_prefetch(next.from + row * next.stride + col + c * LANES);
      for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) acc[n][c] += h[n] * weights[c];
    }
  }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) store_upto(out + n * out_stride + c * LANES, acc[n][c], left - c * LANES);
}

// What an item adds to N tokens; its thread takes `then` next.
template <typename T, int N>
inline void expand_item(const Adapters& adapters, const ExpandItem& item, const ExpandItem& then, const float* h,
                        T* out, int64_t out_stride) {
  const int64_t last = adapters.modules[then.module].b.cols - 1;
  for (int64_t at = item.low; at < item.high;) {
    const Columns<T> columns(adapters, item, at, item.high - at, item.num_rows);
    const Columns<T> ahead(adapters, then, std::min(then.low + at - item.low, last), columns.count, item.num_rows);
    T* target = out + item.out_col + at - item.low;
    constexpr int C = N == 1 ? 4 : 2;
    int64_t col = 0;
    for (; col + C * LANES <= columns.count; col += C * LANES)
      expand_cols<T, N, C>(columns, ahead, item.num_rows, col, h, target + col, out_stride);
    for (; col < columns.count; col += LANES)
      expand_cols<T, N, 1>(columns, ahead, item.num_rows, col, h, target + col, out_stride);
    at += columns.count;
  }
}

// As `reference.sgmv_expand`, for the tokens [start, end) of a step; `out` is of the step's first token.
template <typename T>
inline void expand(const Adapters& adapters, int64_t start, int64_t end, T* out, int64_t out_stride) {
  static thread_local std::vector<ExpandItem> items;
  items.clear();
  for (int64_t segment = 0; segment < adapters.num_segments; ++segment)
    if (adapters.starts[segment] < end && start < adapters.ends[segment]) list_expands(adapters, segment, items);
  for (auto first = items.begin(); first != items.end();) {
    const int64_t segment = first->segment;
    const auto last = std::find_if(first, items.end(), [=](const ExpandItem& item) { return item.segment != segment; });
    int64_t token = std::max<int64_t>(start, adapters.starts[segment]);
    const int64_t stop = std::min<int64_t>(end, adapters.ends[segment]);
    const auto rows = [&](auto num_tokens) {
      constexpr int N = decltype(num_tokens)::value;
      float h[EXPAND_ROWS * N];
      for (auto item = first; item != last; ++item) {
        for (int n = 0; item->low == 0 && n < N; ++n)
          for (int64_t r = 0; r < item->num_rows; ++r)
            h[r * N + n] = adapters.row(item->module, token + n)[item->row + r];
        const ExpandItem& then = item + 1 == items.end() ? *item : item[1];
        expand_item<T, N>(adapters, *item, then, h, out + token * out_stride, out_stride);
      }
      token += N;
    };
    while (token + 8 <= stop) rows(std::integral_constant<int, 8>{});
    while (token + 4 <= stop) rows(std::integral_constant<int, 4>{});
    while (token < stop) rows(std::integral_constant<int, 1>{});
    first = last;
  }
}

}  // namespace lorasrv
