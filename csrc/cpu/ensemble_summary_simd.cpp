// Accuracy, NLL, Brier score, calibration and uncertainty of one chunk of examples, in one read of
// the logits; compiled once per instruction set.
#include "blocks.h"

namespace landscape_fast {
namespace {

struct Scratch {
  float* x;       // [length], the logits of one member
  float* p;       // [M, length], probabilities
  float* mean;    // [length], their mean
  float* p_ln_p;  // [length], mean of p log2 p
  float* target;  // [M, MOST_EXAMPLES], ln of the probability of the target
};

Scratch carve(const SummaryJob& job, void* scratch) {
  const int64_t length = blocks_of(job.logits).length;
  float* x = static_cast<float*>(scratch);
  float* mean = x + (job.logits.M + 1) * length;
  return {x, x + length, mean, mean + length, mean + 2 * length};
}

// One block of examples: those to use, and where in a block their targets stand.
struct Examples {
  int count;  // E of the block, including those not used
  bool use[MOST_EXAMPLES];
  int32_t y[MOST_EXAMPLES];
  int used;
};

Examples examples_of(const SummaryJob& job, const Blocks& blocks, int64_t n) {
  Examples all;
  all.count = int(blocks.examples);
  all.used = 0;
  for (int e = 0; e < MOST_EXAMPLES; ++e) {
    const bool inside = e < all.count && n + e < job.logits.N;
    all.use[e] = inside && job.targets[n + e] != job.ignore_index;
    all.y[e] = all.use[e] ? int32_t(job.targets[n + e]) : 0;
    all.used += all.use[e];
  }
  return all;
}

// Correct answers and calibration: adds to `bins` sums of (correct - confidence) and to the totals.
void grade(const Examples& all, const int32_t* label, const float* confidence, int64_t bins,
           double* histogram, double* totals) {
  int32_t bin[MOST_EXAMPLES];
#pragma omp simd
  for (int e = 0; e < MOST_EXAMPLES; ++e) bin[e] = calibration_bin(confidence[e], int32_t(bins));
  for (int e = 0; e < all.count; ++e) {
    if (!all.use[e]) continue;
    const double correct = label[e] == all.y[e];
    histogram[bin[e]] += correct - double(confidence[e]);
    totals[CORRECT] += correct;
  }
}

// sum (p - [c is the target])^2 over a block
double brier(const Examples& all, int64_t length, float* p) {
  float kept[MOST_EXAMPLES];
  for (int e = 0; e < all.count; ++e) {
    float& at = p[int64_t(all.y[e]) * all.count + e];
    kept[e] = at;
    at -= all.use[e] ? 1.0f : 0.0f;
  }
  const double sum = sum_of(length, [=](int64_t k) { return p[k] * p[k]; });
  for (int e = 0; e < all.count; ++e) p[int64_t(all.y[e]) * all.count + e] = kept[e];
  return sum;
}

// Everything about one member; leaves its probabilities in at.p, and adds to at.mean and at.p_ln_p.
void member(const SummaryJob& job, const Blocks& blocks, const Examples& all, int64_t n,
              int64_t m, const Scratch& at, double* out) {
  const Logits& L = job.logits;
  const int64_t length = blocks.length;
  float *x = at.x, *p = at.p + m * length, *mean = at.mean, *p_ln_p = at.p_ln_p;
  double* totals = out + job.bins;
  int32_t label[MOST_EXAMPLES];
  Rows rows = {};
  const int64_t valid = L.N - n < blocks.examples ? L.N - n : blocks.examples;
  load(L, m, n, valid, all.use, blocks, x);
  first_largest(blocks, x, L.C, label);
  softmax(L, blocks, all.use, x, p, rows);
  grade(all, label, rows.scale, job.bins, out, totals);
  double nll = 0;
  for (int e = 0; e < all.count; ++e) {
    const double ln_p = double(x[int64_t(all.y[e]) * all.count + e]) - rows.log_sum[e];
    at.target[m * MOST_EXAMPLES + e] = float(ln_p);
    nll -= all.use[e] ? ln_p : 0.0;
  }
  totals[NLL] += nll;
  totals[BRIER] += brier(all, length, p);
#pragma omp simd
  for (int64_t k = 0; k < length; ++k) {
    mean[k] = (m == 0 ? 0.0f : mean[k]) + p[k];
    p_ln_p[k] = (m == 0 ? 0.0f : p_ln_p[k]) + p[k] * log2_of(p[k]);
  }
}

// NLL of the averaged probabilities, from the members' ln p: finite where every p underflows.
double mixture_nll(const Examples& all, int64_t M, const float* target) {
  float top[MOST_EXAMPLES], sum[MOST_EXAMPLES];
  const int E = all.count == 1 ? 1 : MOST_EXAMPLES;
  for (int e = 0; e < E; ++e) top[e] = -INFINITY, sum[e] = 0;
  for (int64_t m = 0; m < M; ++m) {
    const float* row = target + m * MOST_EXAMPLES;
#pragma omp simd
    for (int e = 0; e < E; ++e) top[e] = row[e] > top[e] ? row[e] : top[e];
  }
  for (int e = 0; e < E; ++e) top[e] = top[e] == -INFINITY ? 0.0f : top[e];
  for (int64_t m = 0; m < M; ++m) {
    const float* row = target + m * MOST_EXAMPLES;
#pragma omp simd
    for (int e = 0; e < E; ++e) sum[e] += exp_of(row[e] - top[e]);
  }
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int e = 0; e < E; ++e) {
    total -= all.use[e] ? double(top[e]) + ln_of(sum[e] / float(M)) : 0.0;
  }
  return total;
}

}  // namespace

namespace LSF_ISA {

int64_t summary_scratch(const SummaryJob& job) {
  const int64_t M = job.logits.M, length = blocks_of(job.logits).length;
  return int64_t(sizeof(float)) * ((M + 3) * length + M * MOST_EXAMPLES);
}

void summary_chunk(const SummaryJob& job, Chunk chunk, void* scratch, double* out) {
  const int64_t M = job.logits.M, C = job.logits.C, width = job.bins + SUMS;
  const Blocks blocks = blocks_of(job.logits);
  const int64_t length = blocks.length;
  const Scratch at = carve(job, scratch);
  float *mean = at.mean, *p_ln_p = at.p_ln_p;
  double *histogram = out + M * width, *totals = histogram + job.bins;
  for (int64_t block = chunk.first; block < chunk.last; ++block) {
    const int64_t n = block * blocks.examples;
    const Examples all = examples_of(job, blocks, n);
    if (all.used == 0) continue;
    for (int64_t m = 0; m < M; ++m) member(job, blocks, all, n, m, at, out + m * width);
    const float members = float(M);  // a divisor: the error of 1 / M would be in all, and stay
#pragma omp simd
    for (int64_t k = 0; k < length; ++k) mean[k] /= members, p_ln_p[k] /= members;
    int32_t label[MOST_EXAMPLES];
    float confidence[MOST_EXAMPLES] = {};
    first_largest(blocks, mean, C, label);
    for (int e = 0; e < all.count; ++e) confidence[e] = mean[int64_t(label[e]) * all.count + e];
    grade(all, label, confidence, job.bins, histogram, totals);
    totals[NLL] += mixture_nll(all, M, at.target);
    totals[BRIER] += brier(all, length, mean);
    totals[ENTROPY] -= double(LN2) * sum_of(length, [=](int64_t k) {
      return mean[k] * log2_of(mean[k]);
    });
    double information = double(LN2) * sum_of(length, [=](int64_t k) {
      return p_ln_p[k] - mean[k] * log2_of(mean[k]);
    });
    if (information < CLOSE * double(all.used)) {
      information = 0;
      for (int64_t m = 0; m < M; ++m) {
        const float* p = at.p + m * length;
        information += sum_of(length, [=](int64_t k) { return kl_term(p[k], mean[k]); });
      }
      information /= double(M);
    }
    totals[INFORMATION] += information;
    totals[EXAMPLES] += all.used;
  }
}

}  // namespace LSF_ISA
}  // namespace landscape_fast
