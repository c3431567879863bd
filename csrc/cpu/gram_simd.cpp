// Products of float32 anchors in float64; compiled once per instruction set.
#include "gram.h"

namespace landscape_fast {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 8, TILE = 4;  // 16 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int LANES = 4, TILE = 3;  // 9 of 16
#else
constexpr int LANES = 2, TILE = 3;
#endif

// Elements of all anchors that are gone through before the next ones: 256 KB, half of a cache, so
// that memory is read once however many tiles of pairs there are.
constexpr int64_t CACHED = 1 << 16;
constexpr int64_t LEAST_BLOCK = 256, MOST_BLOCK = 4096;

typedef double Vec __attribute__((vector_size(8 * LANES)));
typedef float Half __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline __attribute__((always_inline)) Vec widened(const float* p) {
  const Half half = *reinterpret_cast<const Loose*>(p);
  return __builtin_convertvector(half, Vec);
}

double sum_of(Vec v) {
  double sum = 0;
  for (int k = 0; k < LANES; ++k) sum += v[k];
  return sum;
}

// out[i, j] += a_i . b_j over n elements; of a tile on the diagonal only i <= j. A product of two
// float32 numbers is exact in float64.
template <int ROWS, int COLUMNS, bool DIAGONAL>
__attribute__((noinline)) void pairs(const float* a, const float* b, int64_t stride_k, int64_t n,
                                     double* out, int64_t K) {
  Vec sum[ROWS][COLUMNS];
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < COLUMNS; ++j) sum[i][j] = Vec{};
  }
  int64_t p = 0;
  for (; p + LANES <= n; p += LANES) {
    Vec right[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) right[j] = widened(b + j * stride_k + p);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const Vec left = DIAGONAL ? right[i] : widened(a + i * stride_k + p);
#pragma GCC unroll 4
      for (int j = DIAGONAL ? i : 0; j < COLUMNS; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = DIAGONAL ? i : 0; j < COLUMNS; ++j) {
      double total = sum_of(sum[i][j]);
      for (int64_t q = p; q < n; ++q) {
        total += double(a[i * stride_k + q]) * double(b[j * stride_k + q]);
      }
      out[i * K + j] += total;
    }
  }
}

// The tile of rows <= TILE and columns <= TILE.
template <int ROWS = TILE, int COLUMNS = TILE>
void pairs_of(int64_t rows, int64_t columns, bool diagonal, const float* a, const float* b,
              int64_t stride_k, int64_t n, double* out, int64_t K) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      pairs_of<ROWS - 1, COLUMNS>(rows, columns, diagonal, a, b, stride_k, n, out, K);
      return;
    }
  }
  if constexpr (COLUMNS > 1) {
    if (columns < COLUMNS) {
      pairs_of<ROWS, COLUMNS - 1>(rows, columns, diagonal, a, b, stride_k, n, out, K);
      return;
    }
  }
  if constexpr (ROWS == COLUMNS) {
    if (diagonal) {
      pairs<ROWS, COLUMNS, true>(a, b, stride_k, n, out, K);
      return;
    }
  }
  pairs<ROWS, COLUMNS, false>(a, b, stride_k, n, out, K);
}

}  // namespace

namespace LSF_ISA {

void gram_task(const GramPart& part, int64_t K, int64_t first, int64_t last, double* out) {
  int64_t block = CACHED / K / 64 * 64;
  block = block < LEAST_BLOCK ? LEAST_BLOCK : block > MOST_BLOCK ? MOST_BLOCK : block;
  for (int64_t p = first; p < last; p += block) {
    const int64_t n = last - p < block ? last - p : block;
    for (int64_t i = 0; i < K; i += TILE) {
      const int64_t rows = K - i < TILE ? K - i : TILE;
      for (int64_t j = i; j < K; j += TILE) {
        const int64_t columns = K - j < TILE ? K - j : TILE;
        pairs_of(rows, columns, i == j, part.data + i * part.stride_k + p,
                 part.data + j * part.stride_k + p, part.stride_k, n, out + i * K + j, K);
      }
    }
  }
}

}  // namespace LSF_ISA
}  // namespace landscape_fast
