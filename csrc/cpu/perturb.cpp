// Perturbed weights of M models: tiles of the elements on threads.
#include "perturb.h"

#include "isa.h"
#include "parallel.h"
#include "variants.h"

namespace landscape_fast {
namespace {

template <class Task>
void over_tiles(const Perturbation& draw, int threads, Task task) {
  const int64_t tiles = perturb_tiles(draw.P);
  threads = draw.M * draw.P < ALONE ? 1 : fewer(threads, tiles);
  in_parallel(tiles, threads, [&](int64_t tile, int) { task(tile); });
}

}  // namespace

void perturb(const Perturbation& draw, const float* weights, int64_t weights_stride_m, float* y,
             int threads) {
  const Isa which = isa();
  const PerturbJob job{draw, weights, weights_stride_m, y};
  over_tiles(draw, threads, [&](int64_t tile) { LSF_VARIANT(which, perturb_tile)(job, tile); });
}

void perturb_backward(const Perturbation& draw, const float* dy, int64_t dy_stride_m,
                      const PerturbGradients& out, int threads) {
  const Isa which = isa();
  const PerturbBackwardJob job{draw,
                               dy,
                               dy_stride_m,
                               static_cast<float*>(out.dweights),
                               out.dweights_shared,
                               static_cast<float*>(out.dsigma),
                               out.dsigma_shared,
                               static_cast<double*>(out.parts)};
  over_tiles(draw, threads,
             [&](int64_t tile) { LSF_VARIANT(which, perturb_backward_tile)(job, tile); });
}

}  // namespace landscape_fast
