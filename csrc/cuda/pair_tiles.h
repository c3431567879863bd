// Sums over examples for every pair of M members, as tiles of pairs: a thread keeps the sums of all
// pairs of a tile in registers and runs along (example, class); what it reads serves the whole
// tile.
//
// Tiles on the diagonal hold the pairs among TI members, the others those of TI members with TJ
// later ones. The examples are cut into chunks that depend on the shape alone, one block for each
// tile and chunk, and everything is added in a fixed order: float32 within a thread for FLUSH
// elements, then over the warp, float64 beyond. The tile is the fast grid index, so that all tiles
// read a chunk from L2 at about the same time.
#pragma once

#include <algorithm>

#include "cuda/access.h"
#include "cuda/reduce.h"

namespace landscape_fast {

constexpr int PAIR_THREADS = 128;
constexpr int PAIR_WARPS = PAIR_THREADS / 32;
constexpr int SLOTS = PAIR_THREADS;        // sums of a tile, one for each thread in the end
constexpr int SELF_SLOTS = 16;             // then one for each member of a diagonal tile
constexpr int PITCH = SLOTS + SELF_SLOTS;  // of a tile's sums over one chunk
constexpr int FLUSH = 128;                 // elements that a thread adds before float64 takes over
constexpr int64_t PAIR_BLOCKS = 1056;      // at most about as many: 4 waves of 2 on 132 SMs
constexpr int64_t CHUNK_ELEMENTS = 1024;   // of a chunk, at least

// Members i0 .. i0 + ni, and on a diagonal tile the same again, else j0 .. j0 + nj.
struct Tile {
  int64_t i0, j0;
  int ni, nj;
  bool diagonal;
};

// A pair as rows of its tile: those of i first, then those of j. KL goes from `from` to `to`.
struct RowPair {
  int from, to;
};

template <int TI_, int TJ_, bool DIRECTED_>
struct Tiling {
  static constexpr int TI = TI_, TJ = TJ_;
  static constexpr bool DIRECTED = DIRECTED_;
  static constexpr int HALF = DIRECTED ? SLOTS / 2 : SLOTS;  // slots from HALF on: the way back
  static_assert(TI * TJ <= HALF && TI * (TI - 1) / 2 <= HALF && TI <= SELF_SLOTS, "slots");

  static __host__ __device__ int64_t groups(int64_t M) { return ceil_div(M, TI); }

  static int64_t count(int64_t M) {
    int64_t tiles = groups(M);
    for (int64_t i = TI; i < M; i += TI) tiles += ceil_div(M - i, TJ);
    return tiles;
  }

  static __device__ __forceinline__ Tile at(int64_t index, int64_t M) {
    const int64_t diagonals = groups(M);
    if (index < diagonals) {
      const int64_t i0 = index * TI;
      const int ni = int(M - i0 < TI ? M - i0 : TI);
      return {i0, i0, ni, ni, true};
    }
    index -= diagonals;
    int64_t i0 = 0;
    for (int64_t across; (across = ceil_div(M - i0 - TI, TJ)) <= index; i0 += TI) index -= across;
    const int64_t j0 = i0 + TI + index * TJ;
    return {i0, j0, TI, int(M - j0 < TJ ? M - j0 : TJ), false};
  }

  // The slot of the pair of row i and row j (of the second group of rows).
  static __host__ __device__ constexpr int slot(bool diagonal, int i, int j) {
    return diagonal ? j * (j - 1) / 2 + i : j * TI + i;
  }

  // The inverse; from = -1 where a slot has no pair in this tile.
  static __device__ __forceinline__ RowPair pair(const Tile& tile, int slot) {
    const bool back = slot >= HALF;
    slot -= back ? HALF : 0;
    int i, j;
    if (tile.diagonal) {
      for (j = 1; j * (j + 1) / 2 <= slot; ++j) {
      }
      i = slot - j * (j - 1) / 2;
    } else {
      i = slot % TI;
      j = slot / TI;
    }
    if (j >= tile.nj) return {-1, -1};
    j += tile.diagonal ? 0 : TI;
    return back ? RowPair{j, i} : RowPair{i, j};
  }

  static __device__ __forceinline__ int64_t member(const Tile& tile, int row) {
    return row < TI ? tile.i0 + row : tile.j0 + row - TI;
  }
};

struct PairPlan {
  int64_t tiles, chunks, per_chunk;  // per_chunk: examples of a chunk

  int64_t sums() const { return tiles * chunks * PITCH; }
  dim3 grid() const { return dim3(unsigned(tiles), unsigned(chunks), 1); }
};

inline PairPlan plan_pairs(int64_t tiles, int64_t N, int64_t C) {
  const int64_t most = std::max<int64_t>(1, PAIR_BLOCKS / tiles);
  const int64_t least = ceil_div(CHUNK_ELEMENTS, C);  // examples
  const int64_t wanted = std::clamp<int64_t>(ceil_div(N, least), 1, most);
  const int64_t per_chunk = std::max<int64_t>(1, ceil_div(N, wanted));
  return {tiles, ceil_div(N, per_chunk), per_chunk};
}

// Adds all pairs of the tile for the elements (n, c) of the examples [first, last) to `sums`. An Op
// says where to read (at, step from member to member; stats likewise, of a row), whether one
// element AHEAD, what it means (Value value, and nothing() where there is no element), how a pair
// adds to its slot (of PACKED to a word of `sums`: the slots w, w + SLOTS / PACKED, ... share word
// w), and with settle() looks at all values of an element once.
template <class Op, bool DIAGONAL>
__device__ __forceinline__ void add_pairs(const Op& op, const Tile& tile, int64_t first,
                                          int64_t last, unsigned* lost,
                                          typename Op::Sum (&sums)[SLOTS / Op::PACKED]) {
  using Tiles = typename Op::Tiles;
  constexpr int TI = Tiles::TI, ROWS = DIAGONAL ? TI : TI + Tiles::TJ;
  const int C = op.classes();
  const int64_t elements = (last - first) * C;
  int64_t e = threadIdx.x;
  int64_t n = first + e / C;
  int c = int(e % C);
  const int step_n = PAIR_THREADS / C, step_c = PAIR_THREADS % C;
  const auto has = [&](int row) {  // the same for all threads
    return row < TI ? !DIAGONAL || row < tile.ni : row - TI < tile.nj;
  };
  typename Op::Raw raw[ROWS];
  const auto load = [&] {
    if (e >= elements) return;
    op.with_data([&](const auto* data) {
      const int64_t step = recomputed(op.step());
      int64_t at = op.at(tile.i0, n, c);
#pragma unroll
      for (int row = 0; row < ROWS; ++row, at += step) {
        if (row == TI) at = op.at(tile.j0, n, c);
        if (has(row)) raw[row] = Op::read(data[at]);
      }
    });
  };
  if (Op::AHEAD) load();
  for (int64_t done = 0; done < elements; done += PAIR_THREADS) {
    if (!Op::AHEAD) load();
    typename Op::Value value[ROWS];
    const int64_t step = recomputed(op.stats_step());
    auto* stats = op.stats_at(tile.i0, n);
#pragma unroll
    for (int row = 0; row < ROWS; ++row, stats += step) {
      if (row == TI) stats = op.stats_at(tile.j0, n);
      value[row] = Op::nothing();
      if (has(row) && e < elements) value[row] = Op::value(raw[row], stats);
    }
    Op::settle(value, lost);
    e += PAIR_THREADS;
    n += step_n;
    c += step_c;
    if (c >= C) c -= C, ++n;
    if (Op::AHEAD) load();
#pragma unroll
    for (int j4 = 0; j4 < (DIAGONAL ? TI : Tiles::TJ); j4 += 4) {
      if (j4 >= tile.nj) break;  // four rows at a time: enough independent work between branches
#pragma unroll
      for (int j = j4; j < j4 + 4; ++j) {
#pragma unroll
        for (int i = 0; i < (DIAGONAL ? j : TI); ++i) {
          Op::add(sums, Tiles::slot(DIAGONAL, i, j), value[i], value[DIAGONAL ? j : TI + j]);
        }
      }
    }
  }
}

// The sums of one tile over one chunk. An Op also says how many examples to take between calls of
// prepare(), which all threads make; what the sum over a chunk is worth (finish), given the sums of
// `self`, x of the first row and y of the second; and for pairs that come out close the accurate
// terms of a second sum.
template <class Op, bool DIAGONAL>
__device__ __forceinline__ void tile_sums(const Op& op, const Tile& tile, int64_t first,
                                          int64_t last, double* out) {
  using Tiles = typename Op::Tiles;
  constexpr int ROWS = Tiles::TI + Tiles::TJ, WORDS = SLOTS / Op::PACKED, EACH = WORDS / 32;
  LSF_SHARED(double, of_warp, PAIR_WARPS * SLOTS);
  LSF_SHARED(double, self, 2 * ROWS);
  LSF_SHARED(unsigned, lost, ROWS);  // for each row, from which rows it is infinitely far
  LSF_SHARED(int, close, SLOTS);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (thread < ROWS) lost[thread] = 0;
  typename Op::Sum sums[WORDS] = {};
  double* const total = of_warp + warp * SLOTS + lane * EACH;  // of this lane alone until the end
#pragma unroll
  for (int k = 0; k < SLOTS / 32; ++k) total[k / EACH * WORDS + k % EACH] = 0;
  int64_t added = 0;
  for (int64_t n = first; n < last; n += op.examples) {
    const int64_t end = n + op.examples < last ? n + op.examples : last;
    op.prepare(tile, n, end);
    __syncthreads();
    add_pairs<Op, DIAGONAL>(op, tile, n, end, lost, sums);
    added += (end - n) * op.classes();
    if (added >= int64_t(FLUSH) * PAIR_THREADS || end == last) {
      added = 0;
      double more[SLOTS / 32];
      Op::over_warp(sums, more);
#pragma unroll
      for (int k = 0; k < SLOTS / 32; ++k) total[k / EACH * WORDS + k % EACH] += more[k];
#pragma unroll
      for (int k = 0; k < WORDS; ++k) sums[k] = 0;
    }
  }
  for (int row = warp; row < ROWS; row += PAIR_WARPS) {
    const bool exists = row < Tiles::TI ? row < tile.ni : !DIAGONAL && row - Tiles::TI < tile.nj;
    double as_from = 0, as_to = 0;
    for (int64_t n = first + lane; exists && n < last; n += 32) {
      const double2 one = op.self(Tiles::member(tile, row), n);
      as_from += one.x;
      as_to += one.y;
    }
    as_from = group_sum(as_from, 32);
    as_to = group_sum(as_to, 32);
    if (lane == 0) self[row] = as_from, self[ROWS + row] = as_to;
  }
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < PAIR_WARPS; ++w) sum += of_warp[w * SLOTS + thread];
  const RowPair mine = Tiles::pair(tile, thread);
  if (mine.from >= 0) {
    const bool infinite = lost[mine.to] >> mine.from & 1;
    sum = Op::finish(sum, self[mine.from], self[ROWS + mine.to]);
    if (infinite) sum += double(INFINITY);
  }
  close[thread] = mine.from >= 0 && Op::is_close(sum, double(last - first));
  __syncthreads();
  for (int slot = 0; slot < SLOTS; ++slot) {
    if (!close[slot]) continue;  // the same for all threads
    const RowPair rows = Tiles::pair(tile, slot);
    const int64_t from = Tiles::member(tile, rows.from), to = Tiles::member(tile, rows.to);
    double again = 0;
    for (int64_t e = thread; e < (last - first) * op.classes(); e += PAIR_THREADS) {
      again += double(op.accurate(from, to, first + e / op.classes(), int(e % op.classes())));
    }
    again = block_sum<PAIR_THREADS>(again, of_warp);
    if (thread == slot) sum = again;
  }
  out[thread] = sum;
  if (thread < SELF_SLOTS) out[SLOTS + thread] = DIAGONAL && thread < tile.ni ? self[thread] : 0.0;
}

template <class Op>
__global__ void __launch_bounds__(PAIR_THREADS, 2)
pair_tiles_kernel(const Op op, int64_t M, int64_t N, int64_t per_chunk, double* __restrict__ sums) {
  const Tile tile = Op::Tiles::at(blockIdx.x, M);
  const int64_t first = int64_t(blockIdx.y) * per_chunk;
  const int64_t last = first + per_chunk < N ? first + per_chunk : N;
  double* const out = sums + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * PITCH;
  if (tile.diagonal) {
    tile_sums<Op, true>(op, tile, first, last, out);
  } else {
    tile_sums<Op, false>(op, tile, first, last, out);
  }
}

constexpr int MEAN_ROWS = 8;

// out [M, M] and, unless null, total [M, M] from the sums of all chunks: 32 slots of one tile in
// each block. On the diagonal 0, or NaN where the member's own sum is NaN; in out also where there
// are no examples.
template <class Tiles>
__global__ void __launch_bounds__(32 * MEAN_ROWS)
pair_means_kernel(const double* __restrict__ sums, int64_t chunks, int64_t M, int64_t N,
                  float* __restrict__ out, double* __restrict__ total) {
  LSF_SHARED(double, part, 32 * MEAN_ROWS);
  const Tile tile = Tiles::at(blockIdx.x, M);
  const int slot = int(blockIdx.y) * 32 + int(threadIdx.x);
  double sum = 0;
  if (slot < PITCH) {
    const double* from = sums + int64_t(blockIdx.x) * chunks * PITCH + slot;
    for (int64_t k = threadIdx.y; k < chunks; k += MEAN_ROWS) sum += from[k * PITCH];
  }
  part[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0) return;
  for (int y = 1; y < MEAN_ROWS; ++y) sum += part[y * 32 + threadIdx.x];
  const double mean = sum / double(N);
  if (slot >= SLOTS) {
    const int row = slot - SLOTS;
    if (tile.diagonal && row < tile.ni) {
      const int64_t at = (tile.i0 + row) * (M + 1);
      out[at] = mean == mean ? 0.0f : float(mean);
      if (total) total[at] = sum == sum ? 0.0 : sum;
    }
    return;
  }
  const RowPair pair = Tiles::pair(tile, slot);
  if (pair.from < 0) return;
  const int64_t i = Tiles::member(tile, pair.from), j = Tiles::member(tile, pair.to);
  out[i * M + j] = float(mean);
  if (!Tiles::DIRECTED) out[j * M + i] = float(mean);
  if (!total) return;
  total[i * M + j] = sum;
  if (!Tiles::DIRECTED) total[j * M + i] = sum;
}

// `sums` has room for plan.sums() numbers.
template <class Op>
void launch_pairs(const Op& op, const PairPlan& plan, int64_t M, int64_t N, double* sums,
                  float* out, double* total, void* stream) {
  if (plan.chunks > 0) {
    const auto kernel = pair_tiles_kernel<Op>;
    LSF_LAUNCH(kernel, plan.grid(), dim3(PAIR_THREADS, 1, 1), 0, stream, op, M, N, plan.per_chunk,
               sums);
  }
  const auto means = pair_means_kernel<typename Op::Tiles>;
  const dim3 grid(unsigned(plan.tiles), unsigned(ceil_div(PITCH, 32)), 1);
  LSF_LAUNCH(means, grid, dim3(32, MEAN_ROWS, 1), 0, stream, sums, plan.chunks, M, N, out,
             total);
}

}  // namespace landscape_fast
