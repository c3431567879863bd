// One block of elements of a step of all anchors; compiled once per instruction set.
#include "anchor_step.h"

#include <cmath>

namespace landscape_fast {
namespace {

constexpr int LANES = 16;

struct Term {
  const float* x;
  float scale;
};

// out = the terms' sum over `n` elements, four at a time.
void sum_terms(const Term* terms, int64_t count, int64_t n, float* out) {
  for (int64_t t = 0; t < count; t += 4) {
    const int64_t left = count - t < 4 ? count - t : 4;
    const float* x[4];
    float scale[4];
    for (int64_t k = 0; k < 4; ++k) {
      x[k] = terms[t + (k < left ? k : 0)].x;
      scale[k] = k < left ? terms[t + k].scale : 0.0f;
    }
    const float *a = x[0], *b = x[1], *c = x[2], *d = x[3];
    const float sa = scale[0], sb = scale[1], sc = scale[2], sd = scale[3];
    const bool first = t == 0;
    if (left == 1 && first) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = sa * a[i];
    } else if (left == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] += sa * a[i];
    } else if (left == 2 && first) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = sa * a[i] + sb * b[i];
    } else if (left == 2) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] += sa * a[i] + sb * b[i];
    } else if (left == 3 && first) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = sa * a[i] + sb * b[i] + sc * c[i];
    } else if (left == 3) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] += sa * a[i] + sb * b[i] + sc * c[i];
    } else if (first) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = (sa * a[i] + sb * b[i]) + (sc * c[i] + sd * d[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] += (sa * a[i] + sb * b[i]) + (sc * c[i] + sd * d[i]);
    }
  }
}

void move(const AnchorStep& op, const StepScalars& by, int64_t n, const float* d, float* a,
          float* first, float* second) {
  const float lr = by.lr, eps = by.eps, root = by.root, decay = by.decay;
  if (op.rule == AnchorRule::sgd) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) a[i] -= lr * d[i];
  } else if (op.rule == AnchorRule::momentum) {
    const float momentum = by.momentum, fresh = by.fresh;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      first[i] = momentum * first[i] + fresh * d[i];
      a[i] -= lr * first[i];
    }
  } else if (op.rule == AnchorRule::nesterov) {
    const float momentum = by.momentum, fresh = by.fresh;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      first[i] = momentum * first[i] + fresh * d[i];
      a[i] -= lr * (d[i] + momentum * first[i]);
    }
  } else {
    const float one_beta1 = by.one_beta1, beta2 = by.beta2, one_beta2 = by.one_beta2;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      first[i] += one_beta1 * (d[i] - first[i]);
      second[i] = beta2 * second[i] + one_beta2 * d[i] * d[i];
      a[i] = decay * a[i] - lr * (first[i] / (std::sqrt(second[i]) * root + eps));
    }
  }
}

// out[j] = a . b[j] for COUNT rows, in float64, where a product of two float32 numbers is exact:
// the same bits with every instruction set.
template <int COUNT>
void dots(const float* a, const float* const* b, int64_t n, double* out) {
  double sums[COUNT][LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int j = 0; j < COUNT; ++j) {
      const float* row = b[j] + i;
#pragma omp simd
      for (int k = 0; k < LANES; ++k) sums[j][k] += double(a[i + k]) * double(row[k]);
    }
  }
  for (int j = 0; j < COUNT; ++j) {
    for (int64_t at = i; at < n; ++at) sums[j][0] += double(a[at]) * double(b[j][at]);
    double sum = 0;
    for (int k = 0; k < LANES; ++k) sum += sums[j][k];
    out[j] = sum;
  }
}

}  // namespace

namespace LSF_ISA {

int64_t anchor_step_scratch(const AnchorStep& op) {
  const int64_t S = op.T + op.F;
  return int64_t(sizeof(Term)) * (op.M + S) + int64_t(sizeof(float)) * op.T * STEP_BLOCK +
         int64_t(sizeof(float*)) * S + 64;
}

void anchor_step_block(const AnchorStep& op, const StepScalars& by, const double* penalty,
                       const StepBlock& block, void* scratch, double* products) {
  const int64_t M = op.M, T = op.T, S = T + op.F, n = block.count;
  float* directions = static_cast<float*>(scratch);  // [T, STEP_BLOCK]
  Term* terms = reinterpret_cast<Term*>(directions + T * STEP_BLOCK);
  const float** rows = reinterpret_cast<const float**>(terms + M + S);
  for (int64_t k = 0; k < S; ++k) {
    rows[k] = (k < T ? op.anchors + k * op.anchors_stride_k
                     : op.fixed + (k - T) * op.fixed_stride_k) + block.first;
  }
  const float* coeffs = op.coeffs + block.part * op.coeffs_stride_l;
  const bool chosen = op.penalty_stride_l != 0 || op.selected == nullptr || op.selected[block.part];
  if (penalty != nullptr) penalty = chosen ? penalty + block.part * op.penalty_stride_l : nullptr;
  const bool coupled = op.rule != AnchorRule::adamw;
  for (int64_t k = 0; k < T; ++k) {  // all directions before the first anchor moves
    int64_t count = 0;
    for (int64_t m = 0; m < M; ++m) {
      terms[count++] = {op.grad + m * op.grad_stride_m + block.first,
                        coeffs[m * op.coeffs_stride_m + k]};
    }
    for (int64_t j = 0; j < S; ++j) {  // everything else is a matrix times the anchors
      double scale = penalty != nullptr ? penalty[k * S + j] : 0.0;
      if (op.curve_l2 != 0) {
        for (int64_t m = 0; m < M; ++m) {
          const float* c = coeffs + m * op.coeffs_stride_m;
          scale += op.curve_l2 * double(c[k]) * double(c[j]);
        }
      }
      if (j == k && coupled) scale += op.weight_decay;
      if (scale != 0) terms[count++] = {rows[j], float(scale)};
    }
    sum_terms(terms, count, n, directions + k * STEP_BLOCK);
  }
  for (int64_t k = 0; k < T; ++k) {
    const int64_t at = k * op.P + block.first;
    move(op, by, n, directions + k * STEP_BLOCK,
         op.anchors + k * op.anchors_stride_k + block.first,
         op.first != nullptr ? op.first + at : nullptr,
         op.second != nullptr ? op.second + at : nullptr);
  }
  if (products == nullptr) return;
  for (int64_t i = 0; i < S; ++i) {
    int64_t j = i;
    for (; j + 3 <= S; j += 3) dots<3>(rows[i], rows + j, n, products + i * S + j);
    if (S - j == 2) dots<2>(rows[i], rows + j, n, products + i * S + j);
    if (S - j == 1) dots<1>(rows[i], rows + j, n, products + i * S + j);
  }
}

}  // namespace LSF_ISA
}  // namespace landscape_fast
