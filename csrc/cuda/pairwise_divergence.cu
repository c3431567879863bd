// Pairwise JS and KL of M members over N examples of C classes.
//
// First the softmax of every row. With a single tile of members the blocks of pair_tiles_kernel
// make it for the rows that they are about to use (the logits then come from HBM once), else
// row_stats_kernel does. Then the tiles of pairs: JS takes a logarithm per pair and class, KL
// differences of logarithms, which needs no centring, and an FMA in each direction; of more than a
// few members it is a product on tensor cores (pairwise_divergence_kl.h).
//
// JS in cycles of a warp scheduler on an H200 (an estimate: instructions that nvcc 13.0 makes for
// sm_90, of one dtype): for an element of 16 members about 1140 issued, while their 120 logarithms
// keep the special function unit busy for 960; with 8 others about 1300, and 1024. So what is
// issued binds, at 1.2 to 1.3 times the limit of that unit: a logarithm by polynomial, a dozen
// instructions, would cost more than the 8 cycles it saves; doing less for each row would help.
#include <cfloat>

#include "cuda/labels.h"
#include "cuda/pair_tiles.h"
#include "cuda/pairwise_divergence_kl.h"
#include "cuda/quick.h"
#include "cuda/row_stats.h"

namespace landscape_fast {
namespace {

constexpr int STATS_THREADS = 256;

// Statistics of all rows, one group of lanes for each.
__global__ void __launch_bounds__(STATS_THREADS, 3)
row_stats_kernel(const Rows rows, const Stats stats) {
  const int groups = STATS_THREADS / rows.lanes;
  const int64_t N = rows.logits.N, count = rows.logits.M * N;
  const int64_t group = int64_t(threadIdx.x) / rows.lanes;
  for (int64_t begin = int64_t(blockIdx.x) * groups; begin < count;
       begin += int64_t(gridDim.x) * groups) {
    const bool mine = begin + group < count;
    const int64_t row = mine ? begin + group : count - 1;
    make_stats(rows, row / N, row % N, stats, mine);
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
  Stats stats;
  int64_t examples;  // between calls of prepare
  bool fused;        // whether prepare makes the statistics

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

  __device__ __forceinline__ const float4* stats_at(int64_t m, int64_t n) const {
    return stats.rows + m * rows.logits.N + n;
  }
  __device__ __forceinline__ int64_t stats_step() const { return rows.logits.N; }

  __device__ __forceinline__ void prepare(const Tile& tile, int64_t first, int64_t last) const {
    if (!fused) return;
    make_stats_of<PAIR_THREADS>(rows, tile.i0, tile.ni, first, last, stats);
  }

  static __device__ __forceinline__ void over_warp(float (&sums)[SLOTS],
                                                   double (&total)[SLOTS / 32]) {
    warp_sums(sums, total);
  }

  static __device__ __forceinline__ bool is_close(double sum, double count) {
    return sum < double(CLOSE) * count;
  }
};

// JS(i, j) = sum of (g_i + g_j - ln 2 t log2 t) / 2 over the classes, with t = p_i + p_j and g = p
// (ln p + ln 2). What is linear in functions of one member is known for a whole row from its
// softmax, in float64. So a pair adds 2 g_i / ln 2 - t log2 t: one operation more than t log2 t,
// but as small as the members are close, and so are the roundings of its sum. What a row's 2 g / ln
// 2, as rounded here, add up to is known as well: `about` is (sum of g - ln 2 times that, sum of
// g).
struct JsOp : DivergenceOp<Tiling<16, 8, false>> {
  struct Value {
    float p, twice_g;
  };

  // Never 0, so that the logarithm of a sum of two is finite; too small to change any sum.
  static constexpr float TINY = 1e-37f;
  static __device__ __forceinline__ Value nothing() { return {TINY, 0.0f}; }

  static __device__ __forceinline__ Value value(float x, const float4* row) {
    const float below = x - row->x, d = below < -105.0f ? -105.0f : below;  // 0 * -inf is 0 here
    const float p = exp_scaled<0>(d) * row->y;  // a NaN is in row->y too
    return {p + TINY, p * fmaf(d, TWICE_LOG2_E, row->z)};
  }

  template <int ROWS>
  static __device__ __forceinline__ void settle(Value (&)[ROWS], unsigned*) {}

  // The t of an example sum to 2: the error of the logarithm makes at most 1.7e-7 nats of JS.
  static __device__ __forceinline__ void add(float (&sums)[SLOTS], int slot, const Value& i,
                                             const Value& j) {
    const float t = i.p + j.p;
    sums[slot] += i.twice_g - t * log2_quick(t);
  }

  __device__ __forceinline__ double2 self(int64_t m, int64_t n) const {
    return stats.about[m * rows.logits.N + n];
  }

  static __device__ __forceinline__ double finish(double sum, double of_i, double of_j) {
    return 0.5 * (LN_2 * sum + of_i + of_j);
  }

  __device__ __forceinline__ float accurate(int64_t i, int64_t j, int64_t n, int c) const {
    return js_term(value(logit(i, n, c), stats_at(i, n)).p,
                   value(logit(j, n, c), stats_at(j, n)).p);
  }
};

struct KlOp : DivergenceOp<Tiling<8, 8, true>> {
  using Value = KlValue;

  static __device__ __forceinline__ Value nothing() { return {0.0f, 0.0f}; }

  static __device__ __forceinline__ Value value(float x, const float4* row) {
    return kl_value(x, *row);
  }

  // Where ln p is -inf it becomes 0, and `lost` remembers who is infinitely far from that row: all
  // with p > 0.
  template <int ROWS>
  static __device__ __forceinline__ void settle(Value (&value)[ROWS], unsigned* lost) {
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

  static __device__ __forceinline__ void add(float (&sums)[SLOTS], int slot, const Value& i,
                                             const Value& j) {
    const float d = i.ln_p - j.ln_p;
    sums[slot] += i.p * d;
    sums[slot + SLOTS / 2] -= j.p * d;
  }

  // 0, or NaN where the row is.
  __device__ __forceinline__ double2 self(int64_t m, int64_t n) const {
    const float z = stats_at(m, n)->z;
    return make_double2(double(z - z), double(z - z));
  }

  static __device__ __forceinline__ double finish(double sum, double of_i, double of_j) {
    return sum + of_i + of_j;
  }

  __device__ __forceinline__ float accurate(int64_t i, int64_t j, int64_t n, int c) const {
    return kl_accurate(value(logit(i, n, c), stats_at(i, n)),
                       value(logit(j, n, c), stats_at(j, n)));
  }
};

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// The workspace: statistics of the rows, then the sums of the tiles.
template <class Op>
struct Layout {
  static constexpr bool JS = !Op::Tiles::DIRECTED;
  PairPlan plan;
  int64_t rows, about;  // bytes

  Layout(int64_t M, int64_t N, int64_t C)
      : plan(plan_pairs(Op::Tiles::count(M), N, C)),
        rows(aligned(M * N * int64_t(sizeof(float4)))),
        about(JS ? aligned(M * N * int64_t(sizeof(double2))) : 0) {}

  int64_t bytes() const { return rows + about + plan.sums() * int64_t(sizeof(double)); }
};

template <class Op>
int launch(const Logits& logits, void* workspace, float* out, double* total, void* stream) {
  const Layout<Op> layout(logits.M, logits.N, logits.C);
  char* const at = static_cast<char*>(workspace);
  Op op;
  op.rows = rows_of(logits);
  op.stats.rows = reinterpret_cast<float4*>(at);
  op.stats.about = layout.JS ? reinterpret_cast<double2*>(at + layout.rows) : nullptr;
  op.fused = layout.plan.tiles == 1;
  const int64_t elements = op.fused ? CHUNK_ELEMENTS : int64_t(FLUSH) * PAIR_THREADS;
  op.examples = std::max<int64_t>(1, elements / logits.C);
  if (!op.fused && logits.N > 0) {
    const int64_t blocks = ceil_div(logits.M * logits.N, STATS_THREADS / op.rows.lanes);
    const dim3 grid(unsigned(std::min<int64_t>(blocks, 1 << 20)), 1, 1);
    LSF_LAUNCH(row_stats_kernel, grid, dim3(STATS_THREADS, 1, 1), 0, stream, op.rows, op.stats);
  }
  auto* sums = reinterpret_cast<double*>(at + layout.rows + layout.about);
  launch_pairs(op, layout.plan, logits.M, logits.N, sums, out, total, stream);
  return int(cudaGetLastError());
}

}  // namespace

int64_t pairwise_divergence_cuda_workspace(int64_t M, int64_t N, int64_t C, Divergence kind) {
  if (M == 0) return 0;
  if (kind == Divergence::js) return Layout<JsOp>(M, N, C).bytes();
  if (kind == Divergence::kl) {
    if (pairwise_kl_is_for(M, C)) return pairwise_kl_cuda_workspace(M, N, C);
    return Layout<KlOp>(M, N, C).bytes();
  }
  return aligned(M * N * int64_t(sizeof(int32_t))) + pairwise_disagreement_cuda_workspace(M, N);
}

int pairwise_divergence_cuda(const Logits& logits, Divergence kind, void* workspace, float* out,
                             double* sums, void* stream) {
  if (logits.M == 0) return int(cudaSuccess);
  if (logits.C < 1 || logits.C > MOST_CLASSES) return int(cudaErrorInvalidValue);
  if (kind == Divergence::disagreement) {
    const int64_t M = logits.M, N = logits.N;
    auto* labels = static_cast<int32_t*>(workspace);
    if (const int error = labels_of_logits_cuda(logits, labels, stream)) return error;
    void* rest = static_cast<char*>(workspace) + aligned(M * N * int64_t(sizeof(int32_t)));
    return pairwise_disagreement_cuda({labels, 4, M, N, N, 1}, rest, out, sums, stream);
  }
  if (kind == Divergence::kl && pairwise_kl_is_for(logits.M, logits.C)) {
    return pairwise_kl_cuda(logits, workspace, out, sums, stream);
  }
  return kind == Divergence::js ? launch<JsOp>(logits, workspace, out, sums, stream)
                                : launch<KlOp>(logits, workspace, out, sums, stream);
}

}  // namespace landscape_fast
