// subspace_conv2d, 3 by 3, stride 1, one zero on every side, 16 or 32 channels: forward, and the
// gradient of the input, which is the same with the weights turned around.
//
// With so few channels a kernel that reads every input pixel for each of nine taps is bound by the
// L2 cache. Here a block keeps the weights of one member in shared memory, takes one tile of 8 by
// 16 pixels after the other, with its halo, and multiplies from there.
#include "cuda/subspace_conv2d.h"

namespace landscape_fast {
namespace {

constexpr int TH = 8, WARPS = 4, THREADS = 32 * WARPS, ROWS = TH / WARPS;  // rows of each warp
constexpr int64_t BLOCKS = 1056;  // about 8 on each of 132 multiprocessors

// Output channels of a block: the weights of 32 in float32 would not fit beside the tile.
template <class T, int O>
constexpr int OUTPUTS = sizeof(T) == 4 ? 16 : O;

// Elements from a row of a matrix in shared memory to the next: no two of eight rows in one bank.
template <class T, int I>
constexpr int STRIDE = I + LANES<T>;

// The row of output channel o among the weights, such that the columns that a lane holds of all
// small matrices are neighbours in memory.
template <int COUNT>
__device__ __forceinline__ int row_of(int o) {
  constexpr int OWN = COUNT / 4;  // channels of a lane
  return o % OWN / 2 * 8 + o / OWN * 2 + o % 2;
}

// Weights into shared memory [9, OUTPUTS, STRIDE] from [M, O, 9, I], or `turned` [M, I, 9, O].
template <class T, int I, int O>
__device__ __forceinline__ void load_weights(const T* from, int64_t m, int first, bool turned,
                                             T* to) {
  constexpr int COUNT = OUTPUTS<T, O>, S = STRIDE<T, I>;
  from += m * (9 * I * O);
#pragma unroll 8
  for (int k = int(threadIdx.x); k < 9 * I * COUNT; k += THREADS) {
    if (!turned) {
      const int i = k % I, tap = k / I % 9, o = k / (9 * I);
      to[(tap * COUNT + row_of<COUNT>(o)) * S + i] = from[((first + o) * 9 + tap) * I + i];
    } else {
      const int o = k % COUNT, tap = k / COUNT % 9, i = k / (9 * COUNT);
      to[((8 - tap) * COUNT + row_of<COUNT>(o)) * S + i] = from[(i * 9 + tap) * O + first + o];
    }
  }
}

// MMA_K input channels of one tap: 16 pixels from `pixels` on in each of the warp's rows, times the
// weights of all output channels.
template <class T, bool EXACT, int S, int COUNT>
__device__ __forceinline__ void multiply(const T* pixels, const T* weights, int row,
                                         float (&sum)[ROWS][COUNT / 8][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
    uint32_t a[ROWS][4], b[4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      load_matrices<false>(pixels + (r * row + lane % 16) * S + lane / 16 * 8, a[r]);
    }
#pragma unroll
    for (int n = 0; n < COUNT / 8; n += 2) {
      const int at = n * 8 + lane % 8 + lane / 16 * 8;
      load_matrices<false>(weights + at * S + lane / 8 % 2 * 8, b);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        mma<T>(sum[r][n], a[r], {b[0], b[1]});
        mma<T>(sum[r][n + 1], a[r], {b[2], b[3]});
      }
    }
  } else {
    float a[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const T* from = pixels + (r * row + g) * S + t;
      a[r][0] = from[0];
      a[r][1] = from[8 * S];
      a[r][2] = from[4];
      a[r][3] = from[8 * S + 4];
    }
#pragma unroll
    for (int n = 0; n < COUNT / 8; ++n) {
      const T* from = weights + (n * 8 + g) * S + t;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) mma_float<EXACT>(sum[r][n], a[r], {from[0], from[4]});
    }
  }
}

// COUNT / 4 neighbouring channels of one pixel.
template <int COUNT, class T>
__device__ __forceinline__ void store_channels(T* to, const float (&sum)[COUNT / 8][4], int half) {
  constexpr int OWN = COUNT / 4;
  float x[OWN];
#pragma unroll
  for (int k = 0; k < OWN; ++k) x[k] = sum[k / 2][2 * half + k % 2];
  if constexpr (OWN == LANES<T>) {
    store16(to, x);
  } else {
    static_assert(OWN * sizeof(T) == 8, "half of 16 bytes");
    T low[OWN];
#pragma unroll
    for (int k = 0; k < OWN; ++k) store(low + k, x[k]);
    uint2 bits;
    memcpy(&bits, low, sizeof bits);
    *reinterpret_cast<uint2*>(to) = bits;
  }
}

// Block ((m, group), part): tiles group, group + groups, ... of member m, channels of one part.
template <class T, bool EXACT, int I, int O>
__global__ void __launch_bounds__(THREADS)
subspace_conv2d_kernel(const SubspaceConv2d op, const MemberImages x, const T* __restrict__ weight,
                       const float* __restrict__ bias, bool turned, T* __restrict__ y,
                       int groups) {
  constexpr int COUNT = OUTPUTS<T, O>, S = STRIDE<T, I>, OWN = COUNT / 4;
  LSF_SHARED(T, weights, 9 * COUNT * S);
  LSF_SHARED(T, pixels, (TH + 2) * CONV_HALO * S);
  const ConvTiles tiles(op, TH);
  const int first = int(blockIdx.x) % (O / COUNT) * COUNT;
  const int block = int(blockIdx.x) / (O / COUNT);
  const int64_t m = block / groups, count = tiles.count();
  const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  load_weights<T, I, O>(weight, m, first, turned, weights);
  float start[OWN];
#pragma unroll
  for (int k = 0; k < OWN; ++k) start[k] = bias ? bias[m * O + first + t * OWN + k] : 0.0f;
  for (int64_t unit = block % groups; unit < count; unit += groups) {
    const ConvTile tile(tiles, unit, TH);
    __syncthreads();  // the tile before has been used
    load_pixels<TH + 2, CONV_HALO, I, S, THREADS>(x, m, tile.b, tile.h - 1, tile.w - 1, tiles.H,
                                                  tiles.W, pixels);
    __syncthreads();
    float sum[ROWS][COUNT / 8][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int k = 0; k < 2 * OWN; ++k) sum[r][k % OWN / 2][k / OWN * 2 + k % 2] = start[k % OWN];
    }
#pragma unroll 1
    for (int kh = 0; kh < 3; ++kh) {
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
        const T* from = pixels + ((warp * ROWS + kh) * CONV_HALO + kw) * S;
        const T* of_tap = weights + (3 * kh + kw) * COUNT * S;
        in_steps<EXACT>(sum, [&](auto& to) {
#pragma unroll
          for (int i = 0; i < I; i += MMA_K<T>) {
            multiply<T, EXACT, S, COUNT>(from + i, of_tap + i, CONV_HALO, to);
          }
        });
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int h = tile.h + warp * ROWS + r;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int w = tile.w + g + 8 * half;
        if (h >= tiles.H || w >= tiles.W) continue;
        const int64_t pixel = ((m * op.B + tile.b) * op.H + h) * op.W + w;
        store_channels<COUNT>(y + pixel * O + first + t * OWN, sum[r], half);
      }
    }
  }
}

}  // namespace

int subspace_conv2d_cuda(const SubspaceConv2d& op, const MemberImages& x, const void* weight,
                         const float* bias, bool turned, void* y, void* stream) {
  const int64_t count = ConvTiles(op, TH).count();
  if (op.M == 0 || count == 0) return int(cudaSuccess);
  const int64_t I = turned ? op.O : op.I, O = turned ? op.I : op.O;
  return with_conv(op, I, O, [&](auto* type, auto exact, auto i, auto o) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int PARTS = o() / OUTPUTS<T, o()>;
    const int64_t groups = groups_of(op, BLOCKS, op.M * PARTS, count);
    const auto kernel = subspace_conv2d_kernel<T, exact(), i(), o()>;
    LSF_LAUNCH(kernel, dim3(unsigned(op.M * groups * PARTS), 1, 1), dim3(THREADS, 1, 1), 0, stream,
               op, x, static_cast<const T*>(weight), bias, turned, static_cast<T*>(y),
               int(groups));
    return int(cudaGetLastError());
  });
}

}  // namespace landscape_fast
