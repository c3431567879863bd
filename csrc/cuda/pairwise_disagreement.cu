// Pairwise disagreement of M members on the labels of N examples, and the labels that logits give.
//
// Counts are exact: integers within a thread, float64 (whole numbers) beyond. Labels are compared
// as unsigned integers of their size; nothing else about them matters.
#include "cuda/labels.h"
#include "cuda/pair_tiles.h"
#include "cuda/rows.h"

namespace landscape_fast {
namespace {

// T: an unsigned integer that all labels fit in.
template <class T>
struct LabelOp {
  using Tiles = Tiling<16, 8, false>;
  using Sum = unsigned;
  using Raw = T;
  using Value = T;
  static constexpr bool AHEAD = false;
  static constexpr int PACKED = 2;  // 16 bits hold the counts of a warp between two flushes
  static_assert(32 * FLUSH < 1 << 16, "counts of a warp");

  Labels labels;
  int64_t examples;  // between flushes

  __device__ __forceinline__ int classes() const { return 1; }
  __device__ __forceinline__ int64_t at(int64_t m, int64_t n, int) const {
    return m * labels.stride_m + n * labels.stride_n;
  }
  __device__ __forceinline__ int64_t step() const { return labels.stride_m; }

  template <class F>
  __device__ __forceinline__ void with_data(F&& f) const {
    if constexpr (sizeof(T) == 8) {
      f(static_cast<const uint64_t*>(labels.data));
    } else if (labels.itemsize == 4) {
      f(static_cast<const uint32_t*>(labels.data));
    } else if (labels.itemsize == 2) {
      f(static_cast<const uint16_t*>(labels.data));
    } else {
      f(static_cast<const uint8_t*>(labels.data));
    }
  }
  static __device__ __forceinline__ T read(T label) { return label; }
  __device__ __forceinline__ const T* stats_at(int64_t, int64_t) const { return nullptr; }
  __device__ __forceinline__ int64_t stats_step() const { return 0; }
  __device__ __forceinline__ void prepare(const Tile&, int64_t, int64_t) const {}
  static __device__ __forceinline__ T nothing() { return 0; }
  static __device__ __forceinline__ T value(T label, const T*) { return label; }
  template <int ROWS>
  static __device__ __forceinline__ void settle(T (&)[ROWS], unsigned*) {}
  static __device__ __forceinline__ void add(unsigned (&sums)[SLOTS / 2], int slot, T a, T b) {
    if (a != b) sums[slot % (SLOTS / 2)] += slot < SLOTS / 2 ? 1u : 1u << 16;
  }
  static __device__ __forceinline__ void over_warp(unsigned (&sums)[SLOTS / 2],
                                                   double (&total)[SLOTS / 32]) {
    warp_sums(sums);
#pragma unroll
    for (int k = 0; k < SLOTS / 64; ++k) {
      total[k] = double(sums[k] & 0xffffu);
      total[SLOTS / 64 + k] = double(sums[k] >> 16);
    }
  }
  __device__ __forceinline__ double2 self(int64_t, int64_t) const { return make_double2(0, 0); }
  static __device__ __forceinline__ double finish(double sum, double, double) { return sum; }
  static __device__ __forceinline__ bool is_close(double, double) { return false; }
  __device__ __forceinline__ float accurate(int64_t, int64_t, int64_t, int) const { return 0; }
};

template <class T>
int launch(const Labels& labels, double* sums, float* out, double* total, void* stream) {
  const PairPlan plan = plan_pairs(LabelOp<T>::Tiles::count(labels.M), labels.N, 1);
  const LabelOp<T> op{labels, int64_t(FLUSH) * PAIR_THREADS};
  launch_pairs(op, plan, labels.M, labels.N, sums, out, total, stream);
  return int(cudaGetLastError());
}

constexpr int LABEL_THREADS = 256;

// labels[m, n] of all rows, one group of lanes for each.
__global__ void __launch_bounds__(LABEL_THREADS)
labels_kernel(const Rows rows, int32_t* __restrict__ labels) {
  const int groups = LABEL_THREADS / rows.lanes;
  const int64_t M = rows.logits.M, N = rows.logits.N, count = M * N;
  const int64_t group = int64_t(threadIdx.x) / rows.lanes;
  for (int64_t begin = int64_t(blockIdx.x) * groups; begin < count;
       begin += int64_t(gridDim.x) * groups) {
    const bool mine = begin + group < count;
    const int64_t row = mine ? begin + group : count - 1;
    const int label = first_largest(Row(rows, row / N, row % N));
    if (mine && threadIdx.x % rows.lanes == 0) labels[row] = label;
  }
}

}  // namespace

int labels_of_logits_cuda(const Logits& logits, int32_t* labels, void* stream) {
  if (logits.M * logits.N == 0) return int(cudaSuccess);
  const Rows rows = rows_of(logits);
  const int64_t blocks = ceil_div(logits.M * logits.N, LABEL_THREADS / rows.lanes);
  const dim3 grid(unsigned(std::min<int64_t>(blocks, 1 << 20)), 1, 1);
  LSF_LAUNCH(labels_kernel, grid, dim3(LABEL_THREADS, 1, 1), 0, stream, rows, labels);
  return int(cudaGetLastError());
}

int64_t pairwise_disagreement_cuda_workspace(int64_t M, int64_t N) {
  if (M == 0) return 0;
  return plan_pairs(LabelOp<uint32_t>::Tiles::count(M), N, 1).sums() * int64_t(sizeof(double));
}

int pairwise_disagreement_cuda(const Labels& labels, void* workspace, float* out, double* sums,
                               void* stream) {
  if (labels.M == 0) return int(cudaSuccess);
  auto* const parts = static_cast<double*>(workspace);
  if (labels.itemsize == 8) return launch<uint64_t>(labels, parts, out, sums, stream);
  const bool known = labels.itemsize == 1 || labels.itemsize == 2 || labels.itemsize == 4;
  if (known) return launch<uint32_t>(labels, parts, out, sums, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace landscape_fast
