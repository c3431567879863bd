// One block of KL's product for 9 to 128 members: the cross terms sum of P L' over its examples.
//
// L' = ln p - centre, where the centre of an example and class is the mean of ln p over the
// members, weighted with p. Any number would do, since KL_ij is the difference of the cross terms
// of (i, i) and (i, j), but the nearer the members the smaller is L', and with it every rounding.
// (Weighted, so that a member that all but rules a class out takes no digits from those that do
// not.) P and L' are scaled and split into two float16 each, 22 bits, and all products but that of
// the low parts are added: in float32 over some steps and in float64 beyond. (bfloat16 would need
// no scales, but two of them have 16 bits, and only many examples would make up for that.)
//
// A step takes KB classes of all members: 256 threads make the operands in shared memory, of 8
// members and 2 classes each, then every warp multiplies a tile of members, or a slice of the
// classes where there are fewer tiles than warps.
#pragma once

#include "cuda/kl_shape.h"

namespace landscape_fast {

// ONLINE: rows are read once. What they are taken relative to is not their largest logit but the
// largest of their first ones, whatever they sum to is divided by at the end of each example, and
// an example where that was too far off is done again. Otherwise the statistics of a group of
// examples are made first, and the second read finds short rows in the L2 cache.
template <int MEMBERS, bool ONLINE>
struct KlBlock {
  using S = KlShape<MEMBERS>;

  const KlJob& job;
  __half* operand;    // [4][MEMBERS][PITCH] shared: high and low parts of P, then of L'
  float4* part;       // [GROUPS][COLUMNS] shared: of the centres of two classes
  Span* spans;        // [SPANS][MEMBERS] shared
  float* scale;       // [MEMBERS] shared: 1 / sum of the row, 0 where it has none
  float* from;        // [MEMBERS] shared: what rows are taken relative to
  double* of_spans;   // [SPANS][MEMBERS] shared: sums of exponentials
  unsigned* columns;  // [2][KB / 32] shared: in which someone is far, and someone has p > 0
  int* seen;          // [2] shared

  static constexpr int FAR_BELOW = 0, FAR_ABOVE = 1;

  __device__ __forceinline__ int M() const { return int(job.rows.logits.M); }
  __device__ __forceinline__ int C() const { return int(job.rows.logits.C); }
  __device__ __forceinline__ float4& stats_at(int m, int64_t n) const {
    return job.stats[m * job.rows.logits.N + n];
  }
  __device__ __forceinline__ __half* at(int which, int m, int k) const {
    return operand + (which * MEMBERS + m) * S::PITCH + k;
  }
  __device__ __forceinline__ float logit(int m, int64_t n, int c) const {
    const Logits& x = job.rows.logits;
    float value;
    with_element(x.dtype, x.data, [&](const auto* data) {
      value = to_float(data[m * x.stride_m + n * x.stride_n + c * x.stride_c]);
    });
    return value;
  }
  static __device__ __forceinline__ int column() { return int(threadIdx.x) % S::COLUMNS; }
  static __device__ __forceinline__ int group() { return int(threadIdx.x) / S::COLUMNS; }
  static __device__ __forceinline__ int member(int r) { return group() + r * S::GROUPS; }

  // Where a pair of elements of a member's operand lies: two of them in one word.
  __device__ __forceinline__ uint32_t& word(int which, int m) const {
    return *reinterpret_cast<uint32_t*>(at(which, m, 2 * column()));
  }

  __device__ __forceinline__ double& of_span(int m) const {
    return of_spans[column() / S::LANES_OF_ROW * MEMBERS + m];
  }

  // Two numbers of this thread, kept where it will write its words of L'.
  __device__ __forceinline__ void keep(int m, float x0, float x1) const {
    word(2, m) = uint32_t(bits_of(x0));
    word(3, m) = uint32_t(bits_of(x1));
  }

  // Keeps the logits of this thread's members for elements e and e + 1 of those from example
  // `first` on, and finds the examples. NaN beyond the members, -inf beyond the elements.
  __device__ __forceinline__ void load(int64_t first, int e, int count, Folding<Larger>& top,
                                       int (&example)[2]) const {
    const Logits& logits = job.rows.logits;
    first = recomputed(first);
    int64_t of[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int mine = e + k < count ? e + k : count - 1;
      example[k] = ONLINE ? 0 : mine / C();
      of[k] = (first + example[k]) * logits.stride_n + (mine - example[k] * C()) * logits.stride_c +
              group() * logits.stride_m;
    }
    const int64_t step = recomputed(S::GROUPS * logits.stride_m);
    const int members = recomputed(M() - group());
    float x[OWN][2];
    with_element(logits.dtype, logits.data, [&](const auto* data) {
      const decltype(data) from[2] = {data + of[0], data + of[1]};
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          x[r][k] = r * S::GROUPS < members ? to_float(from[k][r * step]) : NAN;
        }
      }
    });
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
#pragma unroll
      for (int k = 0; k < 2; ++k) x[r][k] = e + k < count ? x[r][k] : -INFINITY;
      if (ONLINE) top.add(r, fmaxf(x[r][0], x[r][1]));
      keep(member(r), x[r][0], x[r][1]);
    }
    in_order();
  }

  // The largest logit of every row in this warp's span, from those of the threads.
  __device__ __forceinline__ void find_spans(float mine) const {
    for (int o = 8; o < S::LANES_OF_ROW; o *= 2) {
      mine = fmaxf(mine, __shfl_xor_sync(WHOLE_WARP, mine, o));
    }
    const int lane = int(threadIdx.x) % S::LANES_OF_ROW;
    if (lane < OWN) {
      const int m = member(lane);
      const float above = mine - from[m];
      if (above > FARTHEST) seen[FAR_ABOVE] = 1;
      const float factor = above <= FARTHEST ? exp_of(above) / (1 << P_BITS) : 0.0f;
      spans[column() / S::LANES_OF_ROW * MEMBERS + m] = {mine == -INFINITY ? 0.0f : mine, factor};
    }
    __syncthreads();
  }

  // The operands for elements [begin, begin + KB) of those from example `first` on, of which there
  // are `count`.
  __device__ __forceinline__ void build(int64_t first, int begin, int count) const {
    int example[2];
    bool far = false;
    Folding<Larger> top;
    Folding<Sum> sums;
    load(first, begin + 2 * column(), count, top, example);
    if (ONLINE) find_spans(top.result);
    float4 centre{};
#pragma unroll(ONLINE ? OWN : 1)
    for (int r = 0; r < OWN; ++r) {
      const int m = member(r);
      float x[2] = {float_at(word(2, m)), float_at(word(3, m))}, p[2], weight[2];
      if (ONLINE) {
        const Span span = spans[column() / S::LANES_OF_ROW * MEMBERS + m];
        const float origin = from[m], d[2] = {x[0] - span.top, x[1] - span.top};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          p[k] = exp_scaled<P_BITS>(d[k]);
          weight[k] = p[k] * span.factor;
          x[k] -= origin;
        }
        const float below = d[0] + d[1];  // a NaN makes the row NaN
        sums.add(r, below == below ? weight[0] + weight[1] : below);
      } else {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float4 row = m < M() ? stats_at(m, first + example[k]) : float4{};
          const float by = row.z - row.z == 0.0f ? row.y : 0.0f;
          p[k] = weight[k] = exp_scaled<P_BITS>(x[k] - row.x) * by;
          x[k] = (x[k] - row.x) - row.z;
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        far |= x[k] < LEAST_LN_P;
        x[k] = fmaxf(x[k], LEAST_LN_P);  // no NaN; nor inf, unless the example is done again
      }
      centre.x += weight[0] * x[0];
      centre.y += weight[0];
      centre.z += weight[1] * x[1];
      centre.w += weight[1];
      split_pair(p[0], p[1], word(0, m), word(1, m));
      keep(m, x[0], x[1]);
    }
    if (ONLINE) {
      float sum = sums.result;
      for (int o = 8; o < S::LANES_OF_ROW; o *= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, o);
      const int lane = int(threadIdx.x) % S::LANES_OF_ROW;
      if (lane < OWN) of_span(member(lane)) += double(sum);
    }
    part[threadIdx.x] = centre;
    __syncthreads();
    float4 whole{};
#pragma unroll
    for (int g = 0; g < S::GROUPS; ++g) {
      const float4 one = part[g * S::COLUMNS + column()];
      whole.x += one.x, whole.y += one.y, whole.z += one.z, whole.w += one.w;
    }
    const float middle[2] = {L_SCALE * (whole.x / fmaxf(whole.y, 1e-30f)),
                             L_SCALE * (whole.z / fmaxf(whole.w, 1e-30f))};
    if (far && whole.y + whole.w > 0.0f) seen[FAR_BELOW] = 1;
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
      const int m = member(r);
      const float x[2] = {float_at(word(2, m)), float_at(word(3, m))};
      split_pair(L_SCALE * x[0] - middle[0], L_SCALE * x[1] - middle[1], word(2, m), word(3, m));
    }
    __syncthreads();
  }

  static constexpr int DOWN = S::TM / 16, OVER = S::TN / 8;  // products of a warp
  using Sums = float[DOWN][OVER][4];

  // Where a thread's warp multiplies.
  struct Tile {
    int lane, row, column, slice;

    __device__ __forceinline__ explicit Tile(int thread)
        : lane(thread % 32),
          row(thread / 32 % S::TILES / S::ACROSS * S::TM),
          column(thread / 32 % S::TILES % S::ACROSS * S::TN),
          slice(thread / 32 / S::TILES) {}
  };

  // Adds the step's products to the sums of this warp.
  __device__ __forceinline__ void multiply(Sums& sums) const {
    const Tile tile(recomputed(int(threadIdx.x)));
    const int lane = tile.lane, row = lane % 16, half = lane / 16 * 8;
    // Of L' each matrix of 8 by 8 is the next along the classes, then along the members.
    const int other_row = lane % 8 + lane / 16 * 8, other_half = lane / 8 % 2 * 8;
    const Span* const span = spans + tile.slice * S::SLICE / (S::KB / S::SPANS) * MEMBERS;
    float factor[DOWN][2];
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[i][h] = ONLINE ? span[tile.row + 16 * i + 8 * h + lane / 4].factor : 1.0f;
      }
    }
#pragma unroll 1
    for (int k = 0; k < S::SLICE; k += 16) {
      const int base = tile.slice * S::SLICE + k;
      uint32_t p[DOWN][2][4];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          load_matrices<false>(at(w, tile.row + 16 * i + row, base + half), p[i][w]);
        }
      }
#pragma unroll
      for (int j = 0; j < OVER; j += 2) {
        uint32_t l[2][4];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int m = tile.column + 8 * j + other_row;
          load_matrices<false>(at(2 + w, m, base + other_half), l[w]);
        }
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const uint32_t high[2] = {l[0][2 * b], l[0][2 * b + 1]};
            const uint32_t low[2] = {l[1][2 * b], l[1][2 * b + 1]};
            float few[4] = {};  // tensor cores round to zero: a long sum of theirs would be short
            mma<__half>(few, p[i][0], low);
            mma<__half>(few, p[i][1], high);
            mma<__half>(few, p[i][0], high);
#pragma unroll
            for (int v = 0; v < 4; ++v) sums[i][j + b][v] += factor[i][v / 2] * few[v];
          }
        }
      }
    }
  }

  __device__ __forceinline__ void drop(Sums& sums) const {
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
      for (int j = 0; j < OVER; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) sums[i][j][v] = 0;
      }
    }
  }

  __device__ __forceinline__ double* cross_of(int slice) const {
    return job.cross + (int64_t(blockIdx.x) * S::SLICES + slice) * MEMBERS * MEMBERS;
  }

  // Adds the sums to those in float64, or writes them if they are the first; then they are 0.
  __device__ __forceinline__ void flush(Sums& sums, bool first) const {
    const Tile tile(recomputed(int(threadIdx.x)));
    double* const cross = cross_of(tile.slice);
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = tile.row + 16 * i + 8 * h + tile.lane / 4;
        const double by = ONLINE ? P_SCALE * UNSCALE * double(scale[row]) : UNSCALE;
#pragma unroll
        for (int j = 0; j < OVER; ++j) {
          const int column = tile.column + 8 * j + 2 * (tile.lane % 4);
          auto* const to = reinterpret_cast<double2*>(cross + row * MEMBERS + column);
          double2 sum = first ? make_double2(0, 0) : *to;
          sum.x += by * double(sums[i][j][2 * h]);
          sum.y += by * double(sums[i][j][2 * h + 1]);
          *to = sum;
          in_order();
        }
      }
    }
    drop(sums);
  }

  // How far below LEAST_LN_P a logit of that row was when build() cut it off there: less than 0, or
  // it was not.
  __device__ __forceinline__ float cut_off(float x, const float4& row) const {
    return (ONLINE ? x - row.x : kl_value(x, row).ln_p) - LEAST_LN_P;
  }

  // What was left out of the cross terms of elements [begin, begin + KB): p times what was cut off
  // of the other, infinite where its logit is -inf. The sums in float64 have been begun.
  __device__ __forceinline__ void add_far(int64_t first, int begin, int count) const {
    constexpr int WORDS = S::KB / 32;
    const int thread = int(threadIdx.x), lane = thread % 32;
    if (thread < 2 * WORDS) columns[thread] = 0;
    __syncthreads();
    for (int i = thread; i < M() * S::KB; i += KL_THREADS) {
      const int k = i % S::KB, e = begin + k;
      if (e >= count) continue;
      const int64_t n = first + e / C();
      const float x = logit(i / S::KB, n, e % C());
      const float4 row = stats_at(i / S::KB, n);
      if (cut_off(x, row) < 0) atomicOr(columns + k / 32, 1u << k % 32);
      if (kl_value(x, row).p > 0.0f) atomicOr(columns + WORDS + k / 32, 1u << k % 32);
    }
    __syncthreads();
    for (int j = thread / 32; j < M(); j += KL_WARPS) {
      double sum[S::WORDS] = {};
      for (int word = 0; word < WORDS; ++word) {
        for (unsigned left = columns[word] & columns[WORDS + word]; left; left &= left - 1) {
          const int e = begin + 32 * word + __ffs(int(left)) - 1, c = e % C();
          const int64_t n = first + e / C();
          const float below = cut_off(logit(j, n, c), stats_at(j, n));
          if (!(below < 0)) continue;
#pragma unroll
          for (int w = 0; w < S::WORDS; ++w) {
            const int i = 32 * w + lane;
            const float p = i < M() ? kl_value(logit(i, n, c), stats_at(i, n)).p : 0.0f;
            if (p > 0.0f) sum[w] += double(p) * double(below);
          }
        }
      }
#pragma unroll
      for (int w = 0; w < S::WORDS; ++w) {
        const int i = 32 * w + lane;
        if (i < M() && sum[w] != 0) cross_of(0)[i * MEMBERS + j] += sum[w];
      }
    }
    __syncthreads();
  }

  // Statistics of example n, and the scales of its rows.
  __device__ __forceinline__ void close_example(int64_t n) const {
    const int m = int(threadIdx.x);
    if (m < MEMBERS) {
      double sum = 0;
      for (int s = 0; s < S::SPANS; ++s) sum += of_spans[s * MEMBERS + m];
      const float4 row = kl_stats(from[m], sum);
      scale[m] = m < M() && row.z - row.z == 0.0f ? row.y : 0.0f;
      if (m < M()) stats_at(m, n) = row;
    }
    __syncthreads();
  }

  // Begins an example: what its rows are taken relative to is the largest of the first logits that
  // are not all -inf, or of all.
  __device__ __forceinline__ void find_from(int64_t n, bool all) const {
    const int lane = int(threadIdx.x) % 32;
    for (int m = int(threadIdx.x) / 32; m < MEMBERS; m += KL_WARPS) {
      float top = -INFINITY;
      for (int c = 0; c < C() && m < M() && (all || top == -INFINITY); c += 32) {
        top = fmaxf(top, c + lane < C() ? logit(m, n, c + lane) : -INFINITY);
        for (int o = 16; o > 0; o /= 2) top = fmaxf(top, __shfl_xor_sync(WHOLE_WARP, top, o));
      }
      if (lane == 0) from[m] = top;
      if (lane < S::SPANS) of_spans[lane * MEMBERS + m] = 0;
    }
  }
};

}  // namespace landscape_fast
