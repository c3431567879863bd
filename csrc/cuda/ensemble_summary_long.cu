// ensemble_summary for rows too long for registers: a block takes an example. Each warp reads the
// rows of some members for their scores; then all threads run along the classes and read them again
// for the averaged probabilities.
#include "cuda/summary.h"

namespace landscape_fast {
namespace {

// What the sums become when what the logits are taken relative to grows by -shift; `whole` is the
// sum with the target.
__device__ __forceinline__ void rescale(ClassSums<float>& s, float& whole, float shift) {
  const float scale = exp_quick(shift);
  s.weighted = scale * s.weighted + times_log(scale, shift) * whole;
  s.rest *= scale;
  s.squares *= scale * scale;
  whole *= scale;
}

// Scores of one row by a warp, in all its lanes; `from` is what the logits are taken relative to.
__device__ __forceinline__ Scores score_row(const Row& row, int target, float& from, int& label) {
  float top = -INFINITY, whole = 0;
  Best best{-INFINITY, row.class_of(0, 0)};
  ClassSums<float> sums;
  for (int base = 0; base < row.C; base += row.step()) {
    float x[BATCH];
    row.load(base, x);
    float highest = top;
#pragma unroll
    for (int v = 0; v < BATCH; ++v) {
      best.offer(x[v], row.class_of(base, v));
      highest = x[v] > highest ? x[v] : highest;
    }
    if (highest > top && top > -INFINITY) rescale(sums, whole, top - highest);
    top = highest;
    from = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int v = 0; v < BATCH; ++v) {
      const float d = x[v] - from;
      const float y = exp_quick(d);
      whole += y;
      sums.add(y, d, row.class_of(base, v) == target);
    }
  }
  best = group_best(best, 32);
  label = best.index;
  from = best.value == -INFINITY ? 0.0f : best.value;
  if (top > -INFINITY) rescale(sums, whole, top - from);
  return Scores(sums.over_group(32), row.at(target) - from);
}

// Sums over the block's classes of one number for each thread, and the best of all.
struct BlockScratch {
  double sums[SUMMARY_WARPS];
  float value[SUMMARY_WARPS];
  int index[SUMMARY_WARPS];
};

__device__ __forceinline__ Best block_best(Best best, BlockScratch* scratch) {
  best = group_best(best, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch->value[threadIdx.x / 32] = best.value;
    scratch->index[threadIdx.x / 32] = best.index;
  }
  __syncthreads();
  const int w = int(threadIdx.x) % SUMMARY_WARPS;
  return group_best({scratch->value[w], scratch->index[w]}, SUMMARY_WARPS);
}

__global__ void __launch_bounds__(SUMMARY_THREADS, 3)
long_summary_kernel(const SummaryJob job, const Store store) {
  LSF_DYNAMIC_SHARED(double, shared);
  LSF_SHARED(BlockScratch, scratch, 1);
  const Rows& rows = job.rows;
  const int64_t M = rows.logits.M, bins = job.bins;
  const int C = int(rows.logits.C), warp = int(threadIdx.x) / 32;
  const bool leads = threadIdx.x % 32 == 0;
  const Tally tally = open_tally(store, M, bins, shared);
  float4* const members = store.members + blockIdx.x * M;  // from, scale, ln p of target, entropy
  for (int64_t n = blockIdx.x; n < rows.logits.N; n += gridDim.x) {
    const Example example(job, n);
    if (!example.used) continue;  // the same for the whole block
    __syncthreads();              // the tally is empty; `members` has been read
    for (int64_t m = warp; m < M; m += SUMMARY_WARPS) {
      float from = 0;
      int label;
      const Scores scores = score_row(Row(rows, m, n), example.target, from, label);
      const bool correct = label == example.target;
      if (leads) {
        members[m] = make_float4(from, scores.scale, scores.ln_p, float(scores.entropy));
        tally.grade(m, bins, correct, scores.scale);
      }
      tally.add(m, by_lane(float(correct), -scores.ln_p, scores.brier, 0.0f));
    }
    __syncthreads();
    const auto averaged = [&](int c) {
      float p = 0;
      for (int64_t m = 0; m < M; ++m) {
        p += exp_quick(Row(rows, m, n).at(c) - members[m].x) * members[m].y;
      }
      return p / float(M);
    };
    Best best{-INFINITY, int(threadIdx.x)};
    double rest = 0, squares = 0, entropy = 0, entropies = 0;
    for (int c = int(threadIdx.x); c < C; c += SUMMARY_THREADS) {
      const float p = averaged(c);
      best.offer(p, c);
      rest += c == example.target ? 0.0 : double(p);
      squares += c == example.target ? 0.0 : double(p * p);
      entropy -= double(LN2 * (p * log2_of(p)));
    }
    for (int64_t m = threadIdx.x; m < M; m += SUMMARY_THREADS) entropies += double(members[m].w);
    best = block_best(best, scratch);
    const auto over_block = [&](double x) { return block_sum<SUMMARY_THREADS>(x, scratch->sums); };
    rest = over_block(rest);
    squares = over_block(squares);
    entropy = over_block(entropy);
    double information = entropy - over_block(entropies) / double(M);
    if (information < double(CLOSE)) {  // the same for the whole block
      double terms = 0;
      for (int c = int(threadIdx.x); c < C; c += SUMMARY_THREADS) {
        const float mean = averaged(c);
        for (int64_t m = 0; m < M; ++m) {
          const float p = exp_of(Row(rows, m, n).at(c) - members[m].x) * members[m].y;
          terms += double(kl_term(p, mean));
        }
      }
      information = over_block(terms) / double(M);
    }
    if (warp > 0) continue;
    LogMean ln_mixture;
    for (int64_t m = 0; m < M; ++m) ln_mixture.add(members[m].z);
    const float nll = -ln_mixture.mean(M);
    const bool correct = best.index == example.target;
    if (leads) tally.grade(M, bins, correct, best.value);
    tally.add(M, by_lane(float(correct), nll, float(squares + rest * rest), float(entropy)));
    tally.add(M + 1, by_lane(float(information), 1.0f, float(example.bad), 0.0f));
  }
  close_tally(store, M, bins, tally);
}

}  // namespace

void launch_long_summary(const SummaryJob& job, const Store& store, int64_t blocks,
                         size_t shared_bytes, void* stream) {
  LSF_LAUNCH(long_summary_kernel, dim3(unsigned(blocks), 1, 1), dim3(SUMMARY_THREADS, 1, 1),
             shared_bytes, stream, job, store);
}

}  // namespace landscape_fast
