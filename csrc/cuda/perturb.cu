// perturb: y[m, p] = (weights[m, p] + scale * sigma[m, p] * normal) * (dropped ? 0 : 1 / (1 - d)),
// and its gradients, with the random numbers of noise.h drawn where they are used.
//
// Bound by memory and by integer multiplications alike: forty of them make four numbers. A thread
// keeps 16 bytes of a tile; it reads and writes them at once where rows are aligned.
#include <algorithm>

#include "cuda/access.h"
#include "cuda/reduce.h"
#include "noise.h"

namespace landscape_fast {
namespace {

template <class T>
constexpr int THREADS = int(PERTURB_TILE) / LANES<T>;
constexpr int64_t MOST_ROWS = 65535;  // of a grid; its blocks go on to further members

// The elements that a thread keeps.
struct Place {
  int64_t first, P;
  template <int COUNT>
  __device__ __forceinline__ bool whole(const void* row) const {
    return first + COUNT <= P && is_aligned(row);
  }
};

// COUNT elements as float, 0 beyond P; `row` is the thread's first of them.
template <int COUNT, class T>
__device__ __forceinline__ void load_row(const T* row, const Place& at, float (&x)[COUNT]) {
  constexpr int STEP = COUNT < LANES<T> ? COUNT : LANES<T>;
  if (COUNT >= LANES<T> && at.whole<COUNT>(row)) {
#pragma unroll
    for (int i = 0; i < COUNT; i += STEP) {
      const Pack<T> pack = load16(row + i);
#pragma unroll
      for (int v = 0; v < STEP; ++v) x[i + v] = to_float(pack.at[v]);
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < COUNT; ++v) x[v] = at.first + v < at.P ? to_float(row[v]) : 0.0f;
}

template <int COUNT, class T>
__device__ __forceinline__ void store_row(T* row, const Place& at, const float (&x)[COUNT]) {
  if (COUNT % LANES<T> == 0 && at.whole<COUNT>(row)) {
#pragma unroll
    for (int i = 0; i < COUNT; i += LANES<T>) store16(row + i, x + i);
    return;
  }
#pragma unroll
  for (int v = 0; v < COUNT; ++v) {
    if (at.first + v < at.P) store(row + v, x[v]);
  }
}

template <int COUNT>
__device__ __forceinline__ void load_sigma(const MemberElements& sigma, int64_t m, const Place& at,
                                           float (&x)[COUNT]) {
  with_element(sigma.dtype, sigma.data, [&](const auto* data) {
    load_row(data + m * sigma.stride_m + at.first, at, x);
  });
}

__device__ __forceinline__ uint64_t seed_of(const Perturbation& draw) {
  return draw.seeds ? uint64_t(*draw.seeds) : draw.seed;
}

__device__ __forceinline__ float number_of(const float* each, float all, int64_t m) {
  return each ? each[m] : all;
}

template <int COUNT>
__device__ __forceinline__ void draw_normals(uint64_t seed, uint32_t member, const Place& at,
                                             float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += WORDS) {
    const Words w = words_of(seed, uint64_t(at.first + i) / WORDS, member, NORMALS);
    normals_of(w.at[0], w.at[1], x[i], x[i + 1]);
    normals_of(w.at[2], w.at[3], x[i + 2], x[i + 3]);
  }
}

// x becomes 0 where it is dropped, and is divided by the chance to stay where not.
template <int COUNT>
__device__ __forceinline__ void drop(uint64_t seed, uint32_t member, float dropout,
                                     const Place& at, float (&x)[COUNT]) {
  const float kept = 1.0f / (1.0f - dropout);
#pragma unroll
  for (int i = 0; i < COUNT; i += WORDS) {
    const Words w = words_of(seed, uint64_t(at.first + i) / WORDS, member, UNIFORMS);
#pragma unroll
    for (int v = 0; v < WORDS; ++v) x[i + v] *= stays(w.at[v], dropout) ? kept : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS<T>)
perturb_kernel(const Perturbation draw, const T* __restrict__ weights, int64_t weights_stride_m,
               T* __restrict__ y) {
  constexpr int COUNT = LANES<T>;
  const Place at{int64_t(blockIdx.x) * PERTURB_TILE + int64_t(threadIdx.x) * COUNT, draw.P};
  if (at.first >= draw.P) return;
  const uint64_t seed = seed_of(draw);
  for (int64_t m = blockIdx.y; m < draw.M; m += gridDim.y) {
    const uint32_t member = uint32_t(draw.first_member + m);
    float x[COUNT];
    load_row(weights + m * weights_stride_m + at.first, at, x);
    if (has_noise(draw)) {
      const float scale = number_of(draw.scales, draw.scale, m);
      float noise[COUNT], sigma[COUNT];
      draw_normals(seed, member, at, noise);
      if (draw.sigma.data) {
        load_sigma(draw.sigma, m, at, sigma);
#pragma unroll
        for (int v = 0; v < COUNT; ++v) noise[v] *= sigma[v];
      }
#pragma unroll
      for (int v = 0; v < COUNT; ++v) x[v] += scale * noise[v];
    }
    if (has_dropout(draw)) drop(seed, member, number_of(draw.dropouts, draw.dropout, m), at, x);
    store_row(y + m * draw.P + at.first, at, x);
  }
}

// Where a gradient is one for all members, the grid is one row high and a block adds them up in
// order. The threads of a block stay together for the sum.
template <class T>
__global__ void __launch_bounds__(THREADS<T>)
perturb_backward_kernel(const Perturbation draw, const T* __restrict__ dy, int64_t dy_stride_m,
                        const PerturbGradients out) {
  constexpr int COUNT = LANES<T>;
  LSF_SHARED(float, scratch, THREADS<T> / 32);
  const Place at{int64_t(blockIdx.x) * PERTURB_TILE + int64_t(threadIdx.x) * COUNT, draw.P};
  const uint64_t seed = seed_of(draw);
  T* dweights = static_cast<T*>(out.dweights);
  float* parts = static_cast<float*>(out.parts);
  const auto store_dsigma = [&](int64_t start, const float (&x)[COUNT]) {
    with_element(draw.sigma.dtype, out.dsigma, [&](const auto* data) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
      store_row(const_cast<S*>(data) + start + at.first, at, x);
    });
  };
  float sum_weights[COUNT] = {}, sum_sigma[COUNT] = {};
  for (int64_t m = blockIdx.y; m < draw.M; m += gridDim.y) {
    const uint32_t member = uint32_t(draw.first_member + m);
    float g[COUNT];
    load_row(dy + m * dy_stride_m + at.first, at, g);
    if (has_dropout(draw)) drop(seed, member, number_of(draw.dropouts, draw.dropout, m), at, g);
    if (dweights && !out.dweights_shared) store_row(dweights + m * draw.P + at.first, at, g);
#pragma unroll
    for (int v = 0; v < COUNT; ++v) sum_weights[v] += g[v];
    if (!out.dsigma && !parts) continue;  // the same for all threads
    float noise[COUNT] = {};
    if (has_noise(draw)) draw_normals(seed, member, at, noise);
#pragma unroll
    for (int v = 0; v < COUNT; ++v) g[v] *= noise[v];
    if (out.dsigma) {
      const float scale = number_of(draw.scales, draw.scale, m);
      float one[COUNT];
#pragma unroll
      for (int v = 0; v < COUNT; ++v) {
        one[v] = scale * g[v];
        sum_sigma[v] += one[v];
      }
      if (!out.dsigma_shared) store_dsigma(m * draw.P, one);
    }
    if (parts) {
      float sigma[COUNT], sum = 0.0f;
      if (draw.sigma.data) load_sigma(draw.sigma, m, at, sigma);
#pragma unroll
      for (int v = 0; v < COUNT; ++v) sum += draw.sigma.data ? g[v] * sigma[v] : g[v];
      sum = block_sum<THREADS<T>>(sum, scratch);
      if (threadIdx.x == 0) parts[int64_t(blockIdx.x) * draw.M + m] = sum;
    }
  }
  if (dweights && out.dweights_shared) store_row(dweights + at.first, at, sum_weights);
  if (out.dsigma && out.dsigma_shared) store_dsigma(0, sum_sigma);
}

dim3 grid_of(const Perturbation& draw, bool one_row) {
  const int64_t rows = one_row ? 1 : std::min(draw.M, MOST_ROWS);
  return dim3(unsigned(perturb_tiles(draw.P)), unsigned(rows), 1);
}

}  // namespace

int perturb_cuda(const Perturbation& draw, const MemberElements& weights, void* y, void* stream) {
  if (draw.M == 0 || draw.P == 0) return int(cudaSuccess);
  return with_dtype(weights.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LSF_LAUNCH(perturb_kernel<T>, grid_of(draw, false), dim3(THREADS<T>, 1, 1), 0, stream, draw,
               static_cast<const T*>(weights.data), weights.stride_m, static_cast<T*>(y));
    return int(cudaGetLastError());
  });
}

int perturb_backward_cuda(const Perturbation& draw, const MemberElements& dy,
                          const PerturbGradients& out, void* stream) {
  if (draw.M == 0 || draw.P == 0) return int(cudaSuccess);
  const bool one_row =
      (out.dweights && out.dweights_shared) || (out.dsigma && out.dsigma_shared);
  return with_dtype(dy.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LSF_LAUNCH(perturb_backward_kernel<T>, grid_of(draw, one_row), dim3(THREADS<T>, 1, 1), 0,
               stream, draw, static_cast<const T*>(dy.data), dy.stride_m, out);
    return int(cudaGetLastError());
  });
}

}  // namespace landscape_fast
