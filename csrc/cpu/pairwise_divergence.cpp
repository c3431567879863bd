// Pairwise divergences of M members: chunks of examples on threads, summed in a fixed order.
#include "isa.h"
#include "parallel.h"
#include "variants.h"

namespace landscape_fast {
namespace {

void labels_of(const Logits& logits, int32_t* labels, int threads) {
  const Isa which = isa();
  const int64_t blocks = blocks_of(logits).count, chunks = chunk_count(blocks, 1);
  threads = fewer(threads, chunks);
  const Scratch scratch(LSF_VARIANT(which, divergence_scratch)(logits), threads);
  in_parallel(chunks, threads, [&](int64_t index, int thread) {
    LSF_VARIANT(which, label_chunk)
    (logits, chunk_of(index, chunks, blocks), scratch.of(thread), labels);
  });
}

}  // namespace

const char* cpu_isa() { return isa_name(isa()); }

void pairwise_divergence(const Logits& logits, Divergence kind, float* out, double* sums,
                         int threads) {
  const int64_t M = logits.M, N = logits.N;
  if (M * N * logits.C < ALONE) threads = 1;
  if (kind == Divergence::disagreement) {
    const auto labels = zeros<int32_t>(M * N);
    labels_of(logits, labels.get(), threads);
    pairwise_disagreement({labels.get(), 4, M, N, N, 1}, out, sums, threads);
    return;
  }
  const Isa which = isa();
  const int64_t blocks = blocks_of(logits).count, chunks = chunk_count(blocks, M * M);
  threads = fewer(threads, chunks);
  const Scratch scratch(LSF_VARIANT(which, divergence_scratch)(logits), threads);
  const auto partial = zeros<double>(chunks * M * M);
  in_parallel(chunks, threads, [&](int64_t index, int thread) {
    LSF_VARIANT(which, divergence_chunk)
    (logits, kind, chunk_of(index, chunks, blocks), scratch.of(thread),
     partial.get() + index * M * M);
  });
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < M; ++j) {
      const bool mirrored = kind == Divergence::js && j < i;
      const double* from = partial.get() + (mirrored ? j * M + i : i * M + j);
      double total = 0;
      for (int64_t index = 0; index < chunks; ++index) total += from[index * M * M];
      out[i * M + j] = float(total / double(N));
      if (sums != nullptr) sums[i * M + j] = total;
    }
  }
}

void pairwise_disagreement(const Labels& labels, float* out, double* sums, int threads) {
  const int64_t M = labels.M, N = labels.N;
  const int64_t examples = 256;  // of a chunk: a dozen members of int64 labels stay in the L1 cache
  const int64_t chunks = (N + examples - 1) / examples;
  threads = M * M * N < 2 * ALONE ? 1 : fewer(threads, chunks);
  const Isa which = isa();
  const auto same = zeros<int64_t>(threads * M * M);  // counts, so the order does not matter
  in_parallel(chunks, threads, [&](int64_t index, int thread) {
    const int64_t first = index * examples, last = first + examples < N ? first + examples : N;
    LSF_VARIANT(which, agreement_chunk)(labels, first, last, same.get() + thread * M * M);
  });
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = i; j < M; ++j) {
      int64_t total = i == j ? N : 0;
      for (int thread = 0; thread < threads; ++thread) total += same[(thread * M + i) * M + j];
      const double different = double(N - total);
      out[i * M + j] = out[j * M + i] = float(different / double(N));
      if (sums != nullptr) sums[i * M + j] = sums[j * M + i] = different;
    }
  }
}

}  // namespace landscape_fast
