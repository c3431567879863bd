// What the pairwise divergences keep of the softmax of every row, and what KL makes of it.
#pragma once

#include "cuda/rows.h"

namespace landscape_fast {

constexpr double LN_2 = 0.6931471805599453;
constexpr float TWICE_LOG2_E = 2.88539004f;

struct Stats {
  // [M, N]: largest logit; scale, 1 / sum; for KL ln sum and what its rounding left, for JS 2 - 2
  // log2 sum and nothing
  float4* rows;
  double2* about;  // [M, N], for JS alone: see JsOp
};

__device__ __forceinline__ float4 kl_stats(float top, double sum) {
  const double ln_sum = log(sum);
  const float rounded = float(ln_sum);
  return make_float4(top, float(1 / sum), rounded, float(ln_sum - double(rounded)));
}

// `mine`: whether the row of this group of lanes counts.
__device__ __forceinline__ void make_stats(const Rows& rows, int64_t m, int64_t n, const Stats& out,
                                           bool mine) {
  const Softmax s = softmax_of(Row(rows, m, n));
  if (!mine || int(threadIdx.x) % rows.lanes != 0) return;
  const int64_t row = m * rows.logits.N + n;
  if (!out.about) {
    out.rows[row] = kl_stats(s.top, s.sum);
    return;
  }
  const double ln_sum = log(s.sum);
  const float scale = float(1 / s.sum);
  const float shift = float(2 - 2 / LN_2 * ln_sum);
  const double g = double(scale) * (s.weighted - s.sum * (ln_sum - LN_2));
  const double rounded = double(TWICE_LOG2_E) * s.weighted + double(shift) * s.sum;
  const double twice_g = double(scale) * rounded;
  out.rows[row] = make_float4(s.top, scale, shift, 0.0f);
  out.about[row] = make_double2(g - LN_2 * twice_g, g);
}

// Of the rows of members i0 .. i0 + ni on the examples [first, last), by a block of THREADS.
template <int THREADS>
__device__ __forceinline__ void make_stats_of(const Rows& rows, int64_t i0, int64_t ni,
                                              int64_t first, int64_t last, const Stats& out) {
  const int groups = THREADS / rows.lanes, count = int((last - first) * ni);
  const int group = int(threadIdx.x) / rows.lanes;
  for (int begin = 0; begin < count; begin += groups) {
    const bool mine = begin + group < count;
    const int row = mine ? begin + group : count - 1;
    const int64_t m = i0 + row / int(last - first), n = first + row % int(last - first);
    make_stats(rows, m, n, out, mine);
  }
}

// A probability and its logarithm.
struct KlValue {
  float p, ln_p;
};

__device__ __forceinline__ KlValue kl_value(float x, const float4& row) {
  const float d = x - row.x;
  return {exp_of(d) * row.y, d - row.z};
}

// One class of KL(i || j), accurate and not negative; an infinite one is left out.
__device__ __forceinline__ float kl_accurate(KlValue i, KlValue j) {
  i.ln_p = i.ln_p == -INFINITY ? 0.0f : i.ln_p;
  j.ln_p = j.ln_p == -INFINITY ? 0.0f : j.ln_p;
  if (i.p == 0.0f) return j.p;
  return kl_term_log(i.p, j.p, j.ln_p - i.ln_p);
}

}  // namespace landscape_fast
