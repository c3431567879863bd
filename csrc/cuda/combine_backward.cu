// combine, backward: danchors[k, p] = sum_m coeffs[m, part, k] * dweights[m, p] and
// dcoeffs[m, part, k] = sum_p dweights[m, p] * anchors[k, p].
//
// dweights and anchors are read once for both. Every warp adds its dot products of GROUP members
// and KMAX anchors in float32 to a row of its own in the workspace; the rows of a block, and then
// those of all blocks, are added in float64 in a fixed order.
#include "cuda/combine_parts.h"
#include "cuda/reduce.h"

namespace landscape_fast {
namespace {

constexpr int WARPS = COMBINE_THREADS / 32;
constexpr int STAGED = 1024;  // coefficients in shared memory at a time
constexpr int DOTS = 32;      // dot products that a warp adds at once: one per lane
constexpr int64_t MOST_WORKSPACE = 64 << 20;
constexpr int64_t FEWEST_BLOCKS = 132;

// Anchors of one pass over dweights. Eight of a 16-bit type, widened, would not fit in the
// registers.
int kmax_of(int64_t K, Dtype dtype) { return K <= 4 || dtype != Dtype::float32 ? 4 : 8; }

// Where sums of products go. A row holds, for tiles of KMAX anchors and of DOTS / KMAX members, the
// DOTS products of each pair of tiles, anchors fastest.
struct Partials {
  double* block;  // [blocks, row]
  float* warp;    // [blocks, WARPS, row]
  int64_t row;
};

int64_t row_of(int64_t M, int64_t K, int kmax) {
  return ceil_div(K, kmax) * ceil_div(M, DOTS / kmax) * DOTS;
}

int64_t bytes_per_block(int64_t row) {
  return row * int64_t(sizeof(double) + WARPS * sizeof(float));
}

template <class T, int KMAX, int CAPACITY>
__global__ void __launch_bounds__(COMBINE_THREADS, 1)
combine_backward_kernel(const Coeffs coeffs, const T* __restrict__ anchors,
                        const T* __restrict__ dweights, T* __restrict__ danchors,
                        const Partials partials,
                        const __grid_constant__ PartTable<CAPACITY> table) {
  constexpr int GROUP = DOTS / KMAX, MEMBERS = STAGED / KMAX;
  LSF_SHARED(float, staged, STAGED);
  const Range range = range_of_block<T>(table);
  const CombinePart& part = table.part[range.index];
  const int k0 = int(blockIdx.y) * KMAX;
  const int K = int(coeffs.K) - k0 < KMAX ? int(coeffs.K) - k0 : KMAX;
  const bool dots_wanted = partials.block != nullptr;
  const bool danchors_wanted = danchors != nullptr && part.danchors >= 0;
  anchors += part.anchors + k0 * part.anchors_stride_k;
  dweights += part.weights;
  if (danchors_wanted) danchors += part.danchors + k0 * part.danchors_stride_k;
  const bool wide = rows_are_aligned(anchors, part.anchors_stride_k) &&
                    rows_are_aligned(dweights, part.weights_stride_m) &&
                    (!danchors_wanted || rows_are_aligned(danchors, part.danchors_stride_k));
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t columns = ceil_div(coeffs.M, GROUP) * DOTS;  // of this tile of anchors, in a row
  const int64_t column0 = blockIdx.y * columns;
  float* const mine = partials.warp + (int64_t(blockIdx.x) * WARPS + warp) * partials.row + column0;
  int64_t staged_from = -1;
  for (int64_t f = range.begin; f < range.end; ++f) {
    const Fragment<T> fragment(f, part.P, wide);
    Pack<T> a[KMAX] = {};
    float da[KMAX][LANES<T>] = {};
    if (dots_wanted) fragment.load(anchors, part.anchors_stride_k, K, a);
    for (int64_t m0 = 0; m0 < coeffs.M; m0 += GROUP) {
      if (m0 / MEMBERS * MEMBERS != staged_from) {
        staged_from = m0 / MEMBERS * MEMBERS;
        __syncthreads();
        for (int i = int(threadIdx.x); i < STAGED; i += COMBINE_THREADS) {
          const int64_t m = staged_from + i / KMAX;
          const int k = i % KMAX;
          staged[i] = m < coeffs.M && k < K ? coeff_at(coeffs, part.part, m, k0 + k) : 0.0f;
        }
        __syncthreads();
      }
      const int members = int(coeffs.M - m0 < GROUP ? coeffs.M - m0 : GROUP);
      Pack<T> dw[GROUP] = {};
      fragment.load(dweights + m0 * part.weights_stride_m, part.weights_stride_m, members, dw);
      float dots[DOTS] = {};
#pragma unroll
      for (int j = 0; j < GROUP; ++j) {
        if (j >= members) break;
#pragma unroll
        for (int k = 0; k < KMAX; ++k) {
          const float c = staged[(m0 - staged_from + j) * KMAX + k];
#pragma unroll
          for (int v = 0; v < LANES<T>; ++v) {
            da[k][v] += c * to_float(dw[j].at[v]);
            dots[j * KMAX + k] += to_float(dw[j].at[v]) * to_float(a[k].at[v]);
          }
        }
      }
      if (dots_wanted) {
        warp_sums(dots);
        float* const sum = mine + m0 / GROUP * DOTS + lane;
        *sum = f == range.begin ? dots[0] : *sum + dots[0];
      }
    }
    if (danchors_wanted) {
#pragma unroll
      for (int k = 0; k < KMAX; ++k) {
        if (k < K) fragment.save(danchors + k * part.danchors_stride_k, da[k]);
      }
    }
  }
  if (!dots_wanted) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < columns; i += COMBINE_THREADS) {
    const float* of_warp = partials.warp + int64_t(blockIdx.x) * WARPS * partials.row + column0 + i;
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += of_warp[w * partials.row];
    partials.block[blockIdx.x * partials.row + column0 + i] = sum;
  }
}

constexpr int SUM_ROWS = 8;

// dcoeffs[m, part, k] from the blocks of each part; 32 of the [M, K] numbers in one block.
template <int CAPACITY>
__global__ void __launch_bounds__(32 * SUM_ROWS)
combine_sum_kernel(const double* __restrict__ partials, int64_t row, Dtype dtype, void* dcoeffs,
                   int64_t M, int64_t K, int kmax, int64_t dcoeffs_parts,
                   const __grid_constant__ PartTable<CAPACITY> table) {
  LSF_SHARED(double, sums, 32 * SUM_ROWS);
  const int index = int(blockIdx.y);
  const int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const int64_t m = i / K, k = i % K;
  const int group = DOTS / kmax;
  const int64_t column = (k / kmax * ceil_div(M, group) + m / group) * DOTS +
                         m % group * kmax + k % kmax;
  double sum = 0;
  if (i < M * K) {
    for (int b = table.first_block[index] + int(threadIdx.y); b < table.first_block[index + 1];
         b += SUM_ROWS) {
      sum += partials[b * row + column];
    }
  }
  sums[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= M * K) return;
  for (int r = 1; r < SUM_ROWS; ++r) sum += sums[r * 32 + threadIdx.x];
  store(dtype, dcoeffs, (m * dcoeffs_parts + table.part[index].part) * K + k, float(sum));
}

template <int CAPACITY>
void launch_sum(const double* partials, int64_t row, const Coeffs& coeffs, int kmax, void* dcoeffs,
                int64_t dcoeffs_parts, const PartTable<CAPACITY>& table, void* stream) {
  const dim3 grid(unsigned(ceil_div(coeffs.M * coeffs.K, 32)), unsigned(table.count), 1);
  const dim3 block(32, SUM_ROWS, 1);
  const auto kernel = combine_sum_kernel<CAPACITY>;
  LSF_LAUNCH(kernel, grid, block, 0, stream, partials, row, coeffs.dtype, dcoeffs, coeffs.M,
             coeffs.K, kmax, dcoeffs_parts, table);
}

int64_t fragments_of_blocks(const CombinePart* parts, int64_t L, Dtype dtype, int64_t row) {
  const int64_t fit = MOST_WORKSPACE / bytes_per_block(row);
  return fragments_per_block(parts, L, dtype, std::clamp(fit, FEWEST_BLOCKS, COMBINE_BLOCKS));
}

int64_t count_blocks(const CombinePart* parts, int64_t L, Dtype dtype, int64_t fragments) {
  const int64_t size = COMBINE_THREADS * (16 / itemsize(dtype));
  int64_t blocks = 0;
  for (int64_t l = 0; l < L; ++l) blocks += ceil_div(ceil_div(parts[l].P, size), fragments);
  return blocks;
}

}  // namespace

int64_t combine_backward_cuda_workspace(const CombinePart* parts, int64_t L, Dtype dtype, int64_t M,
                                        int64_t K) {
  if (L == 0 || M == 0 || K == 0) return 0;
  const int64_t row = row_of(M, K, kmax_of(K, dtype));
  const int64_t fragments = fragments_of_blocks(parts, L, dtype, row);
  return count_blocks(parts, L, dtype, fragments) * bytes_per_block(row);
}

int combine_backward_cuda(const CombinePart* parts, int64_t L, Dtype dtype, const Coeffs& coeffs,
                          const void* anchors, const void* dweights, void* workspace,
                          void* danchors, void* dcoeffs, int64_t dcoeffs_parts, void* stream) {
  const int64_t M = coeffs.M, K = coeffs.K;
  if (L == 0 || M == 0 || (!danchors && !dcoeffs)) return int(cudaSuccess);
  const int kmax = kmax_of(K, dtype);
  if (K < 1 || ceil_div(K, kmax) > 65535) return int(cudaErrorInvalidValue);
  const int64_t row = row_of(M, K, kmax);
  const int64_t fragments = fragments_of_blocks(parts, L, dtype, row);
  const int64_t blocks = count_blocks(parts, L, dtype, fragments);
  const bool shared = coeffs.stride_l == 0;
  auto* const block_sums = dcoeffs ? static_cast<double*>(workspace) : nullptr;
  auto* const warp_sums = dcoeffs ? reinterpret_cast<float*>(block_sums + blocks * row) : nullptr;
  const auto run = [&](auto* type, auto capacity) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int CAPACITY = decltype(capacity)::value;
    int64_t before = 0;  // blocks of the launches so far
    for_each_launch<T, CAPACITY>(parts, L, fragments, [&](const auto& table, int64_t launched) {
      auto kernel = combine_backward_kernel<T, 4, CAPACITY>;
      if constexpr (CAPACITY == MANY_PARTS && sizeof(T) == 4) {
        if (kmax == 8) kernel = combine_backward_kernel<T, 8, CAPACITY>;
      }
      Partials partials{nullptr, nullptr, row};
      if (dcoeffs) partials = {block_sums + before * row, warp_sums + before * row * WARPS, row};
      const dim3 grid(unsigned(launched), unsigned(ceil_div(K, kmax)), 1);
      LSF_LAUNCH(kernel, grid, dim3(COMBINE_THREADS, 1, 1), 0, stream, coeffs,
                 static_cast<const T*>(anchors), static_cast<const T*>(dweights),
                 static_cast<T*>(danchors), partials, table);
      if (dcoeffs && !shared) {
        launch_sum(partials.block, row, coeffs, kmax, dcoeffs, dcoeffs_parts, table, stream);
      }
      before += launched;
    });
    return 0;
  };
  with_dtype(dtype, [&](auto* type) {
    if (kmax == 4 && L <= FEW_PARTS) {
      return run(type, std::integral_constant<int, FEW_PARTS>());
    }
    return run(type, std::integral_constant<int, MANY_PARTS>());
  });
  if (dcoeffs && shared) {  // one sum over the blocks of all parts
    PartTable<FEW_PARTS> table{};
    table.count = 1;
    table.first_block[1] = int(blocks);
    launch_sum(block_sums, row, coeffs, kmax, dcoeffs, 1, table, stream);
  }
  return int(cudaGetLastError());
}

}  // namespace landscape_fast
