// Pairwise JS, KL and agreement of one chunk of examples; compiled once per instruction set.
#include "blocks.h"

namespace landscape_fast {
namespace {

// sum (p + q) log2(p + q)
double mixture(const float* p, const float* q, int64_t length) {
  return sum_of(length, [=](int64_t k) {
    const float t = p[k] + q[k];
    return t * log2_of(t);
  });
}

// ln p of a block from d = x - largest x; 0 at the padding. Returns whether a logit was -inf.
bool log_probabilities(const Blocks& blocks, int64_t C, const Rows& rows, float* d) {
  const int64_t E = blocks.examples;
  int infinite = 0;
  for (int64_t c = 0; c < (E == 1 ? 1 : C); ++c) {
    const int64_t count = E == 1 ? C : E;
    float* at = d + c * E;
#pragma omp simd reduction(| : infinite)
    for (int64_t e = 0; e < count; ++e) {
      infinite |= at[e] == -INFINITY;
      at[e] -= rows.log_sum[E == 1 ? 0 : e];
    }
  }
  for (int64_t k = C * E; k < blocks.length; ++k) d[k] = 0;
  return infinite != 0;
}

// KL of member i from member j, summed over a block, `l` being ln p.
double kl_of(const float* p, const float* q, const float* l, const float* r, bool infinite,
             int64_t length, double examples) {
  if (!infinite) {
    const double sum = sum_of(length, [=](int64_t k) { return p[k] * (l[k] - r[k]); });
    if (!(sum < CLOSE * examples)) return sum;
    return sum_of(length, [=](int64_t k) { return kl_term_log(p[k], q[k], r[k] - l[k]); });
  }
  return sum_of(length, [=](int64_t k) {  // 0 ln 0 = 0, and ln q = -inf counts where p > 0
    const bool none = p[k] == 0.0f, never = r[k] == -INFINITY;
    const float term = kl_term_log(p[k], q[k], none || never ? 0.0f : r[k] - l[k]);
    return none ? q[k] : never ? INFINITY : term;
  });
}

struct Scratch {
  float* p;         // [M, length]
  float* l;         // [M, length]
  double* entropy;  // [M], of a block
  bool* infinite;   // [M]
};

Scratch carve(const Logits& logits, void* scratch) {
  const int64_t length = blocks_of(logits).length;
  float* p = static_cast<float*>(scratch);
  float* l = p + logits.M * length;
  double* entropy = reinterpret_cast<double*>(l + logits.M * length);
  return {p, l, entropy, reinterpret_cast<bool*>(entropy + logits.M)};
}

template <class T>
void agreement_as(const Labels& labels, int64_t first, int64_t last, int64_t* out) {
  const T* data = static_cast<const T*>(labels.data);
  const int64_t step = labels.stride_n;
  for (int64_t i = 0; i < labels.M; ++i) {
    const T* a = data + i * labels.stride_m;
    for (int64_t j = i + 1; j < labels.M; ++j) {
      const T* b = data + j * labels.stride_m;
      int64_t same = 0;
      if (step == 1) {
#pragma omp simd reduction(+ : same)
        for (int64_t n = first; n < last; ++n) same += a[n] == b[n];
      } else {
        for (int64_t n = first; n < last; ++n) same += a[n * step] == b[n * step];
      }
      out[i * labels.M + j] += same;
    }
  }
}

}  // namespace

namespace LSF_ISA {

int64_t divergence_scratch(const Logits& logits) {
  const int64_t length = blocks_of(logits).length;
  return logits.M * (2 * length * int64_t(sizeof(float)) + int64_t(sizeof(double)) + 1);
}

void divergence_chunk(const Logits& logits, Divergence kind, Chunk chunk, void* scratch,
                      double* out) {
  const int64_t M = logits.M, C = logits.C;
  const Blocks blocks = blocks_of(logits);
  const int64_t length = blocks.length;
  const Scratch at = carve(logits, scratch);
  Rows rows;
  for (int64_t block = chunk.first; block < chunk.last; ++block) {
    const int64_t n = block * blocks.examples;
    const int64_t valid = logits.N - n < blocks.examples ? logits.N - n : blocks.examples;
    bool use[MOST_EXAMPLES];
    for (int e = 0; e < MOST_EXAMPLES; ++e) use[e] = e < valid;
    for (int64_t m = 0; m < M; ++m) {
      float* x = kind == Divergence::kl ? at.l + m * length : at.l;
      load(logits, m, n, valid, use, blocks, x);
      softmax(logits, blocks, use, x, at.p + m * length, rows);
      double entropy = 0;
      for (int64_t e = 0; e < valid; ++e) entropy += double(rows.entropy[e]);
      at.entropy[m] = entropy;
      out[m * M + m] += entropy - entropy;  // 0, or NaN where an example of the member is
      if (kind == Divergence::kl) at.infinite[m] = log_probabilities(blocks, C, rows, x);
    }
    for (int64_t i = 0; i < M; ++i) {
      const float* p = at.p + i * length;
      if (kind == Divergence::js) {
        for (int64_t j = i + 1; j < M; ++j) {
          const float* q = at.p + j * length;
          double sum = double(LN2) * (double(valid) - 0.5 * mixture(p, q, length)) -
                       0.5 * (at.entropy[i] + at.entropy[j]);
          if (sum < CLOSE * double(valid)) {
            sum = sum_of(length, [=](int64_t k) { return js_term(p[k], q[k]); });
          }
          out[i * M + j] += sum;
        }
      } else {
        for (int64_t j = 0; j < M; ++j) {
          if (j == i) continue;
          out[i * M + j] += kl_of(p, at.p + j * length, at.l + i * length, at.l + j * length,
                                  at.infinite[i] || at.infinite[j], length, double(valid));
        }
      }
    }
  }
}

void label_chunk(const Logits& logits, Chunk chunk, void* scratch, int32_t* labels) {
  const Blocks blocks = blocks_of(logits);
  float* x = static_cast<float*>(scratch);
  for (int64_t block = chunk.first; block < chunk.last; ++block) {
    const int64_t n = block * blocks.examples;
    const int64_t valid = logits.N - n < blocks.examples ? logits.N - n : blocks.examples;
    bool use[MOST_EXAMPLES];
    for (int e = 0; e < MOST_EXAMPLES; ++e) use[e] = e < valid;
    for (int64_t m = 0; m < logits.M; ++m) {
      int32_t label[MOST_EXAMPLES];
      load(logits, m, n, valid, use, blocks, x);
      first_largest(blocks, x, logits.C, label);
      memcpy(labels + m * logits.N + n, label, size_t(valid) * sizeof(int32_t));
    }
  }
}

void agreement_chunk(const Labels& labels, int64_t first, int64_t last, int64_t* out) {
  if (labels.itemsize == 8) {
    agreement_as<int64_t>(labels, first, last, out);
  } else if (labels.itemsize == 4) {
    agreement_as<int32_t>(labels, first, last, out);
  } else if (labels.itemsize == 2) {
    agreement_as<int16_t>(labels, first, last, out);
  } else {
    agreement_as<int8_t>(labels, first, last, out);
  }
}

}  // namespace LSF_ISA
}  // namespace landscape_fast
