// Pairwise JS and KL of M members over N examples of C classes.
//
// First the softmax of every row: its largest logit, the scale 1 / sum, and ln sum or the entropy, 16
// bytes per row. With a single tile of members the blocks of pair_tiles_kernel do that themselves for
// the rows they are about to use (the logits then come from HBM once), else row_stats_kernel does.
// Then the tiles of pairs. JS(i, j) = ln 2 (1 - sum t log2 t / 2) - (H_i + H_j) / 2 with t = p_i + p_j
// costs one addition, one logarithm and one FMA per pair and class and is bound by the unit that makes
// the logarithms; KL takes p_i (ln p_i - ln p_j) from the difference of the logarithms, which needs no
// centring: one subtraction and an FMA in each direction.
#include <cfloat>

#include "cuda/labels.h"
#include "cuda/pair_tiles.h"
#include "cuda/quick.h"
#include "cuda/rows.h"

namespace landscape_fast {
namespace {

// What is kept of a row's softmax. JS: the entropy is z + w, w being what z has rounded off. KL: z is
// ln of the sum of e^(x - top).
using Stats = float4;  // x: largest logit; y: 1 / sum

__device__ __forceinline__ Stats stats_of(const Rows& rows, int64_t m, int64_t n, bool entropy) {
  const Softmax s = softmax_of(Row(rows, m, n));
  Stats stats;
  stats.x = s.top;
  stats.y = float(1 / s.sum);
  const double log_sum = ln_precise(s.sum);
  // The entropy that the rounded scale gives, -sum p ln p for p that sum to 1 + excess: JS then depends
  // on the rounding through ln of 2 p_i / (p_i + p_j) and not of p_i, which may be ten times as large.
  const double exact = log_sum - s.weighted / s.sum, excess = double(stats.y) * s.sum - 1;
  const double z = entropy ? exact + excess * (exact - 1) : log_sum;
  stats.z = float(z);
  stats.w = float(z - double(stats.z));
  return stats;
}

constexpr int STATS_THREADS = 256;

// stats[m, n] of all rows, one group of lanes for each.
__global__ void __launch_bounds__(STATS_THREADS)
row_stats_kernel(const Rows rows, bool entropy, Stats* __restrict__ stats) {
  const int groups = STATS_THREADS / rows.lanes;
  const int64_t M = rows.logits.M, N = rows.logits.N, count = M * N;
  const int64_t group = int64_t(threadIdx.x) / rows.lanes;
  for (int64_t begin = int64_t(blockIdx.x) * groups; begin < count;
       begin += int64_t(gridDim.x) * groups) {
    const bool mine = begin + group < count;
    const int64_t row = mine ? begin + group : count - 1;
    const Stats s = stats_of(rows, row / N, row % N, entropy);
    if (mine && threadIdx.x % rows.lanes == 0) stats[row] = s;
  }
}

// What JS and KL share: reading an element and the softmax of its row.
template <class Tiles_>
struct DivergenceOp {
  using Tiles = Tiles_;
  using Sum = float;
  using Raw = float;
  // JS has no registers left to load ahead, and its logarithms take longer than a load.
  static constexpr bool AHEAD = Tiles::DIRECTED;
  static constexpr int PACKED = 1;

  Rows rows;
  Stats* stats;      // [M, N]
  int64_t examples;  // between calls of prepare
  bool fused;        // whether prepare makes the stats

  __device__ __forceinline__ int classes() const { return int(rows.logits.C); }

  __device__ __forceinline__ int64_t at(int64_t m, int64_t n, int c) const {
    const Logits& x = rows.logits;
    return m * x.stride_m + n * x.stride_n + c * x.stride_c;
  }
  __device__ __forceinline__ int64_t step() const { return rows.logits.stride_m; }

  template <class F>
  __device__ __forceinline__ void with_data(F&& f) const {
    with_element(rows.logits.dtype, rows.logits.data, f);
  }
  template <class T>
  static __device__ __forceinline__ float read(T x) {
    return to_float(x);
  }
  __device__ __forceinline__ float logit(int64_t m, int64_t n, int c) const {
    float x;
    with_data([&](const auto* data) { x = to_float(data[at(m, n, c)]); });
    return x;
  }

  __device__ __forceinline__ const Stats* stats_at(int64_t m, int64_t n) const {
    return stats + m * rows.logits.N + n;
  }
  __device__ __forceinline__ int64_t stats_step() const { return rows.logits.N; }

  __device__ __forceinline__ void prepare(const Tile& tile, int64_t first, int64_t last,
                                          bool entropy) const {
    if (!fused) return;
    const int groups = PAIR_THREADS / rows.lanes, count = int(last - first) * tile.ni;
    const int group = int(threadIdx.x) / rows.lanes;
    for (int begin = 0; begin < count; begin += groups) {
      const bool mine = begin + group < count;
      const int index = mine ? begin + group : count - 1;
      const int64_t m = tile.i0 + index / int(last - first), n = first + index % int(last - first);
      const Stats s = stats_of(rows, m, n, entropy);
      if (mine && threadIdx.x % rows.lanes == 0) stats[m * rows.logits.N + n] = s;
    }
  }

  static __device__ __forceinline__ void over_warp(float (&sums)[SLOTS],
                                                   double (&total)[SLOTS / 32]) {
    warp_sums(sums, total);
  }

  static __device__ __forceinline__ bool is_close(double sum, double count) {
    return sum < double(CLOSE) * count;
  }
};

struct JsOp : DivergenceOp<Tiling<16, 8, false>> {
  using Value = float;  // a probability

  __device__ __forceinline__ void prepare(const Tile& tile, int64_t first, int64_t last) const {
    DivergenceOp::prepare(tile, first, last, true);
  }

  // Never 0, so that the logarithm of a sum of two is finite; too small to change any sum.
  static __device__ __forceinline__ float nothing() { return 1e-37f; }

  static __device__ __forceinline__ float value(float x, const Stats* row) {
    return exp_of(x - row->x) * row->y + nothing();
  }

  template <int ROWS>
  static __device__ __forceinline__ void settle(float (&)[ROWS], unsigned*) {}

  // The t of an example sum to 2: the error of the logarithm makes at most 1.7e-7 nats of JS.
  static __device__ __forceinline__ void add(float (&sums)[SLOTS], int slot, float p, float q) {
    const float t = p + q;
    sums[slot] += t * log2_quick(t);
  }

  __device__ __forceinline__ double self(int64_t m, int64_t n) const {
    const Stats s = *stats_at(m, n);
    return double(s.z) + double(s.w);
  }

  static __device__ __forceinline__ double finish(double sum, double h, double g, double count) {
    return 0.6931471805599453 * (count - 0.5 * sum) - 0.5 * (h + g);
  }

  __device__ __forceinline__ float accurate(int64_t i, int64_t j, int64_t n, int c) const {
    return js_term(value(logit(i, n, c), stats_at(i, n)), value(logit(j, n, c), stats_at(j, n)));
  }
};

struct Likely {
  float p, ln_p;
};

struct KlOp : DivergenceOp<Tiling<8, 8, true>> {
  using Value = Likely;

  __device__ __forceinline__ void prepare(const Tile& tile, int64_t first, int64_t last) const {
    DivergenceOp::prepare(tile, first, last, false);
  }

  static __device__ __forceinline__ Likely nothing() { return {0.0f, 0.0f}; }

  static __device__ __forceinline__ Likely value(float x, const Stats* row) {
    const float d = x - row->x;
    return {exp_of(d) * row->y, d - row->z};
  }

  // Where ln p is -inf it becomes 0, and `lost` remembers who is infinitely far from that row: all
  // with p > 0.
  template <int ROWS>
  static __device__ __forceinline__ void settle(Likely (&value)[ROWS], unsigned* lost) {
    unsigned gone = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const bool never = value[row].ln_p == -INFINITY;
      gone |= unsigned(never) << row;
      value[row].ln_p = never ? 0.0f : value[row].ln_p;
    }
    if (gone == 0) return;
    unsigned there = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) there |= unsigned(value[row].p > 0.0f) << row;
    for (int row = 0; row < ROWS; ++row) {
      if (gone >> row & 1) atomicOr(lost + row, there);
    }
  }

  static __device__ __forceinline__ void add(float (&sums)[SLOTS], int slot, const Likely& a,
                                             const Likely& b) {
    const float d = a.ln_p - b.ln_p;
    sums[slot] += a.p * d;
    sums[slot + SLOTS / 2] -= b.p * d;
  }

  // 0, or NaN where the row is.
  __device__ __forceinline__ double self(int64_t m, int64_t n) const {
    const float z = stats_at(m, n)->z;
    return double(z - z);
  }

  static __device__ __forceinline__ double finish(double sum, double h, double g, double) {
    return sum + h + g;
  }

  __device__ __forceinline__ float accurate(int64_t i, int64_t j, int64_t n, int c) const {
    Likely pair[2] = {value(logit(i, n, c), stats_at(i, n)),
                      value(logit(j, n, c), stats_at(j, n))};
    for (Likely& v : pair) v.ln_p = v.ln_p == -INFINITY ? 0.0f : v.ln_p;
    if (pair[0].p == 0.0f) return pair[1].p;
    return kl_term_log(pair[0].p, pair[1].p, pair[1].ln_p - pair[0].ln_p);
  }
};

struct Layout {
  PairPlan plan;
  int64_t stats;  // bytes
};

template <class Op>
Layout layout_of(int64_t M, int64_t N, int64_t C) {
  return {plan_pairs(Op::Tiles::count(M), N, C), M * N * int64_t(sizeof(Stats))};
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

template <class Op>
int launch(const Logits& logits, void* workspace, float* out, void* stream) {
  const Layout layout = layout_of<Op>(logits.M, logits.N, logits.C);
  Op op;
  op.rows = rows_of(logits);
  op.stats = static_cast<Stats*>(workspace);
  op.fused = layout.plan.tiles == 1;
  const int64_t elements = op.fused ? CHUNK_ELEMENTS : int64_t(FLUSH) * PAIR_THREADS;
  op.examples = std::max<int64_t>(1, elements / logits.C);
  if (!op.fused && logits.N > 0) {
    constexpr bool ENTROPY = !Op::Tiles::DIRECTED;
    const int64_t blocks = ceil_div(logits.M * logits.N, STATS_THREADS / op.rows.lanes);
    const dim3 grid(unsigned(std::min<int64_t>(blocks, 1 << 20)), 1, 1);
    LSF_LAUNCH(row_stats_kernel, grid, dim3(STATS_THREADS, 1, 1), 0, stream, op.rows, ENTROPY, op.stats);
  }
  auto* sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + aligned(layout.stats));
  launch_pairs(op, layout.plan, logits.M, logits.N, sums, out, stream);
  return int(cudaGetLastError());
}

}  // namespace

int64_t pairwise_divergence_cuda_workspace(int64_t M, int64_t N, int64_t C, Divergence kind) {
  if (M == 0) return 0;
  if (kind == Divergence::disagreement) {
    return aligned(M * N * int64_t(sizeof(int32_t))) + pairwise_disagreement_cuda_workspace(M, N);
  }
  const Layout layout = kind == Divergence::js ? layout_of<JsOp>(M, N, C)
                                               : layout_of<KlOp>(M, N, C);
  return aligned(layout.stats) + layout.plan.sums() * int64_t(sizeof(double));
}

int pairwise_divergence_cuda(const Logits& logits, Divergence kind, void* workspace, float* out,
                             void* stream) {
  if (logits.M == 0) return int(cudaSuccess);
  if (logits.C < 1 || logits.C > MOST_CLASSES) return int(cudaErrorInvalidValue);
  if (kind == Divergence::disagreement) {
    const int64_t M = logits.M, N = logits.N;
    auto* labels = static_cast<int32_t*>(workspace);
    if (const int error = labels_of_logits_cuda(logits, labels, stream)) return error;
    void* rest = static_cast<char*>(workspace) + aligned(M * N * int64_t(sizeof(int32_t)));
    return pairwise_disagreement_cuda({labels, 4, M, N, N, 1}, rest, out, stream);
  }
  return kind == Divergence::js ? launch<JsOp>(logits, workspace, out, stream)
                                : launch<KlOp>(logits, workspace, out, stream);
}

}  // namespace landscape_fast
