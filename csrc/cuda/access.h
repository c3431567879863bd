// Reading and writing elements of any dtype as float: one at a time, or 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "api.h"
#include "cuda/launch.h"

namespace landscape_fast {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void store(float* address, float x) { *address = x; }
__device__ __forceinline__ void store(__nv_bfloat16* address, float x) {
  *address = __float2bfloat16(x);
}
__device__ __forceinline__ void store(__half* address, float x) { *address = __float2half(x); }

// One element of `dtype`, the i-th from `data`.
__device__ __forceinline__ void store(Dtype dtype, void* data, int64_t i, float x) {
  if (dtype == Dtype::float32) {
    store(static_cast<float*>(data) + i, x);
  } else if (dtype == Dtype::bfloat16) {
    store(static_cast<__nv_bfloat16*>(data) + i, x);
  } else {
    store(static_cast<__half*>(data) + i, x);
  }
}

// Elements in 16 bytes.
template <class T>
constexpr int LANES = 16 / int(sizeof(T));

template <class T>
struct alignas(16) Pack {
  T at[LANES<T>];
};

// The 16 bytes at an aligned address. (A copy of a Pack may be compiled to one access per element.)
template <class T>
__device__ __forceinline__ Pack<T> load16(const T* address) {
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof bits);
  return pack;
}

template <class T>
__device__ __forceinline__ void store16(T* address, const float* x) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < LANES<T>; ++i) store(&pack.at[i], x[i]);
  uint4 bits;
  memcpy(&bits, &pack, sizeof bits);
#ifdef __CUDA_ARCH__  // spelled out: left to itself nvcc 13.0 makes one store per element of this
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(address) = bits;
#endif
}

__host__ __device__ __forceinline__ bool is_aligned(const void* address, int64_t bytes = 0) {
  return (reinterpret_cast<uintptr_t>(address) | uintptr_t(bytes)) % 16 == 0;
}

// x, such that the compiler does not compute what follows from it ahead of a loop: the addresses of
// many loads would take more registers than there are.
template <class T>
__device__ __forceinline__ T recomputed(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
#endif
  return x;
}

// What follows is not loaded ahead of it: as recomputed(), where loads would take the registers.
__device__ __forceinline__ void in_order() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Calls `f` with `data` as a pointer to elements of `dtype`, which is the same for all threads.
template <class F>
__device__ __forceinline__ void with_element(Dtype dtype, const void* data, F&& f) {
  if (dtype == Dtype::float32) {
    f(static_cast<const float*>(data));
  } else if (dtype == Dtype::bfloat16) {
    f(static_cast<const __nv_bfloat16*>(data));
  } else {
    f(static_cast<const __half*>(data));
  }
}

// What `f` returns for a null pointer to elements of `dtype`.
template <class F>
int with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::float16:
      return f(static_cast<__half*>(nullptr));
  }
  return int(cudaErrorInvalidValue);
}

inline int64_t itemsize(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace landscape_fast
