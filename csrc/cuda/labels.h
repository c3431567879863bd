// Predicted classes of logits, for the kernels that compare them.
#pragma once

#include "api.h"

namespace landscape_fast {

// labels [M, N]: the first largest class of every row, NaN being the largest. A cudaError_t as int.
int labels_of_logits_cuda(const Logits& logits, int32_t* labels, void* stream);

}  // namespace landscape_fast
