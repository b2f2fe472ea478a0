// Drawing tokens: Gumbel-max over the vocabulary, with exact noise for the few tokens that could win.
#include <cmath>
#include <limits>

#include "team.h"
#include "vectors.h"

using namespace lorasrv;

namespace {

constexpr int64_t QUADS = 64;  // counters of four words each, made at a time
constexpr float MARGIN = 1e-3f;  // far above what fp32 loses on the way to a bound

struct Row {
  const float* logits;
  int64_t vocab_size;
  double temperature, floor;
  uint64_t seed;
  uint32_t sample, position;
};

struct Best {
  double score;
  int64_t token;
};

struct Top {
  float value;
  int64_t token;
  bool any_nan;
};

// The largest logit and the lowest token that has it.
Top top_of(const float* logits, int64_t vocab_size) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  Vec best = fill(none);
  IntVec where{}, at = lane_numbers(), nan{};
  int64_t token = 0;
  for (; token + LANES <= vocab_size; token += LANES, at += LANES) {
    const Vec v = load(logits + token);
    const IntVec larger = v > best;
    best = larger ? v : best;
    where = larger ? at : where;
    nan |= v != v;
  }
  Top top{none, 0, false};
  for (int lane = 0; lane < LANES; ++lane) {
    top.any_nan |= nan[lane] != 0;
    if (best[lane] > top.value || (best[lane] == top.value && where[lane] < top.token))
      top = {best[lane], where[lane], top.any_nan};
  }
  for (; token < vocab_size; ++token) {
    top.any_nan |= logits[token] != logits[token];
    if (logits[token] > top.value) top = {logits[token], token, top.any_nan};
  }
  return top;
}

// Philox4x32-10 as in `reference.philox`, at the counters (first + i, position, sample, 0); a token's word at its place.
void random_words(const Row& row, int64_t first, uint32_t* words) {
  uint32_t c0[QUADS], c1[QUADS], c2[QUADS], c3[QUADS];
  for (int64_t i = 0; i < QUADS; ++i) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = row.position;
    c2[i] = row.sample;
    c3[i] = 0;
  }
  auto k0 = static_cast<uint32_t>(row.seed), k1 = static_cast<uint32_t>(row.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < QUADS; ++i) {
      const uint64_t p0 = uint64_t{c0[i]} * 0xD2511F53u, p1 = uint64_t{c2[i]} * 0xCD9E8D57u;
      const auto n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
      c0[i] = n0;
      c2[i] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int64_t i = 0; i < QUADS; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

void meet(const Row& row, float top, int64_t token, uint32_t bits, Best& best) {
  const double scaled = (double{row.logits[token]} - double{top}) / row.temperature;
  if (scaled < row.floor) return;
  const double score = scaled - std::log(-std::log((bits + 0.5) * 0x1p-32));
  if (score > best.score || (score == best.score && token < best.token)) best = {score, token};
}

// -log(-log(u)) <= -log(1 - u): a token loses where 1 - u exceeds e^(its scaled logit - the best score). So noise is
// computed for a handful of tokens, on average as often as a new best is met and a few times more.
int64_t draw(const Row& row, Top top) {
  uint32_t words[4 * QUADS + LANES];
  random_words(row, top.token / 4, words);
  Best best{-std::numeric_limits<double>::infinity(), top.token};
  meet(row, top.value, top.token, words[top.token % 4], best);
  // Halves, since a difference of logits can be beyond fp32. Less heat than there is makes a bound no lower.
  const auto heat = static_cast<float>(std::min<double>(2.0 / row.temperature, std::numeric_limits<float>::max()));
  const float half_top = 0.5f * top.value;
  for (int64_t first = 0; first < row.vocab_size; first += 4 * QUADS) {
    random_words(row, first / 4, words);
    const int64_t count = std::min(4 * QUADS, row.vocab_size - first);
    for (int64_t at = 0; at < count; at += LANES) {
      const Vec own = load_upto(row.logits + first + at, count - at);
      WordVec bits;
      std::memcpy(&bits, words + at, sizeof bits);
      const Vec left = __builtin_convertvector(~bits, Vec) * 0x1p-32f;
      const Vec most = lorasrv::exp((own * 0.5f - half_top) * heat + (MARGIN - static_cast<float>(best.score)));
      const IntVec open = left <= most;
      if (!any(open)) continue;
      for (int64_t lane = 0; lane < std::min<int64_t>(LANES, count - at); ++lane)
        if (open[lane]) meet(row, top.value, first + at + lane, bits[lane], best);
    }
  }
  return best.token;
}

}  // namespace

// As `reference.sample` for rows whose top_p and top_k keep all tokens.
LORASRV_EXPORT void lorasrv_sample(const float* logits, int64_t num_rows, int64_t vocab_size, const float* temperature,
                                   const float* min_p, const int64_t* seeds, const int64_t* samples,
                                   const int64_t* positions, int64_t* tokens, uint8_t* valid) {
  each_task(num_rows, [=](int64_t number) {
    const float* own = logits + number * vocab_size;
    const Top top = top_of(own, vocab_size);
    valid[number] = !top.any_nan && std::isfinite(top.value);
    tokens[number] = top.token;
    if (!valid[number] || temperature[number] == 0) return;
    const double floor = min_p ? std::log(double{min_p[number]}) : -std::numeric_limits<double>::infinity();
    tokens[number] = draw({own, vocab_size, temperature[number], floor, static_cast<uint64_t>(seeds[number]),
                           static_cast<uint32_t>(samples[number]), static_cast<uint32_t>(positions[number])},
                          top);
  });
}
