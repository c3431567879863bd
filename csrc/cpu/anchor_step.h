// What the file that cuts anchor_step into blocks and the one compiled once per instruction set
// know of one another.
#pragma once

#include <cstdint>

#include "../api.h"

namespace landscape_fast {

constexpr int64_t STEP_BLOCK = 512;  // elements: the rows of a few anchors stay in the L1 cache

// Elements [first, first + count) of P, which lie in one part.
struct StepBlock {
  int64_t part, first, count;
};

// The numbers of a rule, worked out once for all elements.
struct StepScalars {
  float lr;                           // of Adam: divided by 1 - beta1^step
  float decay;                        // 1 - lr * weight decay, where it is decoupled, else 1
  float momentum, fresh;              // share of the old buffer, and of the new direction
  float one_beta1, beta2, one_beta2;  // 1 - beta1, beta2, 1 - beta2
  float root, eps;                    // 1 / sqrt(1 - beta2^step)
};

#define LSF_STEP_ENTRY_POINTS(ISA)                                                               \
  namespace ISA {                                                                                \
  int64_t anchor_step_scratch(const AnchorStep& op);                                             \
  /* penalty [S, S] or [L, S, S], null for none; products [S, S] (upper triangle and diagonal)   \
     becomes those of the block, where it is not null. */                                        \
  void anchor_step_block(const AnchorStep& op, const StepScalars& by, const double* penalty,     \
                         const StepBlock& block, void* scratch, double* products);               \
  }

LSF_STEP_ENTRY_POINTS(baseline)
#ifdef LSF_X86_VARIANTS
LSF_STEP_ENTRY_POINTS(avx2)
LSF_STEP_ENTRY_POINTS(avx512)
#endif

}  // namespace landscape_fast
