// subspace_conv2d, the gradient of the weights where subspace_conv2d.cu makes the forward:
// dweight[o, tap, i] is the sum over pixels of dy[pixel, o] * x[pixel + tap, i].
//
// A block reads tiles of x and dy once and keeps the sums of all nine taps in registers; each warp
// those of one row of taps and 16 output channels. Blocks write their sums side by side, to be
// added up in a fixed order.
#include "cuda/subspace_conv2d.h"

namespace landscape_fast {
namespace {

constexpr int64_t BLOCKS = 528;  // about 4 on each of 132 multiprocessors; each writes its sums

template <class T>
constexpr int TH = sizeof(T) == 4 ? 4 : 8;  // so that both tiles fit in 48 KB

// Elements from a pixel to the next; in either type, what a warp loads at once is in as many banks.
template <int C>
constexpr int STRIDE = C + 8;

// Sums of one warp: 16 channels of dy from `dy` on, over 16 pixels in a row, times I channels of x
// at three neighbouring taps.
template <class T, bool EXACT, int I, int O>
__device__ __forceinline__ void multiply(const T* dy, const T* x, float (&sum)[3][I / 8][4]) {
  constexpr int SO = STRIDE<O>, SI = STRIDE<I>;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
    uint32_t a[4], b[4];
    load_matrices<true>(dy + (lane % 8 + lane / 16 * 8) * SO + lane / 8 % 2 * 8, a);
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) {
#pragma unroll
      for (int n = 0; n < I / 8; n += 2) {
        load_matrices<true>(x + (kw + lane % 16) * SI + (n + lane / 16) * 8, b);
        mma<T>(sum[kw][n], a, {b[0], b[1]});
        mma<T>(sum[kw][n + 1], a, {b[2], b[3]});
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < CONV_TW; k += MMA_K<T>) {
      const T* from = dy + (k + t) * SO + g;
      const float a[4] = {from[0], from[8], from[4 * SO], from[4 * SO + 8]};
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
#pragma unroll
        for (int n = 0; n < I / 8; ++n) {
          const T* at = x + (kw + k + t) * SI + n * 8 + g;
          mma_float<EXACT>(sum[kw][n], a, {at[0], at[4 * SI]});
        }
      }
    }
  }
}

// Block (group, m): tiles group, group + groups, ... of member m into parts[group, m].
template <class T, bool EXACT, int I, int O>
__global__ void __launch_bounds__(6 * O)
subspace_conv2d_weight_kernel(const SubspaceConv2d op, const MemberImages x, const MemberImages dy,
                              float* __restrict__ parts, int groups) {
  constexpr int ROWS = TH<T>, SO = STRIDE<O>, SI = STRIDE<I>, THREADS = 6 * O;
  LSF_SHARED(T, pixels, (ROWS + 2) * CONV_HALO * SI);
  LSF_SHARED(T, gradients, ROWS * CONV_TW * SO);
  const ConvTiles tiles(op, ROWS);
  const int64_t m = blockIdx.x % unsigned(op.M), group = blockIdx.x / unsigned(op.M);
  const int64_t count = tiles.count();
  const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  const int kh = warp % 3, first = warp / 3 * 16;
  float sum[3][I / 8][4] = {};
  for (int64_t unit = group; unit < count; unit += groups) {
    const ConvTile tile(tiles, unit, ROWS);
    __syncthreads();  // the tiles before have been used
    load_pixels<ROWS + 2, CONV_HALO, I, SI, THREADS>(x, m, tile.b, tile.h - 1, tile.w - 1, tiles.H,
                                                     tiles.W, pixels);
    load_pixels<ROWS, CONV_TW, O, SO, THREADS>(dy, m, tile.b, tile.h, tile.w, tiles.H, tiles.W,
                                               gradients);
    __syncthreads();
#pragma unroll 1
    for (int row = 0; row < ROWS; ++row) {
      in_steps<EXACT>(sum, [&](auto& to) {
        multiply<T, EXACT, I, O>(gradients + row * CONV_TW * SO + first,
                                 pixels + (row + kh) * CONV_HALO * SI, to);
      });
    }
  }
  float* to = parts + (group * op.M + m) * (9 * I * O);
#pragma unroll
  for (int kw = 0; kw < 3; ++kw) {
#pragma unroll
    for (int n = 0; n < I / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int o = first + g + e / 2 * 8, i = n * 8 + 2 * t + e % 2;
        to[(o * 9 + 3 * kh + kw) * I + i] = sum[kw][n][e];
      }
    }
  }
}

}  // namespace

int64_t subspace_conv2d_weight_cuda_parts(const SubspaceConv2d& op) {
  const int64_t rows = op.dtype == Dtype::float32 ? TH<float> : TH<__half>;
  const int64_t count = std::max<int64_t>(ConvTiles(op, int(rows)).count(), 1);
  return groups_of(op, BLOCKS, std::max<int64_t>(op.M, 1), count);
}

int subspace_conv2d_weight_cuda(const SubspaceConv2d& op, const MemberImages& x,
                                const MemberImages& dy, float* parts, void* stream) {
  if (op.M == 0) return int(cudaSuccess);
  const int64_t groups = subspace_conv2d_weight_cuda_parts(op);
  return with_conv(op, op.I, op.O, [&](auto* type, auto exact, auto i, auto o) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = subspace_conv2d_weight_kernel<T, exact(), i(), o()>;
    LSF_LAUNCH(kernel, dim3(unsigned(op.M * groups), 1, 1), dim3(6 * o(), 1, 1), 0, stream, op, x,
               dy, parts, int(groups));
    return int(cudaGetLastError());
  });
}

}  // namespace landscape_fast
