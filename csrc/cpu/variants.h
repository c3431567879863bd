// What the files that choose and the files compiled once per instruction set know of one another:
// how logits are cut into blocks and chunks, and the entry points that exist once per set.
#pragma once

#include <cstdint>

#include "../api.h"

namespace landscape_fast {

// Examples come in blocks of `examples`, classes outermost: element (c, e) of a block at
// c * examples + e, so that vectors run along examples where classes are few, and along the classes
// of one example where they are many. A block is padded with zero probabilities to `length`.
// Measured on a Zen 5, 10 classes: interleaved blocks are 5 to 7 times faster than rows.
// (Free functions: an inline member compiled for AVX-512 might be the copy that the linker keeps.)
struct Blocks {
  int64_t examples, length, count;
};

static inline Blocks blocks_of(const Logits& logits) {
  const int64_t examples = logits.C < 64 ? 32 : 1;
  const int64_t length = (logits.C * examples + 15) / 16 * 16;
  return {examples, length, (logits.N + examples - 1) / examples};
}

// Blocks [first, last) of one of `count` chunks. Chunks do not depend on the number of threads, and
// their sums are added in their order: so neither does the result.
struct Chunk {
  int64_t first, last;
};

static inline Chunk chunk_of(int64_t index, int64_t count, int64_t blocks) {
  return {blocks * index / count, blocks * (index + 1) / count};
}

struct SummaryJob {
  Logits logits;
  const int64_t* targets;
  int64_t bins, ignore_index;
};

// Sums of one chunk, in this order: for each member, then for the averaged probabilities, `bins`
// sums of (correct - confidence), and SUMS totals.
enum Sum { CORRECT, NLL, BRIER, ENTROPY, INFORMATION, EXAMPLES, SUMS };

#define LSF_ENTRY_POINTS(ISA)                                                                     \
  namespace ISA {                                                                                 \
  /* Bytes of scratch that one thread needs, and the sum over a chunk into out [M, M] (upper      \
     triangle and diagonal for JS). */                                                            \
  int64_t divergence_scratch(const Logits& logits);                                               \
  void divergence_chunk(const Logits& logits, Divergence kind, Chunk chunk, void* scratch,        \
                        double* out);                                                             \
  /* First largest class of each example of every member, into labels [M, N]. */                  \
  void label_chunk(const Logits& logits, Chunk chunk, void* scratch, int32_t* labels);            \
  /* Adds, for i < j, how many examples of [first, last) members agree on, to out [M, M]. */      \
  void agreement_chunk(const Labels& labels, int64_t first, int64_t last, int64_t* out);          \
  int64_t summary_scratch(const SummaryJob& job);                                                 \
  void summary_chunk(const SummaryJob& job, Chunk chunk, void* scratch, double* out);             \
  }

LSF_ENTRY_POINTS(baseline)
#ifdef LSF_X86_VARIANTS
LSF_ENTRY_POINTS(avx2)
LSF_ENTRY_POINTS(avx512)
#define LSF_VARIANT(isa, function)                   \
  ((isa) == Isa::avx512   ? avx512::function         \
   : (isa) == Isa::avx2   ? avx2::function           \
                          : baseline::function)
#else
#define LSF_VARIANT(isa, function) ((void)(isa), baseline::function)
#endif

}  // namespace landscape_fast
