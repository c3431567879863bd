// One tile of perturb and of its gradients; compiled once per instruction set.
#include "perturb.h"

#include "../noise.h"

namespace landscape_fast {
namespace {

constexpr int64_t TILE = PERTURB_TILE, QUADS = TILE / WORDS;

// What is random about one tile of one member.
struct Draws {
  alignas(64) float normal[TILE];  // times the scale; 0 without noise
  alignas(64) float factor[TILE];  // 0 or 1 / (1 - dropout); 1 without dropout
};

// TILE numbers from the quads that begin with `first`.
void draw_normals(uint64_t seed, int64_t first, uint32_t member, float scale, float* out) {
#pragma omp simd
  for (int64_t k = 0; k < QUADS; ++k) {
    const Words w = words_of(seed, uint64_t(first + k), member, NORMALS);
    float a, b, c, d;
    normals_of(w.at[0], w.at[1], a, b);
    normals_of(w.at[2], w.at[3], c, d);
    out[WORDS * k] = a * scale;
    out[WORDS * k + 1] = b * scale;
    out[WORDS * k + 2] = c * scale;
    out[WORDS * k + 3] = d * scale;
  }
}

void draw_factors(uint64_t seed, int64_t first, uint32_t member, float dropout, float* out) {
  const float kept = 1.0f / (1.0f - dropout);
#pragma omp simd
  for (int64_t k = 0; k < QUADS; ++k) {
    const Words w = words_of(seed, uint64_t(first + k), member, UNIFORMS);
    out[WORDS * k] = stays(w.at[0], dropout) ? kept : 0.0f;
    out[WORDS * k + 1] = stays(w.at[1], dropout) ? kept : 0.0f;
    out[WORDS * k + 2] = stays(w.at[2], dropout) ? kept : 0.0f;
    out[WORDS * k + 3] = stays(w.at[3], dropout) ? kept : 0.0f;
  }
}

uint64_t seed_of(const Perturbation& draw) {
  return draw.seeds ? uint64_t(*draw.seeds) : draw.seed;
}

float scale_of(const Perturbation& draw, int64_t m) {
  return draw.scales ? draw.scales[m] : draw.scale;
}

void draw_noise(const Perturbation& draw, int64_t tile, int64_t m, float scale, Draws& to) {
  if (!has_noise(draw)) return;
  const uint32_t member = uint32_t(draw.first_member + m);
  draw_normals(seed_of(draw), tile * QUADS, member, scale, to.normal);
}

void draw_dropout(const Perturbation& draw, int64_t tile, int64_t m, Draws& to) {
  if (!has_dropout(draw)) return;
  const uint32_t member = uint32_t(draw.first_member + m);
  const float dropout = draw.dropouts ? draw.dropouts[m] : draw.dropout;
  draw_factors(seed_of(draw), tile * QUADS, member, dropout, to.factor);
}

// Without one of the two, what stands for it in every member.
void prepare(Draws& draws) {
  for (int64_t k = 0; k < TILE; ++k) draws.normal[k] = 0.0f, draws.factor[k] = 1.0f;
}

int64_t elements_of(const Perturbation& draw, int64_t tile) {
  const int64_t left = draw.P - tile * TILE;
  return left < TILE ? left : TILE;
}

const float* row(const void* data, int64_t stride_m, int64_t m, int64_t tile) {
  return static_cast<const float*>(data) + m * stride_m + tile * TILE;
}

}  // namespace

namespace LSF_ISA {

void perturb_tile(const PerturbJob& job, int64_t tile) {
  const Perturbation& draw = job.draw;
  const int64_t count = elements_of(draw, tile);
  Draws draws;
  prepare(draws);
  for (int64_t m = 0; m < draw.M; ++m) {
    draw_noise(draw, tile, m, scale_of(draw, m), draws);
    draw_dropout(draw, tile, m, draws);
    const float* w = row(job.weights, job.weights_stride_m, m, tile);
    float* y = job.y + m * draw.P + tile * TILE;
    if (draw.sigma.data && has_noise(draw)) {
      const float* sigma = row(draw.sigma.data, draw.sigma.stride_m, m, tile);
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        y[k] = (w[k] + sigma[k] * draws.normal[k]) * draws.factor[k];
      }
    } else {
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) y[k] = (w[k] + draws.normal[k]) * draws.factor[k];
    }
  }
}

void perturb_backward_tile(const PerturbBackwardJob& job, int64_t tile) {
  const Perturbation& draw = job.draw;
  const int64_t count = elements_of(draw, tile);
  Draws draws;
  prepare(draws);
  for (int64_t m = 0; m < draw.M; ++m) {
    draw_dropout(draw, tile, m, draws);
    const float* dy = row(job.dy, job.dy_stride_m, m, tile);
    if (job.dweights) {
      const bool add = job.dweights_shared && m > 0;
      float* to = job.dweights + (job.dweights_shared ? 0 : m * draw.P) + tile * TILE;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        to[k] = (add ? to[k] : 0.0f) + dy[k] * draws.factor[k];
      }
    }
    if (!job.dsigma && !job.parts) continue;
    draw_noise(draw, tile, m, 1.0f, draws);
    // From here on, the gradient of scale times sigma.
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) draws.normal[k] *= dy[k] * draws.factor[k];
    if (job.dsigma) {
      const bool add = job.dsigma_shared && m > 0;
      const float scale = scale_of(draw, m);
      float* to = job.dsigma + (job.dsigma_shared ? 0 : m * draw.P) + tile * TILE;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        to[k] = (add ? to[k] : 0.0f) + scale * draws.normal[k];
      }
    }
    if (job.parts) {
      const float* sigma =
          draw.sigma.data ? row(draw.sigma.data, draw.sigma.stride_m, m, tile) : nullptr;
      double lanes[16] = {};  // always in this order, whatever the instruction set
      for (int64_t k = 0; k < count; ++k) {
        lanes[k % 16] += double(draws.normal[k]) * (sigma ? double(sigma[k]) : 1.0);
      }
      double sum = 0;
      for (double lane : lanes) sum += lane;
      job.parts[tile * draw.M + m] = sum;
    }
  }
}

}  // namespace LSF_ISA
}  // namespace landscape_fast
