// What the kernels of ensemble_summary share: the scores of one prediction, and where they are
// added.
#pragma once

#include "cuda/quick.h"
#include "cuda/rows.h"

namespace landscape_fast {

constexpr int SUMMARY_THREADS = 128;
constexpr int SUMMARY_WARPS = SUMMARY_THREADS / 32;
constexpr int64_t SUMMARY_BLOCKS = 528;  // at most: 4 on each of 132 SMs, each walks along N
constexpr double GAP_UNIT = 4294967296.0;  // of the calibration sums, whole numbers of 2^-32

// Sums of each member m, of the averaged probabilities (entry M), and of both together (entry M +
// 1).
enum Sum { CORRECT, NLL, BRIER, ENTROPY, SUMS };
enum TotalSum { INFORMATION, EXAMPLES, BAD };

struct SummaryJob {
  Rows rows;
  const int64_t* targets;
  int64_t bins, ignore_index;
};

// Where a block adds. Each warp has sums of its own, which its lane q alone adds to for quantity q:
// the order of additions is fixed. The calibration sums are integers, so that theirs does not
// matter.
struct Tally {
  double* sums;              // [M + 2, SUMS] of this warp
  unsigned long long* gaps;  // [M + 1, bins] of the block or of all

  // `x`: what lane q adds to quantity q of `entry`.
  __device__ __forceinline__ void add(int64_t entry, float x) const {
    const int lane = int(threadIdx.x) % 32;
    if (lane < SUMS) sums[entry * SUMS + lane] += double(x);
  }

  __device__ __forceinline__ void grade(int64_t entry, int64_t bins, bool correct,
                                        float confidence) const {
    if (confidence != confidence) return;  // the Brier score is NaN then, and tells
    const int bin = calibration_bin(confidence, int(bins));
    const double gap = (correct ? 1.0 : 0.0) - double(confidence);
    const auto units = (unsigned long long)(llrint(gap * GAP_UNIT));
    // As two words with a carry: in shared memory 64-bit additions are loops, 32-bit ones are not.
    auto* const words = reinterpret_cast<unsigned*>(gaps + entry * bins + bin);
    const auto low = unsigned(units), high = unsigned(units >> 32);
    const unsigned before = atomicAdd(words, low);
    atomicAdd(words + 1, high + unsigned(before + low < before));
  }
};

// Where sums go, in the workspace.
struct Store {
  unsigned long long* gaps;  // [M + 1, bins], zero before
  double* blocks;            // [blocks, M + 2, SUMS]
  double* warps;             // [blocks, WARPS, M + 2, SUMS] where shared memory is too small
  float4* members;           // [blocks, M], for long rows
  bool warps_shared, gaps_shared;
};

// The sums of this warp, all 0; a barrier is due before gaps are added to.
__device__ __forceinline__ Tally open_tally(const Store& store, int64_t M, int64_t bins,
                                            double* shared) {
  const int64_t width = (M + 2) * SUMS, all = SUMMARY_WARPS * width;
  double* const sums = store.warps_shared ? shared : store.warps + blockIdx.x * all;
  auto* gaps = reinterpret_cast<unsigned long long*>(shared + (store.warps_shared ? all : 0));
  for (int64_t i = threadIdx.x; i < all; i += SUMMARY_THREADS) sums[i] = 0;
  if (store.gaps_shared) {
    for (int64_t i = threadIdx.x; i < (M + 1) * bins; i += SUMMARY_THREADS) gaps[i] = 0;
  } else {
    gaps = store.gaps;
  }
  return {sums + threadIdx.x / 32 * width, gaps};
}

__device__ __forceinline__ void close_tally(const Store& store, int64_t M, int64_t bins,
                                            const Tally& tally) {
  const int64_t width = (M + 2) * SUMS;
  const double* const first = tally.sums - threadIdx.x / 32 * width;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < width; i += SUMMARY_THREADS) {
    double sum = 0;
    for (int w = 0; w < SUMMARY_WARPS; ++w) sum += first[w * width + i];
    store.blocks[blockIdx.x * width + i] = sum;
  }
  if (!store.gaps_shared) return;
  for (int64_t i = threadIdx.x; i < (M + 1) * bins; i += SUMMARY_THREADS) {
    if (tally.gaps[i]) atomicAdd(store.gaps + i, tally.gaps[i]);
  }
}

// The value for quantity `q` in lane q.
__device__ __forceinline__ float by_lane(float q0, float q1, float q2, float q3) {
  const int lane = int(threadIdx.x) % 32;
  return lane == 0 ? q0 : lane == 1 ? q1 : lane == 2 ? q2 : q3;
}

// The example of a group of lanes.
struct Example {
  int64_t n;
  int target;  // 0 where there is none
  bool used, bad;

  __device__ __forceinline__ Example(const SummaryJob& job, int64_t index) {
    const Logits& x = job.rows.logits;
    n = index < x.N ? index : x.N - 1;
    const int64_t t = job.targets[n];
    used = index < x.N && t != job.ignore_index;
    bad = used && (t < 0 || t >= x.C);
    target = used && !bad ? int(t) : 0;
  }
};

// Sums over the classes of one row with y = e^(x - from): of all but the target's y and y^2, and of
// all y ln y.
template <class T>
struct ClassSums {
  T rest = 0, squares = 0, weighted = 0;

  __device__ __forceinline__ void add(float y, float d, bool is_target) {
    weighted += y * fmaxf(d, -105.0f);  // 0 where y is 0; a NaN is still in y
    rest += is_target ? 0.0f : y;
    squares += is_target ? 0.0f : y * y;
  }
  // Of all lanes of a group. The last, largest sums are made in float64: mutual information is a
  // small difference of entropies.
  __device__ __forceinline__ ClassSums<double> over_group(int lanes) const {
    ClassSums<double> all;
    all.rest = group_sum(double(rest), lanes);
    all.squares = group_sum(double(squares), lanes);
    all.weighted = group_sum(double(weighted), lanes);
    return all;
  }
};

// The scores of one row.
struct Scores {
  float scale, ln_p, brier;  // 1 / sum of y: the largest probability; ln p of the target
  double entropy;            // of the probabilities that the rounded scale gives

  // `d`: x - from of the target.
  __device__ __forceinline__ Scores(const ClassSums<double>& s, float d) {
    const double sum = s.rest + double(exp_quick(d)), ln_sum = log(sum);
    scale = float(1 / sum);
    ln_p = float(double(d) - ln_sum);
    const double others = s.rest * double(scale), excess = double(scale) * sum - 1;
    brier = float(s.squares * double(scale) * double(scale) + others * others);
    entropy = ln_sum - s.weighted / sum;
    entropy += excess * (entropy - 1);
  }

  __device__ __forceinline__ bool is_nan() const { return scale != scale; }
};

// ln of the mean of e^l, one l after the other.
struct LogMean {
  float top = -INFINITY, sum = 0;

  __device__ __forceinline__ void add(float l) {
    if (l > top) {
      sum = sum * exp_of(top - l) + 1.0f;
      top = l;
    } else if (l != -INFINITY) {
      sum += exp_of(l - top);
    }
  }
  __device__ __forceinline__ float mean(int64_t count) const {
    return top + ln_of(sum / float(count));
  }
};

// For rows of any length: blocks of SUMMARY_THREADS, each with an example of its own. Launches
// only.
void launch_long_summary(const SummaryJob& job, const Store& store, int64_t blocks,
                         size_t shared_bytes, void* stream);

}  // namespace landscape_fast
