// Reading a block of logits and its softmax, for the *_simd.cpp files: everything here has internal
// linkage and is compiled once per instruction set.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../math.h"
#include "variants.h"
#include "wide.h"

namespace landscape_fast {
namespace {

constexpr int64_t SEGMENT = 1024;  // elements added in float32 before float64 takes over
constexpr int MOST_EXAMPLES = 32;  // of a block

// Sum of term(k) for k < length, a multiple of 16. The 16 lanes are added pairwise: in order, as a
// compiler must without leave to reassociate, they would cost a fifth of a short block's time.
template <class Term>
inline __attribute__((always_inline)) double sum_of(int64_t length, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < length; begin += SEGMENT) {
    const int64_t end = begin + SEGMENT < length ? begin + SEGMENT : length;
    float lanes[16] = {};
    for (int64_t at = begin; at < end; at += 16) {
#pragma omp simd
      for (int k = 0; k < 16; ++k) lanes[k] += term(at + k);
    }
    for (int k = 0; k < 8; ++k) lanes[k] += lanes[k + 8];
    for (int k = 0; k < 4; ++k) lanes[k] += lanes[k + 4];
    total += double(lanes[0] + lanes[2]) + double(lanes[1] + lanes[3]);
  }
  return total;
}

inline float widen(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};
inline float widen(BFloat16 x) { return float_of(int32_t(uint32_t(x.bits) << 16)); }

struct Float16 {
  uint16_t bits;
};
inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(x.bits & 0x7fff) << 13;
  const float finite = float_of(int32_t(rest)) * 5.192296858534828e33f;  // 2^112, the other bias
  const uint32_t special = rest | 0x7f800000;                            // infinity or NaN
  const uint32_t value = rest >= 0x0f800000 ? special : uint32_t(bits_of(finite));
  return float_of(int32_t(sign | value));
}

// One member's logits of examples [n, n + valid) into x; the others, and those with use[e] = 0, are
// 0. Padding is -inf, which has probability 0.
template <class T>
inline void load_as(const Logits& L, int64_t m, int64_t n, int64_t valid, const bool* use,
                    const Blocks& blocks, float* x) {
  const T* from = static_cast<const T*>(L.data) + m * L.stride_m + n * L.stride_n;
  const int64_t E = blocks.examples, C = L.C;
  for (int64_t e = 0; e < E; ++e) {
    if (e >= valid || !use[e]) {
      for (int64_t c = 0; c < C; ++c) x[c * E + e] = 0;
      continue;
    }
    const T* row = from + e * L.stride_n;
    if (E == 1 && L.stride_c == 1) {
      for (int64_t c = 0; c < C; ++c) x[c] = widen(row[c]);
    } else if (L.stride_c == 1) {
      for (int64_t c = 0; c < C; ++c) x[c * E + e] = widen(row[c]);
    } else {
      for (int64_t c = 0; c < C; ++c) x[c * E + e] = widen(row[c * L.stride_c]);
    }
  }
  for (int64_t k = C * E; k < blocks.length; ++k) x[k] = -INFINITY;
}

inline void load(const Logits& L, int64_t m, int64_t n, int64_t valid, const bool* use,
                 const Blocks& blocks, float* x) {
  if (L.dtype == Dtype::float32) {
    load_as<float>(L, m, n, valid, use, blocks, x);
  } else if (L.dtype == Dtype::bfloat16) {
    load_as<BFloat16>(L, m, n, valid, use, blocks, x);
  } else {
    load_as<Float16>(L, m, n, valid, use, blocks, x);
  }
}

// Per example of a block.
struct Rows {
  double log_sum[MOST_EXAMPLES];  // ln of the sum of exp(x - largest x)
  float scale[MOST_EXAMPLES];     // 1 / that sum: the largest probability
};

#if defined(__AVX512F__)

// Of one class: x becomes x - top, p its exponential, which is added to `sums`.
inline void exps_of(float* x, const float* top, float* p, float* sums) {
  __m512 d[2], y[2];
  for (int k = 0; k < 2; ++k) {
    d[k] = _mm512_sub_ps(_mm512_loadu_ps(x + 16 * k), _mm512_loadu_ps(top + 16 * k));
    _mm512_storeu_ps(x + 16 * k, d[k]);
  }
  exp_of_each(d, y);
  for (int k = 0; k < 2; ++k) {
    _mm512_storeu_ps(p + 16 * k, y[k]);
    _mm512_storeu_ps(sums + 16 * k, _mm512_add_ps(_mm512_loadu_ps(sums + 16 * k), y[k]));
  }
}

// Of one example: likewise; returns the sum.
inline double sum_of_exps(int64_t length, float top, float* x, float* p) {
  const __m512 largest = _mm512_set1_ps(top);
  double total = 0;
  for (int64_t begin = 0; begin < length; begin += SEGMENT) {
    const int64_t end = begin + SEGMENT < length ? begin + SEGMENT : length;
    __m512 sum = _mm512_setzero_ps();
    int64_t at = begin;
    const auto step = [&](auto& d) {
      constexpr int K = sizeof(d) / sizeof(d[0]);
      __m512 y[K];
      for (int k = 0; k < K; ++k) {
        d[k] = _mm512_sub_ps(_mm512_loadu_ps(x + at + 16 * k), largest);
        _mm512_storeu_ps(x + at + 16 * k, d[k]);
      }
      exp_of_each(d, y);
      for (int k = 0; k < K; ++k) {
        _mm512_storeu_ps(p + at + 16 * k, y[k]);
        sum = _mm512_add_ps(sum, y[k]);
      }
      at += 16 * K;
    };
    __m512 four[4], one[1];
    while (at + 64 <= end) step(four);
    while (at < end) step(one);
    total += double(_mm512_reduce_add_ps(sum));
  }
  return total;
}

#else

inline void exps_of(float* x, const float* top, float* p, float* sums) {
#pragma omp simd
  for (int e = 0; e < MOST_EXAMPLES; ++e) {
    const float d = x[e] - top[e];
    const float y = exp_of(d);
    x[e] = d;
    p[e] = y;
    sums[e] += y;
  }
}

inline double sum_of_exps(int64_t length, float top, float* x, float* p) {
  return sum_of(length, [=](int64_t k) {
    const float d = x[k] - top;
    const float y = exp_of(d);
    x[k] = d;
    p[k] = y;
    return y;
  });
}

#endif

// x [length] becomes x - (largest x of its example), p the probabilities. A NaN, a +inf or a row of
// -inf makes its whole example NaN, as torch.softmax does. `use` as for load: p is 0 where an
// example is not to be used.
inline void softmax_interleaved(int64_t C, const bool* use, float* x, float* p, Rows& rows) {
  constexpr int E = MOST_EXAMPLES;
  float top[E], sum[E];
  for (int e = 0; e < E; ++e) top[e] = -INFINITY, sum[e] = 0;
  for (int64_t c = 0; c < C; ++c) {
#pragma omp simd
    for (int e = 0; e < E; ++e) top[e] = x[c * E + e] > top[e] ? x[c * E + e] : top[e];
  }
  for (int64_t first = 0; first < C; first += 8) {  // sums of 8, then of those: less rounding
    const int64_t last = first + 8 < C ? first + 8 : C;
    float part[E] = {};
    for (int64_t c = first; c < last; ++c) exps_of(x + c * E, top, p + c * E, part);
#pragma omp simd
    for (int e = 0; e < E; ++e) sum[e] += part[e];
  }
#pragma omp simd
  for (int e = 0; e < E; ++e) {
    rows.log_sum[e] = ln_of(sum[e]);
    rows.scale[e] = use[e] ? 1.0f / sum[e] : 0.0f;
  }
  for (int64_t c = 0; c < C; ++c) {
#pragma omp simd
    for (int e = 0; e < E; ++e) p[c * E + e] *= rows.scale[e];
  }
}

inline void softmax_row(int64_t length, float* x, float* p, Rows& rows) {
  float tops[16];  // a maximum that lets NaN pass is no reduction to the compiler: 16 of them are
  for (int k = 0; k < 16; ++k) tops[k] = -INFINITY;
  for (int64_t begin = 0; begin < length; begin += 16) {
#pragma omp simd
    for (int k = 0; k < 16; ++k) tops[k] = x[begin + k] > tops[k] ? x[begin + k] : tops[k];
  }
  float top = -INFINITY;
  for (int k = 0; k < 16; ++k) top = tops[k] > top ? tops[k] : top;
  const double sum = sum_of_exps(length, top, x, p);
  const float scale = float(1 / sum);
#pragma omp simd
  for (int64_t k = 0; k < length; ++k) p[k] *= scale;
  rows.log_sum[0] = ::log(sum);
  rows.scale[0] = scale;
}

inline void softmax(const Logits& L, const Blocks& blocks, const bool* use, float* x, float* p,
                    Rows& rows) {
  if (blocks.examples == 1) {
    softmax_row(blocks.length, x, p, rows);
  } else {
    softmax_interleaved(L.C, use, x, p, rows);
  }
}

// First largest class of each example of a block of logits or probabilities; NaN is the largest.
inline void first_largest(const Blocks& blocks, const float* x, int64_t C, int32_t* label) {
  const int lanes = blocks.examples == 1 ? 16 : MOST_EXAMPLES;
  float best[MOST_EXAMPLES];
  int32_t at[MOST_EXAMPLES];
  const int64_t rows = blocks.examples == 1 ? blocks.length / 16 : C;
  for (int k = 0; k < lanes; ++k) best[k] = x[k], at[k] = 0;
  for (int64_t row = 1; row < rows; ++row) {
#pragma omp simd
    for (int k = 0; k < lanes; ++k) {
      const float value = x[row * lanes + k];
      const bool more = displaces(value, best[k]);
      best[k] = more ? value : best[k];
      at[k] = more ? int32_t(row) : at[k];
    }
  }
  if (blocks.examples > 1) {
    for (int k = 0; k < lanes; ++k) label[k] = at[k];
    return;
  }
  float top = best[0];
  label[0] = at[0] * 16;
  for (int k = 1; k < 16; ++k) {  // of equals, the first in the row
    const int32_t index = at[k] * 16 + k;
    const bool equal = best[k] == top || (best[k] != best[k] && top != top);
    if (displaces(best[k], top) || (equal && index < label[0])) top = best[k], label[0] = index;
  }
}

}  // namespace
}  // namespace landscape_fast
