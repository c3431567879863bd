// How kernels are launched and get shared memory: by nvcc, or by the shim that tests use to run the
// same source on the CPU (tests/cuda_on_cpu/cuda_on_cpu.h, which defines the same macros).
//
//   LSF_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//   LSF_SHARED(T, name, count)     a shared array of constant size
//   LSF_DYNAMIC_SHARED(T, name)    the shared memory that the launch asked for, 16-byte aligned
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define LSF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define LSF_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define LSF_DYNAMIC_SHARED(T, name)                               \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)

#else

#include "cuda_on_cpu.h"

#endif
