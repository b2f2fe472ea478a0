// Attention that reads pages in place: prompts, chunks and decode rows of a step in one call.
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "team.h"
#include "vectors.h"

using namespace lorasrv;

namespace {

constexpr int64_t QUERY_ROWS = 16;
constexpr float NOWHERE = -std::numeric_limits<float>::infinity();

// Rows [first, first + num_rows) of a sequence, with the kv heads [head, last_head).
struct Task {
  int64_t sequence, first, num_rows, head, last_head;
};

// Keys from position `first` on that lie side by side, for the kv heads of a task; the values lie behind them.
template <typename T>
struct Rows {
  const T* keys = nullptr;
  int64_t first = 0, count = 0, elems = 0;
};

template <typename T>
struct Step {
  const T* query;  // [num_tokens, num_heads, head_dim]
  int64_t num_heads, kv_heads, head_dim;
  const T* keys;  // the layer's keys of the first page, [block_tokens, kv_heads, head_dim]; the values lie behind them
  int64_t page_stride, block_tokens;
  const int32_t* block_tables;  // [num_sequences, max_blocks]
  int64_t max_blocks;
  const int32_t* query_starts;     // [num_sequences + 1]
  const int32_t* context_lengths;  // [num_sequences]
  int64_t num_sequences;
  int64_t window;  // 0 for none
  T* out;          // [num_tokens, num_heads, head_dim]

  int64_t group() const { return num_heads / kv_heads; }
  int64_t stride() const { return kv_heads * head_dim; }

  // The position of a task's first row, and the first that it meets.
  int64_t place_of(const Task& task) const {
    const int64_t num_rows = query_starts[task.sequence + 1] - query_starts[task.sequence];
    return context_lengths[task.sequence] - num_rows + task.first;
  }
  int64_t seen_by(const Task& task) const {
    return window ? std::max<int64_t>(0, place_of(task) - window + 1) : 0;
  }

  // As far as they are in one block, and lanes hold them.
  Rows<T> rows_at(const Task& task, int64_t at) const {
    const int64_t block = block_tables[task.sequence * max_blocks + at / block_tokens], place = at % block_tokens;
    const int64_t left = place_of(task) + task.num_rows - at;
    return {keys + block * page_stride + place * stride() + task.head * head_dim, at,
            std::min({int64_t{LANES}, block_tokens - place, left}), (task.last_head - task.head) * head_dim};
  }
};

// What a query row with its head has met so far. Vectors are padded to whole lanes.
struct Running {
  int64_t position;  // of the row
  float top, total;
};

// A task's rows by kv head, and the block that they meet, widened. Each thread has its own and keeps it.
struct Scratch {
  std::vector<Running> rows;
  std::vector<float> query, acc, keys, values;
};

thread_local Scratch scratch;

template <typename T>
class Attention {
 public:
  Attention(const Step<T>& step, const Task& task, const Task* following, Scratch& scratch)
      : step_(step), task_(task), following_(following), own_(scratch), dim_(up(step.head_dim, LANES) * LANES) {
    per_head_ = task.num_rows * step.group();
    const int64_t num_heads = task.last_head - task.head;
    own_.rows.resize(num_heads * per_head_);
    own_.query.assign(num_heads * per_head_ * dim_, 0.0f);
    own_.acc.assign(num_heads * per_head_ * dim_, 0.0f);
    own_.keys.resize(dim_ * LANES);
    own_.values.resize(dim_ * LANES);
    start_ = step.query_starts[task.sequence] + task.first;
    place_ = step.place_of(task);
  }

  void run() {
    each_row([&](Running& row, const T* query, T*, float* own, float*, int64_t number) {
      row = {place_ + number, NOWHERE, 0.0f};
      for (int64_t at = 0; at < step_.head_dim; at += LANES)
        store(own + at, load_upto(query + at, step_.head_dim - at));
    });
    const int64_t end = place_ + task_.num_rows;
    for (int64_t at = step_.seen_by(task_); at < end;) {
      const Rows<T> rows = step_.rows_at(task_, at);
      at += rows.count;
      const Rows<T> ahead = at < end ? step_.rows_at(task_, at) : first_of_following();
      for (int64_t head = task_.head; head < task_.last_head; ++head) {
        const int64_t number = head - task_.head;
        const T* keys = rows.keys + number * step_.head_dim;
        fetch(ahead, number);
        meet(head, keys, keys + step_.block_tokens * step_.stride(), rows.first, rows.count);
      }
    }
    each_row([&](Running& row, const T*, T* out, float*, float* acc, int64_t) {
      const float factor = 1.0f / row.total;
      for (int64_t at = 0; at < step_.head_dim; at += LANES)
        store_upto(out + at, load(acc + at) * factor, step_.head_dim - at);
    });
  }

 private:
  const Step<T>& step_;
  const Task& task_;
  const Task* following_;
  Scratch& own_;
  int64_t dim_, per_head_, start_, place_;
  // Whether an instruction multiplies what is stored: then keys are best read where they lie.
  static constexpr bool MULTIPLIES = Wide<T>::count > LANES;

  template <typename F>
  void each_row(F f) {
    int64_t index = 0;
    for (int64_t head = task_.head; head < task_.last_head; ++head)
      for (int64_t number = 0; number < task_.num_rows; ++number)
        for (int64_t g = 0; g < step_.group(); ++g, ++index) {
          const int64_t at = ((start_ + number) * step_.num_heads + head * step_.group() + g) * step_.head_dim;
          f(own_.rows[index], step_.query + at, step_.out + at, &own_.query[index * dim_],
            &own_.acc[index * dim_], number);
        }
  }

  Rows<T> first_of_following() const {
    return following_ ? step_.rows_at(*following_, step_.seen_by(*following_)) : Rows<T>{};
  }

  // A head's share of what is met next, so that memory is busy while heads are computed.
  void fetch(const Rows<T>& ahead, int64_t number) const {
    const int64_t num_shares = task_.last_head - task_.head, num_bytes = ahead.elems * sizeof(T);
    const int64_t first = number * ahead.count / num_shares, last = (number + 1) * ahead.count / num_shares;
    for (int64_t token = first; token < last; ++token) {
      prefetch(ahead.keys + token * step_.stride(), num_bytes);
      prefetch(ahead.keys + (step_.block_tokens + token) * step_.stride(), num_bytes);
    }
  }

  // The rows of a kv head meet `count` keys and values, those from position `first` on.
  void meet(int64_t head, const T* keys, const T* values, int64_t first, int64_t count) {
    const int64_t base = (head - task_.head) * per_head_;
    const bool gathered = per_head_ >= 4;
    if (gathered) gather(keys, values, count);
    const T* query = step_.query + (start_ * step_.num_heads + head * step_.group()) * step_.head_dim;
    for (int64_t number = 0, row = base; number < task_.num_rows; ++number)
      for (int64_t g = 0; g < step_.group(); ++g, ++row) {
        if (own_.rows[row].position < first) continue;
        const T* own = query + (number * step_.num_heads + g) * step_.head_dim;
        const Vec scores = gathered && !MULTIPLIES ? score_gathered(&own_.query[row * dim_])
                                                   : score_in_place(own, keys, count);
        if (gathered)
          weigh(row, scores, own_.values.data(), dim_, first, count);
        else
          weigh(row, scores, values, step_.stride(), first, count);
      }
  }

  // Lane i is the product with key i.
  Vec score_in_place(const T* query, const T* keys, int64_t count) const {
    if (count == LANES && step_.head_dim == 2 * Wide<T>::count) return score_vectors<2>(query, keys);
    if (count == LANES && step_.head_dim == 4 * Wide<T>::count) return score_vectors<4>(query, keys);
    Vec parts[LANES] = {};
    for (int64_t token = 0; token < count; ++token, keys += step_.stride())
      for (int64_t at = 0; at < step_.head_dim; at += Wide<T>::count) {
        const int64_t left = step_.head_dim - at;
        parts[token] = Wide<T>::add(parts[token], Wide<T>::read(keys + at, left), Wide<T>::read(query + at, left));
      }
    return sums(parts);
  }

  template <int N>
  Vec score_vectors(const T* query, const T* keys) const {
    constexpr int width = Wide<T>::count;
    const int64_t stride = step_.stride();
    Wide<T> own[N];
    for (int i = 0; i < N; ++i) own[i] = Wide<T>::read(query + i * width, width);
    Vec parts[LANES];
#pragma GCC unroll 16
    for (int token = 0; token < LANES; ++token) {
      parts[token] = Vec{};
      for (int i = 0; i < N; ++i)
        parts[token] = Wide<T>::add(parts[token], Wide<T>::read(keys + token * stride + i * width, width), own[i]);
    }
    return sums(parts);
  }

  // Keys to [head_dim, LANES], where they are read so, and values to [LANES, dim], in fp32.
  void gather(const T* keys, const T* values, int64_t count) {
    for (int64_t token = 0; token < count; ++token, keys += step_.stride(), values += step_.stride())
      for (int64_t at = 0; at < step_.head_dim; at += LANES) {
        const int64_t left = step_.head_dim - at;
        store(&own_.values[token * dim_ + at], load_upto(values + at, left));
        if constexpr (MULTIPLIES) continue;
        const Vec key = load_upto(keys + at, left);
        for (int64_t lane = 0; lane < std::min<int64_t>(LANES, left); ++lane)
          own_.keys[(at + lane) * LANES + token] = key[lane];
      }
  }

  Vec score_gathered(const float* query) const {
    Vec parts[4] = {};
    int64_t at = 0;
    for (; at + 4 <= step_.head_dim; at += 4)
      for (int i = 0; i < 4; ++i) parts[i] += query[at + i] * load(&own_.keys[(at + i) * LANES]);
    for (; at < step_.head_dim; ++at) parts[0] += query[at] * load(&own_.keys[at * LANES]);
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }

  // Softmax as it goes: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
  template <typename V>
  void weigh(int64_t index, Vec scores, const V* values, int64_t stride, int64_t first, int64_t count) {
    Running& row = own_.rows[index];
    const IntVec positions = lane_numbers() + static_cast<int32_t>(first);
    const auto position = static_cast<int32_t>(row.position);
    IntVec hidden = (positions > position) | (lane_numbers() >= static_cast<int32_t>(count));
    if (step_.window) hidden |= positions <= position - static_cast<int32_t>(step_.window);
    scores = hidden ? fill(NOWHERE) : scores * (1.0f / std::sqrt(static_cast<float>(step_.head_dim)));
    const float found = largest(scores);
    // A number that is not one is passed on by the weights.
    if (found == NOWHERE && !any(scores != scores)) return;
    const float top = std::max(row.top, found);
    const Vec shares = hidden ? Vec{} : lorasrv::exp(scores - top);
    const float kept = row.top == top ? 1.0f : lorasrv::exp(fill(row.top - top))[0];
    row.total = row.total * kept + sum(shares);
    float weights[LANES];
    store(weights, shares);
    row.top = top;
    float* acc = &own_.acc[index * dim_];
    const int64_t seen = std::min<int64_t>(count, row.position - first + 1);
    const int64_t unseen = step_.window ? std::max<int64_t>(0, row.position - step_.window + 1 - first) : 0;
    for (int64_t at = 0; at < step_.head_dim; at += 4 * LANES)
      add_values(acc + at, kept, weights, values + at, stride, unseen, seen, step_.head_dim - at);
  }

  template <typename V>
  static void add_values(float* acc, float kept, const float* weights, const V* values, int64_t stride, int64_t unseen,
                         int64_t seen, int64_t left) {
    if (left >= 4 * LANES) {
      Vec own[4];
      for (int i = 0; i < 4; ++i) own[i] = load(acc + i * LANES) * kept;
      for (int64_t token = unseen; token < seen; ++token)
        for (int i = 0; i < 4; ++i) own[i] += weights[token] * load(values + token * stride + i * LANES);
      for (int i = 0; i < 4; ++i) store(acc + i * LANES, own[i]);
      return;
    }
    for (int64_t at = 0; at < left; at += LANES) {
      Vec own = load(acc + at) * kept;
      for (int64_t token = unseen; token < seen; ++token)
        own += weights[token] * load_upto(values + token * stride + at, left - at);
      store(acc + at, own);
    }
  }
};

thread_local std::vector<Task> tasks;

// Prompts by kv head and few rows; a decode row with all heads, whose keys lie side by side, as far as threads allow.
template <typename T>
void list_tasks(const Step<T>& step, int64_t num_threads) {
  tasks.clear();
  const int64_t shares = std::min(step.kv_heads, up(4 * num_threads, std::max<int64_t>(1, step.num_sequences)));
  for (int64_t sequence = 0; sequence < step.num_sequences; ++sequence) {
    const int64_t rows = step.query_starts[sequence + 1] - step.query_starts[sequence];
    const int64_t heads = rows == 1 ? up(step.kv_heads, shares) : 1;
    for (int64_t head = 0; head < step.kv_heads; head += heads)
      for (int64_t first = 0; first < rows; first += QUERY_ROWS)
        tasks.push_back({sequence, first, std::min(QUERY_ROWS, rows - first), head,
                         std::min(head + heads, step.kv_heads)});
  }
}

}  // namespace

LORASRV_EXPORT void lorasrv_paged_attention(int is_bf16, const void* query, int64_t num_heads, int64_t kv_heads,
                                            int64_t head_dim, const void* keys, int64_t page_stride,
                                            int64_t block_tokens, const int32_t* block_tables, int64_t max_blocks,
                                            const int32_t* query_starts, const int32_t* context_lengths,
                                            int64_t num_sequences, int64_t window, void* out) {
  const auto attend = [=](auto type) {
    using T = decltype(type);
    const Step<T> step{static_cast<const T*>(query), num_heads, kv_heads, head_dim, static_cast<const T*>(keys),
                       page_stride, block_tokens, block_tables, max_blocks, query_starts, context_lengths,
                       num_sequences, window, static_cast<T*>(out)};
    list_tasks(step, omp_get_max_threads());
    const std::vector<Task>& list = tasks;
    const int64_t count = list.size();
    // A thread takes a task before it begins the one that it has: while it ends this one it fetches for that.
    std::atomic<int64_t> taken{0};
    Team::shared().run(std::min<int64_t>(omp_get_max_threads(), count), [&](int) {
      for (int64_t i = taken++; i < count;) {
        const int64_t next = taken++;
        Attention<T>(step, list[i], next < count ? &list[next] : nullptr, scratch).run();
        i = next;
      }
    });
  };
  is_bf16 ? attend(bf16{}) : attend(float{});
}
