// Exponentials and a logarithm that take fewer instructions than those of math.h. *_quick is by the
// special function unit (on the CPU the accurate one), where a kernel is bound by instructions and
// its comment says what the error does to the result.
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

// 2^BITS e^x for -87 <= x <= 0, relative error 3e-9 before rounding; 0 below, and for NaN.
template <int BITS>
__device__ __forceinline__ float exp_scaled(float x) {
  const float shift = 12582912.0f + BITS;  // as in exp_of, which knows subnormal results too
  const float z = x * 1.44269504f + shift;
  const float k = z - shift;
  float f = x - k * 0.693359375f;
  f = f + k * 2.12194440e-4f;
  float y = 0.00138146088f;
  y = y * f + 0.008368709862f;
  y = y * f + 0.04166838744f;
  y = y * f + 0.1666652069f;
  y = y * f + 0.4999999345f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  const uint32_t bits = uint32_t(bits_of(y)) + (uint32_t(bits_of(z)) << 23);  // times 2^n
  return x >= -87.0f ? float_of(int32_t(bits)) : 0.0f;
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
