// Runs CUDA kernels on the CPU, for tests: g++ compiles the same .cu, with the threads of a block
// as fibres that switch at barriers and shuffles. Blocks run one after another.
//
// What it finds: wrong indexing and arithmetic (results), races and missing barriers (results that
// change with the order in which threads run), barriers that not all threads reach, shuffles that
// name a lane which has left or waits elsewhere, launches outside the limits of a GPU, shared
// memory that is read before it is written (it starts as NaN), and with
// -fsanitize=address,alignment accesses out of bounds and misaligned vector accesses. What it
// cannot find: races that need two blocks at the same time, anything about memory ordering or
// speed, errors of inline PTX.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "machine.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline

#define threadIdx (cuda_on_cpu::machine.current->index)
#define blockIdx (cuda_on_cpu::machine.block_index)
#define blockDim (cuda_on_cpu::machine.block)
#define gridDim (cuda_on_cpu::machine.grid)

#define LSF_TEXT_OF(x) #x
#define LSF_TEXT(x) LSF_TEXT_OF(x)
#define LSF_HERE __FILE__ ":" LSF_TEXT(__LINE__)

#define __syncthreads() cuda_on_cpu::barrier(LSF_HERE)
#define __syncwarp(...) \
  cuda_on_cpu::ballot(cuda_on_cpu::mask_or_all(__VA_ARGS__), true, LSF_HERE)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(mask, vote, LSF_HERE)
#define __any_sync(mask, vote) (cuda_on_cpu::ballot(mask, vote, LSF_HERE) != 0)
#define __all_sync(mask, vote) (cuda_on_cpu::ballot(mask, vote, LSF_HERE) == (mask))
#define __shfl_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_index(__VA_ARGS__), LSF_HERE)
#define __shfl_xor_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_xor(__VA_ARGS__), LSF_HERE)
#define __shfl_up_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_up(__VA_ARGS__), LSF_HERE)
#define __shfl_down_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_down(__VA_ARGS__), LSF_HERE)

constexpr int warpSize = 32;

// Integers only: kernels whose sums must not depend on the order of threads add no floats this way.
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicAdd(T* address, T value) {
  const T old = *address;
  *address = T(old + value);
  return old;
}

template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}

inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

// What launchers call of the runtime.
extern "C" inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::machine.error;
  cuda_on_cpu::machine.error = cudaSuccess;
  return error;
}

extern "C" inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes,
                                              cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

extern "C" inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

extern "C" inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

extern "C" inline const char* cudaGetErrorString(cudaError_t) {
  return cuda_on_cpu::machine.failure.c_str();
}

#define LSF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream),                                                 \
   cuda_on_cpu::launch(dim3(grid), dim3(block), size_t(shared_bytes), kernel, __VA_ARGS__))
#define LSF_SHARED(T, name, count)          \
  static const char name##_declaration = 0; \
  T* const name = cuda_on_cpu::shared_array<T>(&name##_declaration, count)
#define LSF_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(cuda_on_cpu::machine.dynamic_shared.data.get())
