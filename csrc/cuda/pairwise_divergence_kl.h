// KL of many members on the tensor cores: pairwise_divergence_kl.cu.
#pragma once

#include "api.h"

namespace landscape_fast {

// Whether KL of M members of C classes goes there.
bool pairwise_kl_is_for(int64_t M, int64_t C);

// As pairwise_divergence_cuda for KL.
int64_t pairwise_kl_cuda_workspace(int64_t M, int64_t N, int64_t C);
int pairwise_kl_cuda(const Logits& logits, void* workspace, float* out, double* sums, void* stream);

}  // namespace landscape_fast
