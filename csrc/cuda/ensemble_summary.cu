// Accuracy, NLL, Brier score, calibration and uncertainty of M members and of their averaged
// probabilities.
//
// Up to HELD * 32 classes a group of lanes takes an example: it holds the row of one member and the
// averaged probabilities in registers, so that the logits are read once, the next row while this
// one is worked on. Longer rows take a block per example and are read twice
// (ensemble_summary_long.cu).
#include "cuda/summary.h"

namespace landscape_fast {
namespace {

constexpr int HELD = 32;  // values of a row in each lane, at most

// The sum over the groups of a warp of what all lanes of a group have in common.
__device__ __forceinline__ float over_groups(float x, int lanes) {
  for (int o = lanes; o < 32; o *= 2) x += __shfl_xor_sync(WHOLE_WARP, x, o);
  return x;
}

// A row in registers: V values in each lane of the group.
template <int V>
__device__ __forceinline__ void load_row(const Row& row, float (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; v += BATCH) row.load(v / BATCH * row.step(), x + v);
}

__device__ __forceinline__ int class_at(const Row& row, int v) {
  return row.class_of(v / BATCH * row.step(), v % BATCH);
}

// The first largest of values that are no NaN, in all lanes of the group.
template <int V>
__device__ __forceinline__ Best largest(const Row& row, const float (&x)[V]) {
  float value = -INFINITY;
  int at = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool more = x[v] > value;
    value = more ? x[v] : value;
    at = more ? v : at;
  }
  return group_best({value, class_at(row, at)}, row.lanes);
}

// Mean over members of KL from their probabilities to the averaged ones, from accurate terms.
template <int V>
__device__ __forceinline__ double information_of(const Rows& rows, int64_t n,
                                                 const float (&mean)[V]) {
  double total = 0;
#pragma unroll 1
  for (int64_t m = 0; m < rows.logits.M; ++m) {
    const Row row(rows, m, n);
    float x[V], sum = 0, terms = 0;
    load_row(row, x);
    const float top = largest(row, x).value;
#pragma unroll
    for (int v = 0; v < V; ++v) sum += x[v] = exp_of(x[v] - top);
    const float scale = 1.0f / group_sum(sum, row.lanes);
#pragma unroll
    for (int v = 0; v < V; ++v) terms += kl_term(x[v] * scale, mean[v]);
    total += double(group_sum(terms, row.lanes));
  }
  return total / double(rows.logits.M);
}

// exp_quick makes errors of 1e-7 in each sum of exponentials, like those of rounding the logits.
template <int V>
__global__ void __launch_bounds__(SUMMARY_THREADS, 2)
summary_kernel(const SummaryJob job, const Store store) {
  LSF_DYNAMIC_SHARED(double, shared);
  const Rows& rows = job.rows;
  const int64_t M = rows.logits.M, N = rows.logits.N, bins = job.bins;
  const Tally tally = open_tally(store, M, bins, shared);
  __syncthreads();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, lanes = rows.lanes;
  const int per_warp = 32 / lanes;
  const bool leads = lane % lanes == 0;
  for (int64_t begin = (int64_t(blockIdx.x) * SUMMARY_WARPS + warp) * per_warp; begin < N;
       begin += int64_t(gridDim.x) * SUMMARY_WARPS * per_warp) {
    const Example example(job, begin + lane / lanes);
    const auto total = [&](float x) { return over_groups(example.used ? x : 0.0f, lanes); };
    const Row first(rows, 0, example.n);
    int target = -1;  // which of this lane's values is that of the target
#pragma unroll
    for (int v = 0; v < V; ++v) target = class_at(first, v) == example.target ? v : target;
    float x[V], mean[V] = {}, of_target = first.at(example.target);
    double entropies = 0;
    LogMean ln_mixture;
    load_row(first, x);
#pragma unroll 1
    for (int64_t m = 0; m < M; ++m) {
      const Row row(rows, m, example.n);
      const Best best = largest(row, x);
      const float from = best.value == -INFINITY ? 0.0f : best.value, d = of_target - from;
      float y[V];
      ClassSums<float> sums;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        y[v] = exp_quick(x[v] - from);
        sums.add(y[v], x[v] - from, v == target);
      }
      if (m + 1 < M) {
        const Row next(rows, m + 1, example.n);
        load_row(next, x);
        of_target = next.at(example.target);
      }
      const Scores scores(sums.over_group(lanes), d);
#pragma unroll
      for (int v = 0; v < V; ++v) mean[v] += y[v] * scores.scale;
      entropies += scores.entropy;
      ln_mixture.add(scores.ln_p);
      int label = best.index;
      if (__any_sync(WHOLE_WARP, scores.is_nan())) {
        const int with_nan = first_largest(row);
        label = scores.is_nan() ? with_nan : label;
      }
      const bool correct = label == example.target;
      if (leads && example.used) tally.grade(m, bins, correct, scores.scale);
      const float hits = total(correct), nll = total(-scores.ln_p), brier = total(scores.brier);
      tally.add(m, by_lane(hits, nll, brier, 0.0f));
    }
    ClassSums<float> own;
    float part = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] *= 1.0f / float(M);
      own.add(mean[v], 0.0f, v == target);
      part -= mean[v] * log2_of(mean[v]);
    }
    const ClassSums<double> sums = own.over_group(lanes);
    const double entropy = 0.6931471805599453 * group_sum(double(part), lanes);
    const Best best = largest(first, mean);
    const bool is_nan = entropy != entropy;  // then all averaged probabilities are
    double information = entropy - entropies / double(M);
    const bool close = example.used && information < double(CLOSE);
    if (__any_sync(WHOLE_WARP, close)) {
      const double accurate = information_of(rows, example.n, mean);
      information = close ? accurate : information;
    }
    const bool correct = (is_nan ? 0 : best.index) == example.target;
    if (leads && example.used) tally.grade(M, bins, correct, is_nan ? float(entropy) : best.value);
    const float hits = total(correct), nll = total(-ln_mixture.mean(M));
    const float brier = total(float(sums.squares + sums.rest * sums.rest));
    const float of_entropy = total(float(entropy));
    tally.add(M, by_lane(hits, nll, brier, of_entropy));
    const float of_information = total(float(information)), used = total(1.0f);
    tally.add(M + 1, by_lane(of_information, used, total(example.bad), 0.0f));
  }
  close_tally(store, M, bins, tally);
}

// The sum of what all blocks have added to quantity `q` of `entry`; all threads take part.
__device__ double sum_of_blocks(const Store& store, int64_t blocks, int64_t M, int64_t entry, int q,
                                double* scratch) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += SUMMARY_THREADS) {
    sum += store.blocks[(b * (M + 2) + entry) * SUMS + q];
  }
  return block_sum<SUMMARY_THREADS>(sum, scratch);
}

constexpr int SCORE_SUMS = 3;  // CORRECT, NLL, BRIER: before the bins among the sums of the caller

// Block m makes the scores of member m, and block M those of the averaged probabilities; also the
// sums of the caller (see api.h), unless `kept` is null.
__global__ void __launch_bounds__(SUMMARY_THREADS)
summary_scores_kernel(const Store store, int64_t blocks, int64_t M, int64_t bins,
                      float* __restrict__ members, float* __restrict__ ensemble,
                      int64_t* __restrict__ bad, double* __restrict__ kept) {
  LSF_SHARED(double, scratch, SUMMARY_WARPS);
  const int64_t entry = blockIdx.x;
  double sums[SUMS], totals[SUMS - 1];
  for (int q = 0; q < SUMS; ++q) sums[q] = sum_of_blocks(store, blocks, M, entry, q, scratch);
  for (int q = 0; q < SUMS - 1; ++q) {
    totals[q] = sum_of_blocks(store, blocks, M, M + 1, q, scratch);
  }
  const double examples = totals[EXAMPLES];
  const double poison = totals[BAD] > 0 ? double(NAN) : 0.0;
  const double nowhere = sums[BRIER] - sums[BRIER];  // NaN where a confidence was: in the last bin
  double* const of_entry = kept ? kept + entry * (SCORE_SUMS + bins) : nullptr;
  double gap = 0;
  for (int64_t b = threadIdx.x; b < bins; b += SUMMARY_THREADS) {
    const double of_bin = double((long long)(store.gaps[entry * bins + b])) / GAP_UNIT;
    gap += fabs(of_bin);
    if (kept) of_entry[SCORE_SUMS + b] = of_bin + poison + (b == bins - 1 ? nowhere : 0);
  }
  gap = block_sum<SUMMARY_THREADS>(gap, scratch);
  if (threadIdx.x > 0) return;
  float* const out = entry < M ? members + entry : ensemble;
  const int64_t stride = entry < M ? M : 1;
  out[0] = float(sums[CORRECT] / examples + poison);
  out[stride] = float(sums[NLL] / examples + poison);
  out[2 * stride] = float(sums[BRIER] / examples + poison);
  out[3 * stride] = float(gap / examples + poison + nowhere);
  for (int q = 0; kept && q < SCORE_SUMS; ++q) of_entry[q] = sums[q] + poison;
  if (entry < M) return;
  ensemble[4] = float(sums[ENTROPY] / examples);
  ensemble[5] = float(totals[INFORMATION] / examples);
  *bad = int64_t(totals[BAD]);
  if (!kept) return;
  double* const last = of_entry + SCORE_SUMS + bins;
  last[0] = examples;
  last[1] = sums[ENTROPY];
  last[2] = totals[INFORMATION];
}

constexpr int64_t SHARED_BYTES = 40 * 1024;  // of a block, so that four fit on an SM

struct Plan {
  int64_t blocks, gaps, of_blocks, of_warps, of_members;  // the last four in bytes
  bool held, warps_shared, gaps_shared;

  Plan(int64_t M, int64_t N, int64_t C, int64_t bins) {
    held = C <= 32 * HELD;
    const int64_t examples = held ? SUMMARY_WARPS * (32 / lanes_per_row(C)) : 1;
    blocks = std::min(ceil_div(N, examples), SUMMARY_BLOCKS);
    gaps = ceil_div((M + 1) * bins * 8, 256) * 256;
    of_blocks = blocks * (M + 2) * SUMS * 8;
    const int64_t warps = SUMMARY_WARPS * (M + 2) * SUMS * 8;
    warps_shared = warps <= SHARED_BYTES;
    gaps_shared = gaps + (warps_shared ? warps : 0) <= SHARED_BYTES;
    of_warps = warps_shared ? 0 : blocks * warps;
    of_members = held ? 0 : blocks * M * 16;
    shared = (warps_shared ? warps : 0) + (gaps_shared ? gaps : 0);
  }
  int64_t shared;  // bytes
};

void launch(const SummaryJob& job, const Store& store, const Plan& plan, void* stream) {
  if (plan.held) {
    const auto kernel = job.rows.logits.C <= 32 * BATCH ? summary_kernel<BATCH>
                                                        : summary_kernel<HELD>;
    LSF_LAUNCH(kernel, dim3(unsigned(plan.blocks), 1, 1), dim3(SUMMARY_THREADS, 1, 1),
               size_t(plan.shared), stream, job, store);
  } else {
    launch_long_summary(job, store, plan.blocks, size_t(plan.shared), stream);
  }
}

}  // namespace

int64_t ensemble_summary_cuda_workspace(int64_t M, int64_t N, int64_t C, int64_t bins) {
  const Plan plan(M, N, C, bins);
  return plan.gaps + plan.of_blocks + plan.of_warps + plan.of_members;
}

int ensemble_summary_cuda(const Logits& logits, const int64_t* targets, int64_t bins,
                          int64_t ignore_index, void* workspace, float* members, float* ensemble,
                          int64_t* bad, double* sums, void* stream) {
  if (logits.M < 1 || logits.C < 1 || logits.C > MOST_CLASSES || bins < 1 || bins > INT_MAX) {
    return int(cudaErrorInvalidValue);
  }
  const Plan plan(logits.M, logits.N, logits.C, bins);
  const SummaryJob job{rows_of(logits), targets, bins, ignore_index};
  auto* const at = static_cast<char*>(workspace);
  Store store;
  store.gaps = reinterpret_cast<unsigned long long*>(at);
  store.blocks = reinterpret_cast<double*>(at + plan.gaps);
  store.warps = reinterpret_cast<double*>(at + plan.gaps + plan.of_blocks);
  store.members = reinterpret_cast<float4*>(at + plan.gaps + plan.of_blocks + plan.of_warps);
  store.warps_shared = plan.warps_shared;
  store.gaps_shared = plan.gaps_shared;
  const cudaError_t cleared =
      cudaMemsetAsync(store.gaps, 0, size_t(plan.gaps), static_cast<cudaStream_t>(stream));
  if (cleared != cudaSuccess) return int(cleared);
  if (plan.blocks > 0) launch(job, store, plan, stream);
  LSF_LAUNCH(summary_scores_kernel, dim3(unsigned(logits.M + 1), 1, 1),
             dim3(SUMMARY_THREADS, 1, 1), 0, stream, store, plan.blocks, logits.M, bins, members,
             ensemble, bad, sums);
  return int(cudaGetLastError());
}

}  // namespace landscape_fast
