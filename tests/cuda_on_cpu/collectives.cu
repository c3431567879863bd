// One of each warp operation, to compare with what the CUDA programming guide says of them.
#include "cuda/launch.h"

constexpr int OPERATIONS = 9;

// out [OPERATIONS, threads]; thread t offers 100 + t
__global__ void __launch_bounds__(64) collectives(unsigned* out, int width) {
  constexpr unsigned ALL = 0xffffffffu;
  const unsigned thread = threadIdx.x, lane = thread % 32, value = 100 + thread;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  unsigned result[OPERATIONS];
  result[0] = __shfl_sync(ALL, value, 5, width);
  result[1] = __shfl_up_sync(ALL, value, 3, width);
  result[2] = __shfl_down_sync(ALL, value, 3, width);
  result[3] = __shfl_xor_sync(ALL, value, 6, width);
  result[4] = __ballot_sync(ALL, thread % 3 == 0);
  result[5] = __any_sync(ALL, thread == 40);
  result[6] = __all_sync(ALL, thread < 32);
  __syncwarp();
  if (lane < 16) {
    result[7] = __shfl_xor_sync(half, value, 1);
  } else {
    result[7] = __shfl_xor_sync(half, value, 2);
  }
  result[8] = __ballot_sync(half, lane % 2);
  for (int k = 0; k < OPERATIONS; ++k) out[k * blockDim.x + thread] = result[k];
}

extern "C" int run_collectives(unsigned* out, int width) {
  LSF_LAUNCH(collectives, dim3(1, 1, 1), dim3(64, 1, 1), 0, nullptr, out, width);
  return int(cudaGetLastError());
}
