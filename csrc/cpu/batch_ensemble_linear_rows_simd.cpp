// out = (rows * factor) matrix of one task; compiled once per instruction set.
#include "batch_ensemble_linear.h"
#include "tiles.h"

namespace landscape_fast {
namespace {

constexpr int64_t K_BLOCK = 512;  // products added in a register before they go to the tile's sum
static_assert(ROW_STRIDE > K_BLOCK, "a row of a strip holds a block");

constexpr int64_t FLIPPED_STRIPS = 4;     // of the matrix, in one task

struct Row {
  const float *in, *mask, *factor, *scale, *shift;
  float* out;
  bool add;
};

const float* of_member(const MemberFactor& factor, int64_t m) {
  return factor.data == nullptr ? nullptr : factor.data + m * factor.stride_m;
}

const float* at(const MemberRows& rows, int64_t m, int64_t b) {
  return rows.data + m * rows.stride_m + b * rows.stride_b;
}

Row row_of(const RowsJob& job, int64_t m, int64_t b) {
  Row row;
  row.in = at(job.in, m, b);
  row.mask = job.mask.data == nullptr ? nullptr : at(job.mask, m, b);
  row.factor = of_member(job.factor, m);
  row.scale = of_member(job.scale, m);
  row.shift = of_member(job.shift, m);
  row.out = job.out + m * job.out_stride_m + b * job.out_stride_b;
  row.add = job.out_stride_m == 0 && m > 0;
  return row;
}

// Rows of all members are numbered along the output's memory.
Row numbered(const RowsJob& job, int64_t index) {
  const bool examples_outermost = job.out_stride_b > job.out_stride_m;
  return examples_outermost ? row_of(job, index % job.M, index / job.M)
                            : row_of(job, index / job.B, index % job.B);
}

// out[k] = in[k] * factor[k], or 0 where the ReLU was shut, for k in [first, last).
void scaled(const Row& row, int64_t step, int64_t first, int64_t last, float* out) {
  const float *in = row.in, *factor = row.factor, *mask = row.mask;
  int64_t k = first;
  if (step == 1) {
    for (; k + LANES <= last; k += LANES, out += LANES) {
      Vec v = load(in + k);
      if (mask != nullptr) v = load(mask + k) <= 0.0f ? Vec{} : v;
      if (factor != nullptr) v *= load(factor + k);
      store(out, v);
    }
  }
  for (; k < last; ++k, ++out) {
    const float v = mask != nullptr && mask[k] <= 0.0f ? 0.0f : in[k * step];
    *out = factor != nullptr ? v * factor[k] : v;
  }
}

template <class T>
inline __attribute__((always_inline)) T finished(T v, T scale, T shift, T before, bool relu,
                                                 bool scales, bool shifts, bool add) {
  if (scales) v *= scale;
  if (shifts) v += shift;
  if (relu) v = v < T{} ? T{} : v;  // NaN stays
  return add ? before + v : v;
}

// Outputs [n, n + width) of a row, from their products.
void finish(const Row& row, bool relu, const float* products, int64_t n, int64_t width) {
  const bool scales = row.scale != nullptr, shifts = row.shift != nullptr;
  int64_t j = 0;
  while (j + LANES <= width) {
    const Vec scale = scales ? load(row.scale + n + j) : Vec{};
    const Vec shift = shifts ? load(row.shift + n + j) : Vec{};
    const Vec before = row.add ? load(row.out + n + j) : Vec{};
    store(row.out + n + j, finished<Vec>(load(products + j), scale, shift, before, relu, scales,
                                         shifts, row.add));
    j += LANES;
    if (j < width && j + LANES > width && !row.add) j = width - LANES;  // some are written twice
  }
  for (; j < width; ++j) {
    const float scale = scales ? row.scale[n + j] : 0, shift = shifts ? row.shift[n + j] : 0;
    row.out[n + j] = finished<float>(products[j], scale, shift, row.add ? row.out[n + j] : 0, relu,
                                     scales, shifts, row.add);
  }
}

int64_t blocks_along(int64_t K) { return (K + K_BLOCK - 1) / K_BLOCK; }

// Part of a panel from its columns, which were copied, for in a matrix they may share few sets of
// the L1 cache.
void turn(const float (*columns)[LANES], int64_t depth, float* out) {
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t j = 0; j < PANEL; ++j) out[i * PANEL + j] = columns[j][i];
  }
}

// Rows to multiply panels with, block by block of K: block c of row i at
// packed + (c * count + i) * ROW_STRIDE.
void pack_rows(const Row* rows, int64_t count, int64_t K, int64_t step, float* packed) {
  for (int64_t first = 0; first < K; first += K_BLOCK) {
    const int64_t last = first + K_BLOCK < K ? first + K_BLOCK : K;
    for (int64_t i = 0; i < count; ++i, packed += ROW_STRIDE) {
      scaled(rows[i], step, first, last, packed);
    }
  }
}

// out [strip, PANEL]: rows [i, i + strip) of `count` packed ones times one panel.
void strip_times_panel(const float* packed, int64_t count, int64_t i, int64_t strip,
                       const float* panel, int64_t K, const float* next, float* out) {
  packed += i * ROW_STRIDE;
  for (int64_t k = 0; k < K; k += K_BLOCK, packed += count * ROW_STRIDE, next += 16 * K_BLOCK) {
    const int64_t depth = K - k < K_BLOCK ? K - k : K_BLOCK;
    tile_of<false>(strip, packed, panel + k * PANEL, depth, k > 0, next, out);
  }
}

// `count` rows times all panels of the matrix.
void multiply(const RowsJob& job, const Row* rows, int64_t count, const float* panels,
              float* packed) {
  alignas(64) float sums[STRIP * PANEL];
  pack_rows(rows, count, job.K, job.in.stride_f, packed);
  for (int64_t n = 0; n < job.N; n += PANEL) {
    const int64_t width = job.N - n < PANEL ? job.N - n : PANEL;
    for (int64_t i = 0; i < count; i += STRIP) {
      const int64_t strip = count - i < STRIP ? count - i : STRIP;
      for (int64_t k = i; k < i + strip; ++k) {  // here by the time the tile is done
        __builtin_prefetch(rows[k].out + n, 1);
        __builtin_prefetch(rows[k].out + n + width - 1, 1);
      }
      const float* panel = panels + n * job.K;
      strip_times_panel(packed, count, i, strip, panel, job.K, panel, sums);
      for (int64_t k = 0; k < strip; ++k) finish(rows[i + k], job.relu, sums + k * PANEL, n, width);
    }
  }
}

}  // namespace

namespace LSF_ISA {

TileSizes tile_sizes() { return {PANEL, STRIP, FLIPPED_STRIPS * STRIP}; }

void pack_panel(const float* matrix, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K,
                int64_t p, float* out) {
  const int64_t n = p * PANEL, width = N - n < PANEL ? N - n : PANEL;
  matrix += n * stride_n;
  if (stride_n == 1 || stride_k != 1) {
    for (int64_t k = 0; k < K; ++k) {
      pack_row(matrix + k * stride_k, stride_n, width, out + k * PANEL);
    }
    return;
  }
  for (int64_t k = 0; k < K; k += LANES) {
    const int64_t depth = K - k < LANES ? K - k : LANES;
    alignas(64) float square[PANEL][LANES] = {};
    for (int64_t j = 0; j < width; ++j) {
      memcpy(square[j], matrix + j * stride_n + k, size_t(depth) * sizeof(float));
    }
    turn(square, depth, out + k * PANEL);
  }
}

int64_t rows_scratch(const RowsJob& job, int64_t rows) {
  return rows * blocks_along(job.K) * ROW_STRIDE;
}

void rows_task(const RowsJob& job, const float* panels, int64_t first, int64_t last,
               float* scratch) {
  Row rows[MOST_STRIPS * STRIP];
  const int64_t count = last - first;
  if (job.out_stride_m != 0) {
    for (int64_t i = 0; i < count; ++i) rows[i] = numbered(job, first + i);
    return multiply(job, rows, count, panels, scratch);
  }
  for (int64_t m = 0; m < job.M; ++m) {
    for (int64_t i = 0; i < count; ++i) rows[i] = row_of(job, m, first + i);
    multiply(job, rows, count, panels, scratch);
  }
}

void pack_rows_panel(const RowsJob& job, int64_t p, float* out) {
  Row rows[PANEL];
  const int64_t first = p * PANEL, left = job.M * job.B - first;
  const int64_t width = left < PANEL ? left : PANEL;
  for (int64_t j = 0; j < width; ++j) rows[j] = numbered(job, first + j);
  for (int64_t k = 0; k < job.K; k += LANES) {
    const int64_t depth = job.K - k < LANES ? job.K - k : LANES;
    alignas(64) float square[PANEL][LANES] = {};
    for (int64_t j = 0; j < width; ++j) {
      scaled(rows[j], job.in.stride_f, k, k + depth, square[j]);
    }
    turn(square, depth, out + k * PANEL);
  }
}

void flipped_task(const RowsJob& job, const float* panels, const float* matrix, int64_t stride_n,
                  int64_t n, int64_t n_last, float* scratch) {
  constexpr int64_t MOST = FLIPPED_STRIPS * STRIP;
  alignas(64) float sums[STRIP * PANEL], out[PANEL][MOST];
  Row lines[MOST] = {};
  const int64_t outputs = n_last - n, rows = job.M * job.B;
  for (int64_t j = 0; j < outputs; ++j) lines[j].in = matrix + (n + j) * stride_n;
  for (int64_t row = 0; row < rows; row += PANEL) {
    const int64_t width = rows - row < PANEL ? rows - row : PANEL;
    const float* panel = panels + row * job.K;
    for (int64_t j = 0; j < outputs; j += STRIP) {
      const int64_t strip = outputs - j < STRIP ? outputs - j : STRIP;
      float* packed = scratch + j * blocks_along(job.K) * ROW_STRIDE;
      if (row == 0) pack_rows(lines + j, strip, job.K, 1, packed);
      // the next strip of the matrix comes while this one is used for the first time
      const float* next = row == 0 ? lines[j].in + strip * stride_n : panel;
      strip_times_panel(packed, strip, 0, strip, panel, job.K, next, sums);
      for (int64_t k = 0; k < strip; ++k) {
        for (int64_t e = 0; e < PANEL; ++e) out[e][j + k] = sums[k * PANEL + e];
      }
    }
    for (int64_t e = 0; e < width; ++e) {
      finish(numbered(job, row + e), job.relu, out[e], n, outputs);
    }
  }
}

}  // namespace LSF_ISA
}  // namespace landscape_fast
