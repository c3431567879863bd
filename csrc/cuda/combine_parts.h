// What the forward and the backward of combine share: which part of the parameters a block works
// on, and how a thread reads its fragment of it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/access.h"

namespace landscape_fast {

constexpr int COMBINE_THREADS = 256;
constexpr int64_t COMBINE_BLOCKS = 1056;  // about the blocks of one launch: 8 on each of 132 SMs

// The parts of one launch, passed by value: nothing is copied to the device beforehand, and a
// captured graph holds them. Parameters beyond 4 KB need CUDA 12.1.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int MANY_PARTS = 48;
#else
constexpr int MANY_PARTS = 256;
#endif
constexpr int FEW_PARTS = 8;

template <int CAPACITY>
struct PartTable {
  int count;
  int fragments;                   // of each block, at most; a fragment is 16 bytes per thread
  int first_block[CAPACITY + 1];   // of each part, within the launch
  CombinePart part[CAPACITY];
};

// The part of this block, and the fragments [begin, end) of it that are the block's.
struct Range {
  int index;
  int64_t begin, end;
};

template <class T>
__host__ __device__ __forceinline__ int64_t fragments_of(int64_t P) {
  return ceil_div(P, int64_t(COMBINE_THREADS) * LANES<T>);
}

template <class T>
__device__ __forceinline__ bool rows_are_aligned(const T* first, int64_t stride) {
  return is_aligned(first, stride * int64_t(sizeof(T)));
}

template <class T, int CAPACITY>
__device__ __forceinline__ Range range_of_block(const PartTable<CAPACITY>& table) {
  const int block = int(blockIdx.x);
  int low = 0, high = table.count;
  while (high - low > 1) {  // first_block[low] <= block < first_block[high]
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= block ? low : high) = middle;
  }
  const int64_t begin = int64_t(block - table.first_block[low]) * table.fragments;
  const int64_t end = fragments_of<T>(table.part[low].P);
  return {low, begin, end < begin + table.fragments ? end : begin + table.fragments};
}

// LANES<T> elements of each row of P. They are neighbours where all rows are 16-byte aligned
// (`wide`), else COMBINE_THREADS apart, so that the accesses of a warp are contiguous all the same.
template <class T>
struct Fragment {
  int64_t first, P;
  int step;
  bool whole;  // 16 bytes, all inside

  __device__ __forceinline__ Fragment(int64_t number, int64_t P, bool wide)
      : first(number * COMBINE_THREADS * LANES<T> + int64_t(threadIdx.x) * (wide ? LANES<T> : 1)),
        P(P),
        step(wide ? 1 : COMBINE_THREADS),
        whole(wide && first + LANES<T> <= P) {}

  // The first `count` of ROWS rows, `stride` apart; 0 beyond P. All loads go out before one is
  // needed.
  template <int ROWS>
  __device__ __forceinline__ void load(const T* rows, int64_t stride, int count,
                                       Pack<T> (&x)[ROWS]) const {
    if (whole) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (r < count) x[r] = load16(rows + r * stride + first);
      }
      return;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (r >= count) break;
#pragma unroll
      for (int v = 0; v < LANES<T>; ++v) {
        const int64_t p = first + v * step;
        const T at = rows[r * stride + (p < P ? p : P - 1)];  // no branch between the loads
        x[r].at[v] = p < P ? at : T(0.0f);
      }
    }
  }

  __device__ __forceinline__ void save(T* row, const float (&x)[LANES<T>]) const {
    if (whole) {
      store16(row + first, x);
      return;
    }
#pragma unroll
    for (int v = 0; v < LANES<T>; ++v) {
      const int64_t p = first + v * step;
      if (p < P) store(row + p, x[v]);
    }
  }
};

// coeffs[m, part, k]; the branch on the dtype is the same for a whole launch.
__device__ __forceinline__ float coeff_at(const Coeffs& c, int64_t part, int64_t m, int64_t k) {
  const int64_t i = m * c.stride_m + part * c.stride_l + k * c.stride_k;
  float x;
  with_element(c.dtype, c.data, [&](const auto* data) { x = to_float(data[i]); });
  return x;
}

// How many fragments a block takes, so that all parts have about `blocks` blocks.
inline int64_t fragments_per_block(const CombinePart* parts, int64_t L, Dtype dtype,
                                   int64_t blocks) {
  int64_t fragments = 0;
  const int64_t size = COMBINE_THREADS * (16 / itemsize(dtype));
  for (int64_t l = 0; l < L; ++l) fragments += ceil_div(parts[l].P, size);
  return std::clamp<int64_t>(fragments / blocks, 1, 1 << 30);
}

// Calls `f(table, blocks)` for each launch, with tables for CAPACITY parts.
template <class T, int CAPACITY, class F>
void for_each_launch(const CombinePart* parts, int64_t L, int64_t fragments, F&& f) {
  for (int64_t l = 0; l < L;) {
    PartTable<CAPACITY> table{};
    table.fragments = int(fragments);
    int64_t blocks = 0;
    for (; l < L && table.count < CAPACITY; ++l, ++table.count) {
      table.part[table.count] = parts[l];
      table.first_block[table.count] = int(blocks);
      blocks += ceil_div(fragments_of<T>(parts[l].P), fragments);
    }
    table.first_block[table.count] = int(blocks);
    f(table, blocks);
  }
}

}  // namespace landscape_fast
