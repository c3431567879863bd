// What the file that cuts gram into tasks and the one compiled once per instruction set know of one
// another.
#pragma once

#include <cstdint>

#include "../api.h"

namespace landscape_fast {

#define LSF_GRAM_ENTRY_POINTS(ISA)                                                             \
  namespace ISA {                                                                              \
  /* Adds elements [first, last) of the part to out [K, K]: the upper triangle and diagonal. */ \
  void gram_task(const GramPart& part, int64_t K, int64_t first, int64_t last, double* out);   \
  }

LSF_GRAM_ENTRY_POINTS(baseline)
#ifdef LSF_X86_VARIANTS
LSF_GRAM_ENTRY_POINTS(avx2)
LSF_GRAM_ENTRY_POINTS(avx512)
#endif

}  // namespace landscape_fast
