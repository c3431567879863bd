// Rows of logits, read by groups of neighbouring lanes: their softmax, their first largest class.
#pragma once

#include <climits>
#include <cmath>

#include "cuda/access.h"
#include "cuda/reduce.h"
#include "math.h"

namespace landscape_fast {

constexpr int BATCH = 16;                   // values that one lane reads at once
constexpr int64_t MOST_CLASSES = 1 << 30;  // class numbers are int

// Lanes that share a row of C classes: few enough that most of them have something to read.
inline int lanes_per_row(int64_t C) { return C <= BATCH ? 1 : C <= 8 * BATCH ? 8 : 32; }

// Logits on the device, and how rows are read.
struct Rows {
  Logits logits;
  int lanes;  // a power of two, at most 32
  bool wide;  // rows are contiguous and 16-byte aligned
};

inline Rows rows_of(const Logits& x) {
  const int64_t size = itemsize(x.dtype);
  const bool aligned = is_aligned(x.data, x.stride_m * size) && x.stride_n * size % 16 == 0;
  return {x, lanes_per_row(x.C), x.stride_c == 1 && aligned};
}

// Member m's logits of example n. The dtype is looked at for every batch of loads: kernels for each
// dtype would take three times as long to compile and run no faster.
struct Row {
  const void* data;
  int64_t start, stride;
  Dtype dtype;
  int C, lanes, lane;
  bool wide;

  __device__ __forceinline__ Row(const Rows& rows, int64_t m, int64_t n)
      : data(rows.logits.data),
        start(m * rows.logits.stride_m + n * rows.logits.stride_n),
        stride(rows.logits.stride_c),
        dtype(rows.logits.dtype),
        C(int(rows.logits.C)),
        lanes(rows.lanes),
        lane(recomputed(int(threadIdx.x) & (rows.lanes - 1))),
        wide(rows.wide) {}

  // Classes of one batch of all lanes.
  __device__ __forceinline__ int step() const { return lanes * BATCH; }

  // The class of value v of this lane in the batch that begins with class `base`: neighbouring
  // lanes read neighbouring 16 bytes, or elements.
  __device__ __forceinline__ int class_of(int base, int v) const {
    if (!wide) return base + v * lanes + lane;
    const int W = dtype == Dtype::float32 ? 4 : 8;
    return base + (v / W * lanes + lane) * W + v % W;
  }

  __device__ __forceinline__ float at(int c) const {
    float x;
    with_element(dtype, data, [&](const auto* from) { x = to_float(from[start + c * stride]); });
    return x;
  }

  // x[BATCH], -inf beyond the row.
  __device__ __forceinline__ void load(int base, float* x) const {
    with_element(dtype, data, [&](const auto* from) { load_from(from + start, base, x); });
  }

 private:
  template <class T>
  __device__ __forceinline__ void load_from(const T* from, int base, float* x) const {
    constexpr int W = LANES<T>;
    if (wide) {
#pragma unroll
      for (int v = 0; v < BATCH; v += W) {
        const int c = base + (v / W * lanes + lane) * W;
        if (c + W <= C) {
          const Pack<T> pack = load16(from + c);
#pragma unroll
          for (int w = 0; w < W; ++w) x[v + w] = to_float(pack.at[w]);
        } else {
#pragma unroll
          for (int w = 0; w < W; ++w) x[v + w] = element(from, c + w);
        }
      }
    } else {
#pragma unroll
      for (int v = 0; v < BATCH; ++v) x[v] = element(from, base + v * lanes + lane);
    }
  }

  // -inf beyond the row. (A load of the last class instead of none: no branch between the loads.)
  template <class T>
  __device__ __forceinline__ float element(const T* from, int c) const {
    const float x = to_float(from[(c < C ? c : C - 1) * stride]);
    return c < C ? x : -INFINITY;
  }
};

// y * d for y = e^d, 0 where y is.
__device__ __forceinline__ float times_log(float y, float d) {
  return y * (d < -105.0f ? -105.0f : d);
}

// Largest x; sum of e^(x - top); sum of e^(x - top) * (x - top). The sums are NaN for a row with a
// NaN or +inf; the first is 0 for a row of -inf.
struct Softmax {
  float top;
  double sum, weighted;
};

// All lanes of the group get the result; all 32 lanes of the warp must take part. A row of more
// than one batch is read twice, the second time from the cache: sums relative to the largest logit
// so far would have to be rescaled, and JS feels that rounding. More than four terms are added in
// float64.
__device__ __forceinline__ Softmax softmax_of(const Row& row) {
  float x[BATCH], top = -INFINITY;
  for (int base = 0; base < row.C; base += row.step()) {
    row.load(base, x);
#pragma unroll
    for (int v = 0; v < BATCH; ++v) top = x[v] > top ? x[v] : top;
  }
  for (int o = row.lanes / 2; o > 0; o /= 2) {
    const float other = __shfl_xor_sync(WHOLE_WARP, top, o);
    top = other > top ? other : top;
  }
  const float from = top == -INFINITY ? 0.0f : top;
  double sum = 0, weighted = 0;
  for (int base = 0; base < row.C; base += row.step()) {
    if (row.C > row.step()) row.load(base, x);
#pragma unroll
    for (int v = 0; v < BATCH; v += 4) {
      float y[4], yd[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float d = x[v + k] - from;
        y[k] = exp_of(d);
        yd[k] = times_log(y[k], d);
      }
      sum += double((y[0] + y[1]) + (y[2] + y[3]));
      weighted += double((yd[0] + yd[1]) + (yd[2] + yd[3]));
    }
  }
  return {top, group_sum(sum, row.lanes), group_sum(weighted, row.lanes)};
}

struct Best {
  float value;
  int index;

  __device__ __forceinline__ void offer(float x, int c) {
    if (displaces(x, value)) value = x, index = c;
  }
};

// The better of the group's, in all its lanes: of equals, the one with the smaller index.
__device__ __forceinline__ Best group_best(Best best, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) {
    const float value = __shfl_xor_sync(WHOLE_WARP, best.value, o);
    const int index = __shfl_xor_sync(WHOLE_WARP, best.index, o);
    const bool equal = value == best.value || (value != value && best.value != best.value);
    if (displaces(value, best.value) || (equal && index < best.index)) best = {value, index};
  }
  return best;
}

// The first largest class, as torch.argmax has it; all 32 lanes of the warp must take part.
__device__ __forceinline__ int first_largest(const Row& row) {
  Best best{-INFINITY, row.class_of(0, 0)};
  for (int base = 0; base < row.C; base += row.step()) {
    float x[BATCH];
    row.load(base, x);
#pragma unroll
    for (int v = 0; v < BATCH; ++v) best.offer(x[v], row.class_of(base, v));
  }
  return group_best(best, row.lanes).index;
}

}  // namespace landscape_fast
