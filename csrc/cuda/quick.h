// Exponential and logarithm by the special function unit, where a kernel is bound by instructions
// and its comment says what the error does to the result. On the CPU the accurate ones of math.h.
#pragma once

#include "cuda/launch.h"
#include "math.h"

namespace landscape_fast {

// e^x for x <= 0: relative error 2^-22 + |x| * 2^-23, exactly 1 at 0; 0 below -87; NaN stays NaN.
__device__ __forceinline__ float exp_quick(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  return exp_of(x);
#endif
}

// log2 of a normal number: absolute error 2^-22 on (1/2, 2), relative error 2^-22 elsewhere.
__device__ __forceinline__ float log2_quick(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2_of(x);
#endif
}

}  // namespace landscape_fast
