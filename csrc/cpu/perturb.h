// What perturb.cpp and perturb_simd.cpp know of one another: one tile of the elements, all members.
#pragma once

#include <cstdint>

#include "../api.h"

namespace landscape_fast {

struct PerturbJob {
  const Perturbation& draw;
  const float* weights;
  int64_t weights_stride_m;
  float* y;  // [M, P]
};

struct PerturbBackwardJob {
  const Perturbation& draw;
  const float* dy;
  int64_t dy_stride_m;
  float* dweights;  // null: not wanted; [P] where one for all members
  bool dweights_shared;
  float* dsigma;
  bool dsigma_shared;
  double* parts;  // [tiles, M], null: not wanted
};

#define LSF_PERTURB_ENTRY_POINTS(ISA)                                     \
  namespace ISA {                                                         \
  void perturb_tile(const PerturbJob& job, int64_t tile);                 \
  void perturb_backward_tile(const PerturbBackwardJob& job, int64_t tile); \
  }

LSF_PERTURB_ENTRY_POINTS(baseline)
#ifdef LSF_X86_VARIANTS
LSF_PERTURB_ENTRY_POINTS(avx2)
LSF_PERTURB_ENTRY_POINTS(avx512)
#endif

}  // namespace landscape_fast
