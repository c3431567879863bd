// How members, classes, threads and warps of KL's product are laid out, and its small parts.
#pragma once

#include "cuda/mma.h"
#include "cuda/quick.h"
#include "cuda/row_stats.h"

namespace landscape_fast {

constexpr int KL_THREADS = 256, KL_WARPS = KL_THREADS / 32;
constexpr int OWN = 8;            // members of a thread
constexpr int STEPS_OF_SUM = 32;  // steps that are added in float32
// Scales that keep the low parts normal, and what L' may be then: below LEAST_LN_P, ln p (ONLINE: a
// logit less what its row is taken relative to) takes another path (add_far).
constexpr int P_BITS = 15;
constexpr float L_SCALE = 128, LEAST_LN_P = -400;
constexpr double P_SCALE = 1 << P_BITS, UNSCALE = 1 / (P_SCALE * L_SCALE);
constexpr float FARTHEST = 40;  // above what its row is taken relative to, a logit may be

template <int MEMBERS_>
struct KlShape {
  static constexpr int MEMBERS = MEMBERS_;              // padded
  static constexpr int KB = 16 * KL_THREADS / MEMBERS;  // classes of a step
  static constexpr int PITCH = KB + 8;                  // so that ldmatrix meets no bank twice
  static constexpr int COLUMNS = KB / 2, GROUPS = KL_THREADS / COLUMNS;  // of threads
  static constexpr int LANES_OF_ROW = COLUMNS < 32 ? COLUMNS : 32;       // in one warp
  static constexpr int SPANS = COLUMNS / LANES_OF_ROW;                   // warps that share a row
  static constexpr int TM = MEMBERS < 64 ? 16 : 32;                         // of a warp
  static constexpr int TN = MEMBERS < 32 ? 16 : MEMBERS < 128 ? 32 : 64;
  // On a multiprocessor: with 128 members 64 registers are sums, and the 128 that two blocks leave
  // a thread would not do without spills; nor would they for 64 as nvcc 13.0 compiles for sm_100.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int BLOCKS = MEMBERS < 64 ? 2 : 1;
#else
  static constexpr int BLOCKS = MEMBERS < 128 ? 2 : 1;
#endif
  static constexpr int ACROSS = MEMBERS / TN, TILES = MEMBERS / TM * ACROSS;
  static constexpr int SLICES = KL_WARPS / TILES, SLICE = KB / SLICES;
  static constexpr int WORDS = (MEMBERS + 31) / 32;  // of one number for each member in a warp
  static_assert(GROUPS * OWN == MEMBERS && SLICE % 16 == 0, "every thread and warp has its part");
  static_assert(KB / SPANS % SLICE == 0, "a slice lies in one span");
};

struct KlJob {
  Rows rows;
  float4* stats;             // [M, N], see kl_stats
  int per_chunk, group;      // examples of a block, and between two looks at their statistics
  double* cross;             // [chunks, SLICES, MEMBERS, MEMBERS]
  double* logs;              // [chunks, M]: what ln p lacks, summed over the examples
};

// x0 and x1 as float16 in two words each of which has both: the rounded, and what that left.
__device__ __forceinline__ void split_pair(float x0, float x1, uint32_t& high, uint32_t& low) {
  const __half2 rounded = __floats2half2_rn(x0, x1);
  const float2 back = __half22float2(rounded);
  const __half2 rest = __floats2half2_rn(x0 - back.x, x1 - back.y);
  memcpy(&high, &rounded, sizeof high);
  memcpy(&low, &rest, sizeof low);
}

// What `join` makes of OWN numbers that each of eight neighbouring lanes has, which are given one
// after another: lane l gets it of the numbers l % 8. Three at most are held meanwhile.
template <class Join>
struct Folding {
  static_assert(OWN == 8, "one number for each lane");
  Join join;
  float held[3] = {}, result = 0;

  __device__ __forceinline__ void add(int r, float x) {
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) {
      if (!(r >> bit & 1)) {
        held[bit] = x;
        return;
      }
      const bool upper = int(threadIdx.x) >> bit & 1;
      const float mine = upper ? x : held[bit], other = upper ? held[bit] : x;
      x = join(mine, __shfl_xor_sync(WHOLE_WARP, other, 1 << bit));
    }
    result = x;
  }
};

struct Larger {
  __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

struct Sum {
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};

// What a span of a row is multiplied with: exponentials are taken relative to its largest logit,
// and its products count e^(that - what the row is taken relative to).
struct Span {
  float top, factor;
};

}  // namespace landscape_fast
