// Summary of M members: chunks of examples on threads, summed in a fixed order.
#include <cmath>

#include "isa.h"
#include "parallel.h"
#include "variants.h"

namespace landscape_fast {
namespace {

// The first target that is neither a class nor ignore_index, or -1.
int64_t first_bad(const SummaryJob& job) {
  const int64_t N = job.logits.N, C = job.logits.C;
  int64_t bad = 0;
#pragma omp simd reduction(+ : bad)
  for (int64_t n = 0; n < N; ++n) {
    bad += (job.targets[n] < 0 || job.targets[n] >= C) && job.targets[n] != job.ignore_index;
  }
  if (bad == 0) return -1;
  int64_t n = 0;
  while ((job.targets[n] >= 0 && job.targets[n] < C) || job.targets[n] == job.ignore_index) ++n;
  return n;
}

// Four scores, `stride` apart, from `bins` sums of (correct - confidence) followed by totals.
void scores(const double* sums, int64_t bins, double examples, int64_t stride, float* out) {
  const double* totals = sums + bins;
  double gap = 0;
  for (int64_t b = 0; b < bins; ++b) gap += std::fabs(sums[b]);
  out[0] = float(totals[CORRECT] / examples);
  out[stride] = float(totals[NLL] / examples);
  out[2 * stride] = float(totals[BRIER] / examples);
  out[3 * stride] = float(gap / examples);
}

// What went into those scores, in the order of api.h; returns where the next row goes.
double* row_of_sums(const double* sums, int64_t bins, double* out) {
  const double* totals = sums + bins;
  for (Sum which : {CORRECT, NLL, BRIER}) *out++ = totals[which];
  for (int64_t b = 0; b < bins; ++b) *out++ = sums[b];
  return out;
}

}  // namespace

int64_t ensemble_summary(const Logits& logits, const int64_t* targets, int64_t bins,
                         int64_t ignore_index, float* members, float* ensemble, double* sums,
                         int threads) {
  const SummaryJob job = {logits, targets, bins, ignore_index};
  const int64_t bad = first_bad(job);
  if (bad >= 0) return bad;
  const Isa which = isa();
  const int64_t M = logits.M, width = bins + SUMS, size = (M + 1) * width;
  const int64_t blocks = blocks_of(logits).count, chunks = chunk_count(blocks, size);
  threads = M * logits.N * logits.C < ALONE ? 1 : fewer(threads, chunks);
  const Scratch scratch(LSF_VARIANT(which, summary_scratch)(job), threads);
  const auto partial = zeros<double>((chunks + 1) * size);
  in_parallel(chunks, threads, [&](int64_t index, int thread) {
    LSF_VARIANT(which, summary_chunk)
    (job, chunk_of(index, chunks, blocks), scratch.of(thread), partial.get() + index * size);
  });
  double* all = partial.get() + chunks * size;
  for (int64_t index = 0; index < chunks; ++index) {
    for (int64_t k = 0; k < size; ++k) all[k] += partial[index * size + k];
  }
  const double* totals = all + M * width + bins;
  const double examples = totals[EXAMPLES];
  for (int64_t m = 0; m < M; ++m) scores(all + m * width, bins, examples, M, members + m);
  scores(all + M * width, bins, examples, 1, ensemble);
  ensemble[4] = float(totals[ENTROPY] / examples);
  ensemble[5] = float(totals[INFORMATION] / examples);
  if (sums == nullptr) return -1;
  for (int64_t m = 0; m <= M; ++m) sums = row_of_sums(all + m * width, bins, sums);
  for (Sum which : {EXAMPLES, ENTROPY, INFORMATION}) *sums++ = totals[which];
  return -1;
}

}  // namespace landscape_fast
