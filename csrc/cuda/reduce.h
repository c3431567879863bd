// Sums over the threads of a warp and of a block, always in the same order.
#pragma once

#include "cuda/launch.h"

namespace landscape_fast {

constexpr unsigned WHOLE_WARP = 0xffffffffu;

// The sum over each group of G neighbouring lanes (G a power of two), in all of them.
template <class T>
__device__ __forceinline__ T group_sum(T x, int G) {
  for (int o = G / 2; o > 0; o /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, o);
  return x;
}

// Of 2 * HALF values in each lane, keeps one half, added to the same half of the lane `o` away,
// which keeps the other.
template <int HALF, class T>
__device__ __forceinline__ void fold(T* x, int o) {
  const bool upper = int(threadIdx.x) & o;
#pragma unroll
  for (int k = 0; k < HALF; ++k) {
    const T mine = upper ? x[k + HALF] : x[k];
    const T other = upper ? x[k] : x[k + HALF];
    x[k] = mine + __shfl_xor_sync(WHOLE_WARP, other, o);
  }
}

// V values in each lane, V a multiple of 32: lane l gets the warp's sums of values l * V / 32 on,
// in its first ones. Halving the values with every exchange takes V - V / 32 shuffles, not 5 * V.
template <int V, class T>
__device__ __forceinline__ void warp_sums(T (&x)[V]) {
  static_assert(V % 32 == 0, "every lane gets as many sums");
  fold<V / 2>(x, 16);
  fold<V / 4>(x, 8);
  fold<V / 8>(x, 4);
  fold<V / 16>(x, 2);
  fold<V / 32>(x, 1);
}

// The same with the last, largest sums in float64.
template <int V>
__device__ __forceinline__ void warp_sums(float (&x)[V], double (&sums)[V / 32]) {
  static_assert(V % 32 == 0, "every lane gets as many sums");
  fold<V / 2>(x, 16);
  fold<V / 4>(x, 8);
  double y[V / 4];
#pragma unroll
  for (int k = 0; k < V / 4; ++k) y[k] = double(x[k]);
  fold<V / 8>(y, 4);
  fold<V / 16>(y, 2);
  fold<V / 32>(y, 1);
#pragma unroll
  for (int k = 0; k < V / 32; ++k) sums[k] = y[k];
}

// The sum over a block of THREADS threads, in all of them. `scratch` (THREADS / 32 values, shared)
// may be used again at once, since a barrier comes first.
template <int THREADS, class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  x = group_sum(x, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = scratch[0];
  for (int w = 1; w < THREADS / 32; ++w) sum += scratch[w];
  return sum;
}

}  // namespace landscape_fast
