// What the file that cuts batch_ensemble_linear into tasks and the one compiled once per
// instruction set know of one another.
//
// Two products make up the op and its gradients. `rows`: out = (rows * factor) matrix, for the
// forward and dx; each output element is one chain of additions along K, in the same order however
// the work is cut. `gram`: G = dy^T x of a block of examples of one member, a tile at a time, from
// which dweight, dr and ds are taken while the tile is in the cache.
#pragma once

#include <cstdint>

#include "variants.h"

namespace landscape_fast {

// Widths in elements: of the panels a matrix is packed in, of a strip of rows (as many as a tile
// keeps in registers), and of the outputs of one flipped task.
struct TileSizes {
  int64_t panel, strip, outputs;
};

// out[row, n] = act(sum_k (in[row, k] * factor[m, k]) * matrix[n, k] * scale[m, n] + shift[m, n])
struct RowsJob {
  int64_t M, B, K, N;
  MemberRows in;
  MemberRows mask;  // data null, or outputs of a ReLU: in counts as 0 where they are <= 0
  MemberFactor factor, scale, shift;  // data may be null
  float* out;
  int64_t out_stride_m, out_stride_b;  // unit stride along N; stride_m 0: the members are added up
  bool relu;
};

struct GramJob {
  int64_t M, B, I, O;
  MemberRows dy, x;
  MemberRows mask;  // as above; unit stride along features
  const float* panels;  // of the weight, as for dx: [panels of I, O, panel]
  MemberFactor r, s;
  bool products;  // dweight, dr, ds are wanted, not only dbias
};

// Partial results of one task of `gram`; padded widths are multiples of the panel.
struct GramParts {
  float* dweight;  // rows of the task in panels [outputs, panel], `stride` apart: written by the
  int64_t stride;  // first block, then added to
  float* dr;       // [padded I]
  float* ds;       // [outputs of the task]
  float* dbias;    // [outputs of the task]
};

constexpr int64_t GRAM_BLOCK = 256;  // examples of a block of `gram`
constexpr int64_t MOST_STRIPS = 8;   // of rows, in one task of `rows`

#define LSF_RANK_ONE_ENTRY_POINTS(ISA)                                                            \
  namespace ISA {                                                                                 \
  TileSizes tile_sizes();                                                                         \
  /* Panel `p` of a matrix [N, K] into out [K, panel], zeros beyond N. */                         \
  void pack_panel(const float* matrix, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K,  \
                  int64_t p, float* out);                                                         \
  int64_t rows_scratch(const RowsJob& job, int64_t rows);                                         \
  /* Rows [first, last) of those of all members, or, where members are added up, of each, times   \
     all panels. */                                                                               \
  void rows_task(const RowsJob& job, const float* panels, int64_t first, int64_t last,            \
                 float* scratch);                                                                 \
  /* Panel `p` of rows * factor, zeros beyond the last row. */                                    \
  void pack_rows_panel(const RowsJob& job, int64_t p, float* out);                                \
  /* The other way around: outputs [n, n_last), with panels of the scaled rows. The matrix, of    \
     unit stride along K, is only copied. */                                                      \
  void flipped_task(const RowsJob& job, const float* panels, const float* matrix,                 \
                    int64_t stride_n, int64_t n, int64_t n_last, float* scratch);                 \
  /* Examples [b, b_last) of member m, outputs [o, o_last). */                                    \
  int64_t gram_scratch(int64_t outputs);                                                          \
  void gram_block(const GramJob& job, int64_t m, int64_t b, int64_t b_last, int64_t o,            \
                  int64_t o_last, bool first, const GramParts& parts, float* scratch);            \
  }

LSF_RANK_ONE_ENTRY_POINTS(baseline)
#ifdef LSF_X86_VARIANTS
LSF_RANK_ONE_ENTRY_POINTS(avx2)
LSF_RANK_ONE_ENTRY_POINTS(avx512)
#endif

}  // namespace landscape_fast
