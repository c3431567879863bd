// combine, forward: weights[m, p] = sum_k coeffs[m, part of p, k] * anchors[k, p].
//
// Bound by memory: every anchor is read once and every weight written once, 16 bytes at a time
// where rows are aligned. Up to KEPT anchors of a fragment stay in registers while m runs; with
// more, the sums of GROUP members stay and the anchors, by then in L1, are read again for the next
// group.
#include "cuda/combine_parts.h"

namespace landscape_fast {
namespace {

constexpr int KEPT = 8;
constexpr int STAGED = 1024;  // coefficients in shared memory at a time
constexpr int GROUP = 8;
constexpr int AT_ONCE = 4;  // anchors
constexpr int WIDE_BYTES = 48 * 1024;

// One block makes its range of one part, for all members.
template <class T, int KMAX, int CAPACITY>
__global__ void __launch_bounds__(COMBINE_THREADS)
combine_kernel(const Coeffs coeffs, const T* __restrict__ anchors, T* __restrict__ weights,
               const __grid_constant__ PartTable<CAPACITY> table) {
  LSF_SHARED(float, staged, STAGED);
  const Range range = range_of_block<T>(table);
  const CombinePart& part = table.part[range.index];
  const int K = int(coeffs.K);
  anchors += part.anchors;
  weights += part.weights;
  const bool wide = rows_are_aligned(anchors, part.anchors_stride_k) &&
                    rows_are_aligned(weights, part.weights_stride_m);
  constexpr int MEMBERS = STAGED / KMAX;
  for (int64_t m0 = 0; m0 < coeffs.M; m0 += MEMBERS) {
    const int members = int(coeffs.M - m0 < MEMBERS ? coeffs.M - m0 : MEMBERS);
    __syncthreads();  // the coefficients of the group before have been read
    for (int i = int(threadIdx.x); i < members * KMAX; i += COMBINE_THREADS) {
      const int m = i / KMAX, k = i % KMAX;
      staged[i] = k < K ? coeff_at(coeffs, part.part, m0 + m, k) : 0.0f;
    }
    __syncthreads();
    for (int64_t f = range.begin; f < range.end; ++f) {
      const Fragment<T> fragment(f, part.P, wide);
      Pack<T> packed[KMAX] = {};
      float a[KMAX][LANES<T>];
      fragment.load(anchors, part.anchors_stride_k, K, packed);
#pragma unroll
      for (int k = 0; k < KMAX; ++k) {
#pragma unroll
        for (int v = 0; v < LANES<T>; ++v) a[k][v] = to_float(packed[k].at[v]);
      }
#pragma unroll 2
      for (int m = 0; m < members; ++m) {
        float sum[LANES<T>] = {};
#pragma unroll
        for (int k = 0; k < KMAX; ++k) {
          if (k < K) {
            const float c = staged[m * KMAX + k];
#pragma unroll
            for (int v = 0; v < LANES<T>; ++v) sum[v] += c * a[k][v];
          }
        }
        fragment.save(weights + (m0 + m) * part.weights_stride_m, sum);
      }
    }
  }
}

// The same for any K: GROUP members at a time, one anchor after the other.
template <class T, int CAPACITY>
__global__ void __launch_bounds__(COMBINE_THREADS)
combine_many_kernel(const Coeffs coeffs, const T* __restrict__ anchors, T* __restrict__ weights,
                    int group, const __grid_constant__ PartTable<CAPACITY> table) {
  LSF_DYNAMIC_SHARED(float, staged);  // [K, GROUP], 0 beyond the members of the group
  const Range range = range_of_block<T>(table);
  const CombinePart& part = table.part[range.index];
  anchors += part.anchors;
  weights += part.weights;
  const bool wide = rows_are_aligned(anchors, part.anchors_stride_k) &&
                    rows_are_aligned(weights, part.weights_stride_m);
  for (int64_t m0 = 0; m0 < coeffs.M; m0 += group) {
    const int members = int(coeffs.M - m0 < group ? coeffs.M - m0 : group);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < coeffs.K * group; i += COMBINE_THREADS) {
      const int64_t k = i / group, m = i % group;
      staged[i] = m < members ? coeff_at(coeffs, part.part, m0 + m, k) : 0.0f;
    }
    __syncthreads();
    for (int64_t f = range.begin; f < range.end; ++f) {
      const Fragment<T> fragment(f, part.P, wide);
      float sum[GROUP][LANES<T>] = {};
      for (int64_t k0 = 0; k0 < coeffs.K; k0 += AT_ONCE) {
        const int count = int(coeffs.K - k0 < AT_ONCE ? coeffs.K - k0 : AT_ONCE);
        Pack<T> a[AT_ONCE];
        fragment.load(anchors + k0 * part.anchors_stride_k, part.anchors_stride_k, count, a);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
          if (k >= count) break;
#pragma unroll
          for (int m = 0; m < GROUP; ++m) {
            const float c = m < group ? staged[(k0 + k) * group + m] : 0.0f;
#pragma unroll
            for (int v = 0; v < LANES<T>; ++v) sum[m][v] += c * to_float(a[k].at[v]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < GROUP; ++m) {
        if (m < members) fragment.save(weights + (m0 + m) * part.weights_stride_m, sum[m]);
      }
    }
  }
}

template <class T>
void launch(const CombinePart* parts, int64_t L, int64_t fragments, const Coeffs& coeffs,
            const T* anchors, T* weights, void* stream) {
  const dim3 block(COMBINE_THREADS, 1, 1);
  if (coeffs.K <= KEPT / 2 && L <= FEW_PARTS) {
    for_each_launch<T, FEW_PARTS>(parts, L, fragments, [&](const auto& table, int64_t blocks) {
      const auto kernel = combine_kernel<T, KEPT / 2, FEW_PARTS>;
      LSF_LAUNCH(kernel, dim3(unsigned(blocks), 1, 1), block, 0, stream, coeffs, anchors, weights,
                 table);
    });
    return;
  }
  for_each_launch<T, MANY_PARTS>(parts, L, fragments, [&](const auto& table, int64_t blocks) {
    const dim3 grid(unsigned(blocks), 1, 1);
    if (coeffs.K <= KEPT) {
      const auto kernel = coeffs.K <= KEPT / 2 ? combine_kernel<T, KEPT / 2, MANY_PARTS>
                                               : combine_kernel<T, KEPT, MANY_PARTS>;
      LSF_LAUNCH(kernel, grid, block, 0, stream, coeffs, anchors, weights, table);
    } else {
      const int64_t fit = WIDE_BYTES / (coeffs.K * int64_t(sizeof(float)));
      const int group = int(std::min<int64_t>(GROUP, fit));
      const auto kernel = combine_many_kernel<T, MANY_PARTS>;
      LSF_LAUNCH(kernel, grid, block, size_t(group * coeffs.K * sizeof(float)), stream, coeffs,
                 anchors, weights, group, table);
    }
  });
}

}  // namespace

int combine_cuda(const CombinePart* parts, int64_t L, Dtype dtype, const Coeffs& coeffs,
                 const void* anchors, void* weights, void* stream) {
  if (L == 0 || coeffs.M == 0) return int(cudaSuccess);
  if (coeffs.K < 1 || coeffs.K * int64_t(sizeof(float)) > WIDE_BYTES) {
    return int(cudaErrorInvalidValue);
  }
  const int64_t fragments = fragments_per_block(parts, L, dtype, COMBINE_BLOCKS);
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch<T>(parts, L, fragments, coeffs, static_cast<const T*>(anchors), static_cast<T*>(weights),
              stream);
    return int(cudaGetLastError());
  });
}

}  // namespace landscape_fast
