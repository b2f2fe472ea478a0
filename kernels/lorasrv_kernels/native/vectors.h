// Vectors of fp32 as wide as the machine that this is compiled for, and the numbers that are read into them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LORASRV_EXPORT extern "C" __attribute__((visibility("default")))

namespace lorasrv {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using Vec = float __attribute__((vector_size(LANES * 4)));
using IntVec = int32_t __attribute__((vector_size(LANES * 4)));
using WordVec = uint32_t __attribute__((vector_size(LANES * 4)));
using HalfVec = uint16_t __attribute__((vector_size(LANES * 2)));

struct bf16 {
  uint16_t bits;
};

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step; }

// Compilers take several instructions for what is one.
inline WordVec widen(HalfVec half) {
#if defined(__AVX512F__)
  return (WordVec)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(__AVX2__)
  return (WordVec)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, WordVec);
#endif
}

inline HalfVec narrow(WordVec words) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)words);
#else
  return __builtin_convertvector(words, HalfVec);
#endif
}

inline Vec fill(float value) { return Vec{} + value; }

inline IntVec lane_numbers() {
  IntVec lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
  return lanes;
}

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const bf16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  return reinterpret_cast<Vec>(widen(half) << 16);
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// To the nearest, even where two are as near; NaN stays NaN.
inline HalfVec round_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#endif
  const WordVec bits = reinterpret_cast<WordVec>(v);
  const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVec chosen = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  return narrow(chosen);
}

inline void store(bf16* to, Vec v) {
  const HalfVec half = round_bf16(v);
  std::memcpy(to, &half, sizeof half);
}

// The first `count` < LANES elements; zeros behind them. Nothing is called: a loop around would keep its vectors in memory.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }

inline Vec load_part(const float* from, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), from);
}

inline Vec load_part(const bf16* from, int64_t count) {
  return reinterpret_cast<Vec>(widen((HalfVec)_mm256_maskz_loadu_epi16(first_lanes(count), from)) << 16);
}

inline void store_part(float* to, Vec v, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)v); }

inline void store_part(bf16* to, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)round_bf16(v));
}
#else
template <typename T>
inline Vec load_part(const T* from, int64_t count) {
  T padded[LANES] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <typename T>
inline void store_part(T* to, Vec v, int64_t count) {
  T padded[LANES];
  store(padded, v);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}
#endif

template <typename T>
inline Vec load_upto(const T* from, int64_t count) {
  return count >= LANES ? load(from) : load_part(from, count);
}

template <typename T>
inline void store_upto(T* to, Vec v, int64_t count) {
  count >= LANES ? store(to, v) : store_part(to, v, count);
}

// What is left of a value when it has been stored as a T.
template <typename T>
inline Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, float>) return v;
  return reinterpret_cast<Vec>(widen(round_bf16(v)) << 16);
}

inline Vec at_least(Vec v, float low) { return v < low ? fill(low) : v; }
inline Vec at_most(Vec v, float high) { return v > high ? fill(high) : v; }

namespace detail {
template <int... lanes>
using Lanes = std::integer_sequence<int, lanes...>;
using EachLane = std::make_integer_sequence<int, LANES>;

// Lane i of the result is lane lanes[i] of both vectors side by side.
template <int... lanes>
inline Vec pick(Vec a, Vec b, Lanes<lanes...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lanes...);
#else
  return __builtin_shuffle(a, b, IntVec{lanes...});
#endif
}

template <int parity, int... lanes>
inline Vec every_other(Vec a, Vec b, Lanes<lanes...>) {
  return pick(a, b, Lanes<(2 * lanes + parity)...>{});
}

template <int width, int... lanes>
inline Vec rotate(Vec v, Lanes<lanes...>) {
  return pick(v, v, Lanes<((lanes + width) % LANES)...>{});
}

// All lanes of the result are f over all lanes.
template <int width = LANES / 2, typename F>
inline Vec fold(Vec v, F f) {
  v = f(v, rotate<width>(v, EachLane{}));
  if constexpr (width > 1) v = fold<width / 2>(v, f);
  return v;
}

template <int count>
inline Vec sum_lanes(const Vec* parts) {
  if constexpr (count == 1) {
    return parts[0];
  } else {
    Vec halves[count / 2];
    for (int i = 0; i < count / 2; ++i)
      halves[i] = every_other<0>(parts[2 * i], parts[2 * i + 1], EachLane{}) +
                  every_other<1>(parts[2 * i], parts[2 * i + 1], EachLane{});
    return sum_lanes<count / 2>(halves);
  }
}
}  // namespace detail

// Lane i of the result is the sum of the lanes of parts[i].
inline Vec sums(const Vec (&parts)[LANES]) { return detail::sum_lanes<LANES>(parts); }

inline float sum(Vec v) {
  return detail::fold(v, [](Vec a, Vec b) { return a + b; })[0];
}

inline float largest(Vec v) {
  return detail::fold(v, [](Vec a, Vec b) { return b > a ? b : a; })[0];
}

inline bool any(IntVec mask) {
  int32_t found = 0;
  for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
  return found != 0;
}

// e^x to 2 ulp; 0 is given for -inf, NaN for NaN.
inline Vec exp(Vec x) {
  const Vec kept = at_most(at_least(x, -87.0f), 88.0f);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec count = (kept * 1.44269504088896341f + shift) - shift;
  Vec r = kept - count * 0.693359375f;
  r = r - count * -2.12194440e-4f;
  Vec p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(count, IntVec) + 127) << 23;
  const Vec value = p * reinterpret_cast<Vec>(exponent);
  return x < -87.0f ? Vec{} : value;
}

// acc += a * b, element by element, in as many places as `Wide` holds.
template <typename T>
struct Wide {
  static constexpr int count = LANES;
  Vec value;
  static Wide read(const T* from, int64_t left) { return {load_upto(from, left)}; }
  static Vec add(Vec acc, Wide a, Wide b) { return acc + a.value * b.value; }
};

#if defined(__AVX512BF16__)
template <>
struct Wide<bf16> {
  static constexpr int count = 2 * LANES;
  __m512bh value;
  static Wide read(const bf16* from, int64_t left) {
    if (left >= count) return {(__m512bh)_mm512_loadu_si512(from)};
    const __mmask32 mask = left <= 0 ? 0 : (__mmask32)((1ull << left) - 1);
    return {(__m512bh)_mm512_maskz_loadu_epi16(mask, from)};
  }
  static Vec add(Vec acc, Wide a, Wide b) { return (Vec)_mm512_dpbf16_ps((__m512)acc, a.value, b.value); }
};
#endif

// Stretches of memory that are read soon.
inline void prefetch(const void* from, int64_t num_bytes) {
  // Without it GCC finds that this function has no effect, and leaves out calls of it.
  asm volatile("");
  for (int64_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

}  // namespace lorasrv
