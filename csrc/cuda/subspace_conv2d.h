// What the halo kernels of subspace_conv2d share: tiles of an image with all of its channels in
// shared memory, read once, from which all nine taps are served.
#pragma once

#include <algorithm>

#include "cuda/access.h"
#include "cuda/mma.h"

namespace landscape_fast {

constexpr int CONV_TW = 16;  // pixels of a tile's row: one side of a small matrix
constexpr int CONV_HALO = CONV_TW + 2;

// Tiles of TH rows, of all images of a member; a tile is a unit of work.
struct ConvTiles {
  int64_t B;
  int H, W, down, across;

  __host__ __device__ ConvTiles(const SubspaceConv2d& op, int TH)
      : B(op.B),
        H(int(op.H)),
        W(int(op.W)),
        down(int(ceil_div(op.H, TH))),
        across(int(ceil_div(op.W, CONV_TW))) {}
  __host__ __device__ int64_t count() const { return B * down * across; }
};

// How many blocks share the `count` tiles of one of `works` works.
inline int64_t groups_of(const SubspaceConv2d& op, int64_t usual, int64_t works, int64_t count) {
  return std::clamp<int64_t>(ceil_div(op.blocks ? op.blocks : usual, works), 1, count);
}

struct ConvTile {
  int64_t b;
  int h, w;  // of its first pixel

  __device__ __forceinline__ ConvTile(const ConvTiles& all, int64_t unit, int TH)
      : b(unit / (all.down * all.across)),
        h(int(unit / all.across % all.down) * TH),
        w(int(unit % all.across) * CONV_TW) {}
};

// ROWS by COLUMNS pixels from (h, w) on, C channels each, into shared memory, S elements apart;
// zeros outside of the image. The threads of a block share the work.
template <int ROWS, int COLUMNS, int C, int S, int THREADS, class T>
__device__ __forceinline__ void load_pixels(const MemberImages& from, int64_t m, int64_t b, int h,
                                            int w, int H, int W, T* to) {
  constexpr int CHUNKS = C / LANES<T>;
  const T* image = static_cast<const T*>(from.data) + m * from.stride_m + b * from.stride_b;
#pragma unroll 4
  for (int k = int(threadIdx.x); k < ROWS * COLUMNS * CHUNKS; k += THREADS) {
    const int pixel = k / CHUNKS, chunk = k % CHUNKS;
    const int y = h + pixel / COLUMNS, x = w + pixel % COLUMNS;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (y >= 0 && y < H && x >= 0 && x < W) {
      const T* at = image + y * from.stride_h + x * from.stride_w + chunk * LANES<T>;
      bits = *reinterpret_cast<const uint4*>(at);
    }
    *reinterpret_cast<uint4*>(to + pixel * S + chunk * LANES<T>) = bits;
  }
}

// Calls add(sum); with EXACT, add(zeros), and adds what they become to the sum, which is rounded
// that much less often then.
template <bool EXACT, int X, int Y, class F>
__device__ __forceinline__ void in_steps(float (&sum)[X][Y][4], F&& add) {
  if constexpr (!EXACT) {
    add(sum);
  } else {
    float part[X][Y][4] = {};
    add(part);
#pragma unroll
    for (int k = 0; k < X * Y * 4; ++k) {
      sum[k / (4 * Y)][k / 4 % Y][k % 4] += part[k / (4 * Y)][k / 4 % Y][k % 4];
    }
  }
}

// Calls f(type, exact, I, O), all as compile-time values, or returns an error.
template <class F>
int with_conv(const SubspaceConv2d& op, int64_t I, int64_t O, F&& f) {
  const auto channels = [&](auto* type, auto exact) {
    const auto outputs = [&](auto i) {
      if (O == 16) return f(type, exact, i, std::integral_constant<int, 16>());
      if (O == 32) return f(type, exact, i, std::integral_constant<int, 32>());
      return int(cudaErrorInvalidValue);
    };
    if (I == 16) return outputs(std::integral_constant<int, 16>());
    if (I == 32) return outputs(std::integral_constant<int, 32>());
    return int(cudaErrorInvalidValue);
  };
  return with_dtype(op.dtype, [&](auto* type) {
    if constexpr (sizeof(*type) == 4) {
      if (op.exact) return channels(type, std::true_type());
    }
    return channels(type, std::false_type());
  });
}

}  // namespace landscape_fast
