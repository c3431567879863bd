// Pairwise JS, KL and agreement of one chunk of examples; compiled once per instruction set.
#include "blocks.h"

namespace landscape_fast {
namespace {

#if defined(__AVX512F__)

constexpr int MEMBERS_AT_ONCE = 4;

// For JS: d becomes half of p log2 p, and p half of itself.
void halves(int64_t length, float* p, float* d) {
  const Log2Table table;
  int64_t k = 0;
  const auto step = [&](auto& x) {
    constexpr int K = sizeof(x) / sizeof(x[0]);
    __m512 y[K];
    for (int i = 0; i < K; ++i) x[i] = _mm512_loadu_ps(p + k + 16 * i);
    table.of(x, y);
    for (int i = 0; i < K; ++i) {
      const __m512 half = _mm512_mul_ps(x[i], _mm512_set1_ps(0.5f));
      _mm512_storeu_ps(d + k + 16 * i, _mm512_mul_ps(half, y[i]));
      _mm512_storeu_ps(p + k + 16 * i, half);
    }
    k += 16 * K;
  };
  __m512 four[4], one[1];
  while (k + 64 <= length) step(four);
  while (k < length) step(one);
}

// js_sums of exactly K members.
template <int K>
void js_sums_of(const float* a, const float* a_ln, const float* b, const float* b_ln,
                int64_t length, double* sums) {
  const Log2Table table;
  for (int j = 0; j < K; ++j) sums[j] = 0;
  for (int64_t begin = 0; begin < length; begin += SEGMENT) {
    const int64_t end = begin + SEGMENT < length ? begin + SEGMENT : length;
    __m512 total[K];
    for (int j = 0; j < K; ++j) total[j] = _mm512_setzero_ps();
    for (int64_t k = begin; k < end; k += 16) {
      const __m512 left = _mm512_loadu_ps(a + k), left_ln = _mm512_loadu_ps(a_ln + k);
      __m512 m[K], ln[K];
      for (int j = 0; j < K; ++j) m[j] = _mm512_add_ps(left, _mm512_loadu_ps(b + j * length + k));
      table.of(m, ln);
      for (int j = 0; j < K; ++j) {
        const __m512 both = _mm512_add_ps(left_ln, _mm512_loadu_ps(b_ln + j * length + k));
        total[j] = _mm512_add_ps(total[j], _mm512_fnmadd_ps(m[j], ln[j], both));
      }
    }
    for (int j = 0; j < K; ++j) sums[j] += double(_mm512_reduce_add_ps(total[j]));
  }
}

// For each of `members` others, the sum over a block of the JS of a member and that one, in units
// of ln 2 nats. a and b [members, length] are half their probabilities, a_ln and b_ln half of
// p log2 p: each class then adds what is already a small difference, and the sum never grows to the
// size of an entropy.
void js_sums(int64_t members, const float* a, const float* a_ln, const float* b, const float* b_ln,
             int64_t length, double* sums) {
  if (members == 4) return js_sums_of<4>(a, a_ln, b, b_ln, length, sums);
  if (members == 3) return js_sums_of<3>(a, a_ln, b, b_ln, length, sums);
  if (members == 2) return js_sums_of<2>(a, a_ln, b, b_ln, length, sums);
  js_sums_of<1>(a, a_ln, b, b_ln, length, sums);
}

#else

constexpr int MEMBERS_AT_ONCE = 1;

void halves(int64_t length, float* p, float* d) {
#pragma omp simd
  for (int64_t k = 0; k < length; ++k) {
    d[k] = 0.5f * p[k] * log2_of(p[k]);
    p[k] *= 0.5f;
  }
}

void js_sums(int64_t, const float* a, const float* a_ln, const float* b, const float* b_ln,
             int64_t length, double* sums) {
  *sums = sum_of(length, [=](int64_t k) {
    const float m = a[k] + b[k];
    return (a_ln[k] + b_ln[k]) - m * log2_of(m);
  });
}

#endif

// JS of two members in nats over a block of `examples`, from what js_sums found.
double js_of(const float* a, const float* b, const float* a_ln, const float* b_ln, int64_t length,
             double examples, double found) {
  const double sum = double(LN2) * found;
  if (!(sum < CLOSE * examples)) return sum;
  return 2 * sum_of(length, [=](int64_t k) {
    const float m = a[k] + b[k];
    return js_term(a[k], b[k], 0.5f * LN2 * ((a_ln[k] + b_ln[k]) - m * log2_of(m)));
  });
}

struct Member {
  const float *p, *d;     // probabilities, and x - largest x
  const double* log_sum;  // [MOST_EXAMPLES]
  double log_sums;        // of the block
  bool infinite;          // whether a logit is -inf
};

// KL of member i from member j in nats, summed over a block. `shift` is scratch [length].
double kl_of(const Member& i, const Member& j, const Blocks& blocks, float* shift,
             double examples) {
  const float *p = i.p, *q = j.p, *d = i.d, *r = j.d;
  if (!i.infinite && !j.infinite) {
    const double sum = sum_of(blocks.length, [=](int64_t k) { return p[k] * (d[k] - r[k]); }) -
                       (i.log_sums - j.log_sums);
    if (!(sum < CLOSE * examples)) return sum;
  }
  float ratio[MOST_EXAMPLES];  // ln of the ratio of the sums, per example
  const bool row = blocks.examples == 1;
  for (int e = 0; e < MOST_EXAMPLES; ++e) {
    ratio[e] = float(i.log_sum[row ? 0 : e] - j.log_sum[row ? 0 : e]);
  }
  for (int64_t k = 0; k < blocks.length; k += 16) {
    memcpy(shift + k, ratio + k % MOST_EXAMPLES, 16 * sizeof(float));
  }
  return sum_of(blocks.length, [=](int64_t k) {  // 0 ln 0 = 0, and ln q = -inf counts where p > 0
    const bool none = p[k] == 0.0f, never = r[k] == -INFINITY;
    const float term = kl_term_log(p[k], q[k], none || never ? 0.0f : (r[k] - d[k]) + shift[k]);
    return none ? q[k] : never ? INFINITY : term;
  });
}

// Whether a logit is -inf; the padding becomes 0.
bool has_infinite(const Blocks& blocks, int64_t C, float* d) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t k = 0; k < C * blocks.examples; ++k) found |= d[k] == -INFINITY;
  for (int64_t k = C * blocks.examples; k < blocks.length; ++k) d[k] = 0;
  return found != 0;
}

struct Scratch {
  Rows* rows;       // [M]
  Member* members;  // [M]
  float* p;         // [M, length]
  float* d;         // [M, length]; for JS half of p log2 p
  float* shift;     // [length]
};

int64_t scratch_bytes(const Logits& logits, int64_t length) {
  return logits.M * int64_t(sizeof(Rows) + sizeof(Member)) +
         (2 * logits.M + 1) * length * int64_t(sizeof(float));
}

Scratch carve(const Logits& logits, int64_t length, void* scratch) {
  Rows* rows = static_cast<Rows*>(scratch);
  Member* members = reinterpret_cast<Member*>(rows + logits.M);
  float* p = reinterpret_cast<float*>(members + logits.M);
  return {rows, members, p, p + logits.M * length, p + 2 * logits.M * length};
}

// Adds a block of `examples` to the upper triangle of out [M, M].
void add_js(int64_t M, const Scratch& at, int64_t length, double examples, double* out) {
  for (int64_t i = 0; i < M; ++i) {
    const float *a = at.p + i * length, *a_ln = at.d + i * length;
    for (int64_t first = i + 1; first < M; first += MEMBERS_AT_ONCE) {
      const int64_t left = M - first, count = left < MEMBERS_AT_ONCE ? left : MEMBERS_AT_ONCE;
      const float *b = at.p + first * length, *b_ln = at.d + first * length;
      double sums[MEMBERS_AT_ONCE];
      js_sums(count, a, a_ln, b, b_ln, length, sums);
      for (int64_t j = 0; j < count; ++j) {
        out[i * M + first + j] +=
            js_of(a, b + j * length, a_ln, b_ln + j * length, length, examples, sums[j]);
      }
    }
  }
}

void add_kl(int64_t M, const Scratch& at, const Blocks& blocks, double examples, double* out) {
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < M; ++j) {
      if (j == i) continue;
      out[i * M + j] += kl_of(at.members[i], at.members[j], blocks, at.shift, examples);
    }
  }
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
  return scratch_bytes(logits, blocks_of(logits).length);
}

void divergence_chunk(const Logits& logits, Divergence kind, Chunk chunk, void* scratch,
                      double* out) {
  const int64_t M = logits.M;
  const Blocks blocks = blocks_of(logits);
  const int64_t length = blocks.length;
  const Scratch at = carve(logits, length, scratch);
  for (int64_t block = chunk.first; block < chunk.last; ++block) {
    const int64_t n = block * blocks.examples;
    const int64_t valid = logits.N - n < blocks.examples ? logits.N - n : blocks.examples;
    bool use[MOST_EXAMPLES];
    for (int e = 0; e < MOST_EXAMPLES; ++e) use[e] = e < valid;
    for (int64_t m = 0; m < M; ++m) {
      float *p = at.p + m * length, *d = at.d + m * length;
      Rows& rows = at.rows[m];
      load(logits, m, n, valid, use, blocks, d);
      softmax(logits, blocks, use, d, p, rows);
      double log_sums = 0, nothing = 0;
      for (int64_t e = 0; e < valid; ++e) log_sums += rows.log_sum[e];
      for (int64_t e = 0; e < valid; ++e) nothing += rows.log_sum[e] - rows.log_sum[e];
      out[m * M + m] += nothing;  // 0, or NaN where an example of the member is
      if (kind == Divergence::js) {
        halves(length, p, d);
      } else {
        at.members[m] = {p, d, rows.log_sum, log_sums, has_infinite(blocks, logits.C, d)};
      }
    }
    if (kind == Divergence::js) {
      add_js(M, at, length, double(valid), out);
    } else {
      add_kl(M, at, blocks, double(valid), out);
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
