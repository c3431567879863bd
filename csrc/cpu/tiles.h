// Float32 matrix tiles held in registers, for the *_simd.cpp files: everything here has internal
// linkage and is compiled once per instruction set.
//
// A tile is `ROWS` rows of PANEL = 2 vectors. Each step of k loads one row of a packed panel and
// multiplies it by one number per tile row. Measured on a Zen 4 core (117 Gflop/s of FMA at most):
// 14 rows of 2 AVX-512 vectors reach 110 Gflop/s, 9 rows of 3 vectors 111.
#pragma once

#include <cstdint>
#include <cstring>

namespace landscape_fast {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, STRIP = 14;  // 28 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int LANES = 8, STRIP = 6;  // 12 of 16
#else
constexpr int LANES = 4, STRIP = 5;
#endif
constexpr int PANEL = 2 * LANES;

// 16 more than a block of K, so that the rows of a strip do not compete for the same cache sets.
constexpr int64_t ROW_STRIDE = 512 + 16;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline __attribute__((always_inline)) Vec load(const float* p) {
  return *reinterpret_cast<const Loose*>(p);
}
inline __attribute__((always_inline)) void store(float* p, Vec v) {
  *reinterpret_cast<Loose*>(p) = v;
}

inline __attribute__((always_inline)) float sum_of_lanes(const float* p) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  Four v = *reinterpret_cast<const Four*>(p);
  for (int k = 4; k < LANES; k += 4) v += *reinterpret_cast<const Four*>(p + k);
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// out [ROWS, PANEL] = or += sum over k < K of a[row, k] * b[k, :]. Row i of `a` begins at
// a + i * ROW_STRIDE; with BY_K, element (i, k) is a[k * STRIP + i]. A cache line of what comes
// `next` is fetched with each k.
template <int ROWS, bool BY_K>
__attribute__((noinline)) void tile(const float* a, const float* b, int64_t K, bool add,
                                     const float* next, float* out) {
  Vec sum[ROWS][2];
  for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    const Vec left = load(b), right = load(b + LANES);
    b += PANEL;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const float x = BY_K ? a[i] : a[i * ROW_STRIDE];
      sum[i][0] += left * x;
      sum[i][1] += right * x;
    }
    a += BY_K ? STRIP : 1;
    __builtin_prefetch(next);
    next += 16;
  }
  for (int i = 0; i < ROWS; ++i) {
    float* row = out + i * PANEL;
    store(row, add ? load(row) + sum[i][0] : sum[i][0]);
    store(row + LANES, add ? load(row + LANES) + sum[i][1] : sum[i][1]);
  }
}

// The tile of `rows` <= STRIP rows.
template <bool BY_K, int ROWS = STRIP>
inline void tile_of(int64_t rows, const float* a, const float* b, int64_t K, bool add,
                    const float* next, float* out) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return tile_of<BY_K, ROWS - 1>(rows, a, b, K, add, next, out);
  }
  tile<ROWS, BY_K>(a, b, K, add, next, out);
}

// width <= PANEL elements into a row of a panel, zeros behind them.
inline void pack_row(const float* from, int64_t step, int64_t width, float* to) {
  if (step == 1 && width == PANEL) {
    store(to, load(from));
    store(to + LANES, load(from + LANES));
    return;
  }
  for (int64_t j = 0; j < PANEL; ++j) to[j] = j < width ? from[j * step] : 0.0f;
}

}  // namespace
}  // namespace landscape_fast
