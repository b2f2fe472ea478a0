// What each token's row goes through on its own, behind what adapters add to it.
#include "lora.h"

using namespace lorasrv;

namespace {

// Rows of a task: few, so that threads share a decode step's, but as many as an expand reads weights for.
int64_t rows_per_task(int64_t num_tokens) { return num_tokens >= 2 * EXPAND_TOKENS ? EXPAND_TOKENS : up(num_tokens, 2); }

template <typename F>
void by_tokens(int64_t num_tokens, F f) {
  const int64_t step = std::max<int64_t>(1, rows_per_task(num_tokens));
#pragma omp parallel for schedule(dynamic) if (num_tokens > 1)
  for (int64_t start = 0; start < num_tokens; start += step) f(start, std::min(start + step, num_tokens));
}

// out = weight * (x / sqrt(mean(x^2) + eps)), both factors rounded.
template <typename T>
void norm_row(const T* x, const T* weight, int64_t width, float eps, T* out) {
  Vec squares{};
  for (int64_t at = 0; at < width; at += LANES) {
    const Vec v = load_upto(x + at, width - at);
    squares += v * v;
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
  for (int64_t at = 0; at < width; at += LANES) {
    const Vec v = rounded<T>(load_upto(x + at, width - at) * factor);
    store_upto(out + at, v * load_upto(weight + at, width - at), width - at);
  }
}

template <typename T>
void add_norm(const T* residual, T* out, const Adapters* adapters, const T* weight, float eps, int64_t num_tokens,
              int64_t hidden, T* total, T* normed) {
  by_tokens(num_tokens, [=](int64_t start, int64_t end) {
    if (adapters) expand<T>(*adapters, start, end, out, hidden);
    for (int64_t token = start; token < end; ++token) {
      const int64_t row = token * hidden;
      for (int64_t at = 0; at < hidden; at += LANES) {
        const int64_t left = hidden - at;
        store_upto(total + row + at, load_upto(residual + row + at, left) + load_upto(out + row + at, left), left);
      }
      if (normed) norm_row(total + row, weight, hidden, eps, normed + row);
    }
  });
}

template <typename T>
void silu_mul(T* gate_up, const Adapters* adapters, int64_t num_tokens, int64_t intermediate, T* out) {
  by_tokens(num_tokens, [=](int64_t start, int64_t end) {
    if (adapters) expand<T>(*adapters, start, end, gate_up, 2 * intermediate);
    for (int64_t token = start; token < end; ++token) {
      const T* gate = gate_up + 2 * token * intermediate;
      for (int64_t at = 0; at < intermediate; at += LANES) {
        const int64_t left = intermediate - at;
        const Vec g = load_upto(gate + at, left), u = load_upto(gate + intermediate + at, left);
        store_upto(out + token * intermediate + at, g / (1.0f + lorasrv::exp(-g)) * u, left);
      }
    }
  });
}

template <typename T>
void rope_head(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  for (int64_t at = 0; at < half; at += LANES) {
    const int64_t left = half - at;
    const Vec first = load_upto(x + at, left), second = load_upto(x + half + at, left);
    const Vec c = load_upto(cos + at, left), s = load_upto(sin + at, left);
    store_upto(out + at, first * c - second * s, left);
    store_upto(out + half + at, second * c + first * s, left);
  }
}

// A step's queries, keys and values, and where they go.
template <typename T>
struct Heads {
  T* qkv;  // [num_tokens, num_heads + 2 * kv_heads, head_dim]
  int64_t num_tokens, num_heads, kv_heads, head_dim;
  const T* query_norm;  // [head_dim]
  const T* key_norm;
  float eps;
  const T* cos;  // [num_tokens, head_dim / 2]
  const T* sin;
  T* keys;  // the layer's keys of the first page, [block_tokens, kv_heads, head_dim]; the values lie behind them
  int64_t page_stride, block_tokens;
  const int64_t* slots;  // [num_tokens]
  T* query;              // [num_tokens, num_heads, head_dim]
};

template <typename T>
void place_heads(const Heads<T>& heads, int64_t token) {
  const int64_t dim = heads.head_dim, slot = heads.slots[token], row = heads.kv_heads * dim;
  T* x = heads.qkv + token * (heads.num_heads + 2 * heads.kv_heads) * dim;
  T* key = heads.keys + slot / heads.block_tokens * heads.page_stride + slot % heads.block_tokens * row;
  const T* cos = heads.cos + token * dim / 2;
  const T* sin = heads.sin + token * dim / 2;
  for (int64_t head = 0; head < heads.num_heads + heads.kv_heads; ++head, x += dim) {
    const bool is_query = head < heads.num_heads;
    const T* norm = is_query ? heads.query_norm : heads.key_norm;
    if (norm) norm_row(x, norm, dim, heads.eps, x);
    T* out = is_query ? heads.query + (token * heads.num_heads + head) * dim : key + (head - heads.num_heads) * dim;
    rope_head(x, cos, sin, dim / 2, out);
  }
  std::memcpy(key + heads.block_tokens * row, x, row * sizeof(T));
}

template <typename T>
void place_all(const Heads<T>& heads, const Adapters* adapters) {
  by_tokens(heads.num_tokens, [&](int64_t start, int64_t end) {
    if (adapters)
      expand<T>(*adapters, start, end, heads.qkv, (heads.num_heads + 2 * heads.kv_heads) * heads.head_dim);
    for (int64_t token = start; token < end; ++token) place_heads(heads, token);
  });
}

template <typename F>
void by_type(int is_bf16, F f) {
  is_bf16 ? f(bf16{}) : f(float{});
}

}  // namespace

LORASRV_EXPORT void lorasrv_expand(int is_bf16, const Adapters* adapters, void* out, int64_t out_features) {
  by_type(is_bf16, [=](auto type) {
    using T = decltype(type);
    by_tokens(adapters->num_tokens, [=](int64_t start, int64_t end) {
      expand<T>(*adapters, start, end, static_cast<T*>(out), out_features);
    });
  });
}

LORASRV_EXPORT void lorasrv_rms_norm(int is_bf16, const void* x, const void* weight, float eps, int64_t num_rows,
                                     int64_t width, void* out) {
  by_type(is_bf16, [=](auto type) {
    using T = decltype(type);
    by_tokens(num_rows, [=](int64_t start, int64_t end) {
      for (int64_t row = start; row < end; ++row)
        norm_row(static_cast<const T*>(x) + row * width, static_cast<const T*>(weight), width, eps,
                 static_cast<T*>(out) + row * width);
    });
  });
}

// total = residual + out with what adapters add; normed, its norm, may be none.
LORASRV_EXPORT void lorasrv_add_rms_norm(int is_bf16, const void* residual, void* out, const Adapters* adapters,
                                         const void* weight, float eps, int64_t num_tokens, int64_t hidden,
                                         void* total, void* normed) {
  by_type(is_bf16, [=](auto type) {
    using T = decltype(type);
    add_norm(static_cast<const T*>(residual), static_cast<T*>(out), adapters, static_cast<const T*>(weight), eps,
             num_tokens, hidden, static_cast<T*>(total), static_cast<T*>(normed));
  });
}

LORASRV_EXPORT void lorasrv_silu_mul(int is_bf16, void* gate_up, const Adapters* adapters, int64_t num_tokens,
                                     int64_t intermediate, void* out) {
  by_type(is_bf16, [=](auto type) {
    using T = decltype(type);
    silu_mul(static_cast<T*>(gate_up), adapters, num_tokens, intermediate, static_cast<T*>(out));
  });
}

LORASRV_EXPORT void lorasrv_rope_write_kv(int is_bf16, void* qkv, const Adapters* adapters, int64_t num_tokens,
                                          int64_t num_heads, int64_t kv_heads, int64_t head_dim,
                                          const void* query_norm, const void* key_norm, float eps, const void* cos,
                                          const void* sin, void* keys, int64_t page_stride, int64_t block_tokens,
                                          const int64_t* slots, void* query) {
  by_type(is_bf16, [=](auto type) {
    using T = decltype(type);
    const Heads<T> heads{static_cast<T*>(qkv), num_tokens, num_heads, kv_heads, head_dim,
                         static_cast<const T*>(query_norm), static_cast<const T*>(key_norm), eps,
                         static_cast<const T*>(cos), static_cast<const T*>(sin), static_cast<T*>(keys), page_stride,
                         block_tokens, slots, static_cast<T*>(query)};
    place_all(heads, adapters);
  });
}
