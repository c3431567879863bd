// A step of all anchors: blocks of elements on threads, their products added in a fixed order.
#include "anchor_step.h"

#include <cmath>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "variants.h"

namespace landscape_fast {
namespace {

std::vector<StepBlock> blocks_of(const AnchorStep& op) {
  std::vector<StepBlock> blocks;
  int64_t begin = 0;
  for (int64_t l = 0; l < op.L; ++l) {
    const int64_t end = begin + op.sizes[l];
    for (; begin < end; begin += STEP_BLOCK) {
      blocks.push_back({l, begin, end - begin < STEP_BLOCK ? end - begin : STEP_BLOCK});
    }
    begin = end;
  }
  return blocks;
}

StepScalars scalars_of(const AnchorStep& op) {
  const double lr = op.lr_tensor != nullptr ? double(*op.lr_tensor) : op.lr, step = *op.step;
  StepScalars by = {};
  by.lr = float(lr);
  by.decay = float(1 - (op.rule == AnchorRule::adamw ? lr * op.weight_decay : 0));
  if (op.rule == AnchorRule::adam || op.rule == AnchorRule::adamw) {
    const double beta1 = op.numbers[0], beta2 = op.numbers[1];
    by.lr = float(lr / (1 - std::pow(beta1, step + 1)));
    by.one_beta1 = float(1 - beta1);
    by.beta2 = float(beta2);
    by.one_beta2 = float(1 - beta2);
    by.root = float(1 / std::sqrt(1 - std::pow(beta2, step + 1)));
    by.eps = float(op.numbers[2]);
  } else {
    by.momentum = float(op.numbers[0]);
    by.fresh = float(step == 0 ? 1 : 1 - op.numbers[1]);  // the first direction is taken as it is
  }
  return by;
}

// The matrix of beta * cos^2 of the pair; see Cos2 in landscape_fast/ops.
std::vector<double> cosine_matrix(const AnchorStep& op) {
  const int64_t S = op.T + op.F, i = *op.pair / (S - 1), k = *op.pair % (S - 1);
  const int64_t j = k + (k >= i);
  const double ii = op.penalty[i * S + i], jj = op.penalty[j * S + j], s = op.penalty[i * S + j];
  const double across = 2 * op.beta * s / (ii * jj);
  std::vector<double> matrix(size_t(S * S), 0.0);
  matrix[size_t(i * S + j)] = matrix[size_t(j * S + i)] = across;
  matrix[size_t(i * S + i)] = -across * s / ii;
  matrix[size_t(j * S + j)] = -across * s / jj;
  return matrix;
}

}  // namespace

void anchor_step(const AnchorStep& op, double* gram, bool parts, int threads) {
  const Isa which = isa();
  const int64_t S = op.T + op.F, area = S * S;
  const std::vector<StepBlock> blocks = blocks_of(op);
  const StepScalars by = scalars_of(op);
  std::vector<double> cosine;
  if (op.pair != nullptr) cosine = cosine_matrix(op);
  const double* penalty = op.pair != nullptr ? cosine.data() : op.penalty;
  const int64_t count = int64_t(blocks.size()), chunks = chunk_count(count, 0);
  threads = count * STEP_BLOCK * (S + op.M) < 2 * ALONE ? 1 : fewer(threads, chunks);
  const Scratch scratch(LSF_VARIANT(which, anchor_step_scratch)(op), threads);
  const auto products = zeros<double>(gram == nullptr ? 0 : count * area);
  in_parallel(chunks, threads, [&](int64_t index, int thread) {
    for (int64_t b = count * index / chunks; b < count * (index + 1) / chunks; ++b) {
      const StepBlock& block = blocks[size_t(b)];
      const bool counts = parts || op.selected == nullptr || op.selected[block.part];
      double* to = gram != nullptr && counts ? products.get() + b * area : nullptr;
      LSF_VARIANT(which, anchor_step_block)(op, by, penalty, block, scratch.of(thread), to);
    }
  });
  *op.step += 1;
  if (gram == nullptr) return;
  for (int64_t k = 0; k < (parts ? op.L : 1) * area; ++k) gram[k] = 0;
  for (int64_t b = 0; b < count; ++b) {
    double* to = gram + (parts ? blocks[size_t(b)].part * area : 0);
    for (int64_t k = 0; k < area; ++k) to[k] += products[b * area + k];
  }
  for (int64_t l = 0; l < (parts ? op.L : 1); ++l) {
    for (int64_t i = 0; i < S; ++i) {
      for (int64_t j = 0; j < i; ++j) gram[l * area + i * S + j] = gram[l * area + j * S + i];
    }
  }
}

}  // namespace landscape_fast
