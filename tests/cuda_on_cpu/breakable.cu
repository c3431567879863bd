// A small kernel with mistakes to switch on, to see that the machine finds them.
#include "cuda/launch.h"

enum Mistake {
  NONE,
  NO_BARRIER,         // shared memory is read before all of it is written
  BARRIER_IN_BRANCH,  // half of the threads skip a barrier
  LEFT_EARLY,         // some threads return before a barrier
  OTHER_BARRIER,      // the halves of a block wait at different barriers
  LANE_MISSING,       // a lane leaves, and a shuffle names it
  ONE_TOO_FAR,        // reads one element behind the end
  NOT_ALIGNED,        // loads 16 bytes from an address that is no multiple of 16
  SHARED_OVERRUN,     // writes behind the end of shared memory
};

constexpr int THREADS = 96;

// out[b] = sum of row b of x [blocks, n]
__global__ void __launch_bounds__(THREADS)
row_sums(const float* x, float* out, int n, int mistake) {
  LSF_SHARED(float, part, THREADS);
  const float* row = x + size_t(blockIdx.x) * n;
  const int thread = int(threadIdx.x);
  const int end = n + int(mistake == ONE_TOO_FAR && blockIdx.x + 1 == gridDim.x);
  if (mistake == LANE_MISSING && thread == 7) return;
  float sum = 0;
  if (mistake == NOT_ALIGNED) sum += reinterpret_cast<const float4*>(row + 1)->x;
  for (int i = thread; i < end; i += THREADS) sum += row[i];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_down_sync(0xffffffffu, sum, o);
  if (thread % 32 == 0) part[mistake == SHARED_OVERRUN ? thread + 64 : thread / 32] = sum;
  if (mistake == LEFT_EARLY && thread >= 64) return;
  if (mistake == BARRIER_IN_BRANCH) {
    if (thread < 48) __syncthreads();
  } else if (mistake == OTHER_BARRIER && thread < 48) {
    __syncthreads();
  } else if (mistake != NO_BARRIER) {
    __syncthreads();
  }
  if (thread == 0) out[blockIdx.x] = part[0] + part[1] + part[2];
}

extern "C" int run_breakable(const float* x, float* out, int blocks, int n, int threads,
                             int mistake) {
  LSF_LAUNCH(row_sums, dim3(blocks, 1, 1), dim3(threads, 1, 1), 0, nullptr, x, out, n, mistake);
  return int(cudaGetLastError());
}
