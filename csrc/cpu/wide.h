// log2 and exp on AVX-512, by instructions that no other set has: a table of 32 floats in two
// registers, and scaling by a power of two. For the *_simd.cpp files; other sets do not see it.
//
// Each takes K vectors that run in step: one after the other they would fill the scheduler with
// instructions that wait (measured on a Zen 4: a fifth slower).
#pragma once

#if defined(__AVX512F__)

#include <cstdint>

#pragma GCC diagnostic push  // GCC 12 finds in its own header what is not there
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace landscape_fast {
namespace {

// A mantissa z in [sqrt(1/2), sqrt(2)) falls into one of 32 intervals of equally many floats.
// INVERSE is near 1 / z within an interval, exactly 1 in the one that holds 1, and of the floats
// near there one whose -log2, LOG2, loses at most 2e-9 by rounding.
constexpr float INVERSE[32] = {
    1.39873934f, 1.36884797f, 1.34017062f, 1.31272817f, 1.28634632f, 1.26099944f, 1.23659575f,
    1.21312523f, 1.19059944f, 1.16883111f, 1.14784098f, 1.1276288f, 1.10815632f, 1.08922446f,
    1.07102549f, 1.05342376f, 1.03635645f, 1.01984596f, 1.0f, 0.976970673f, 0.947993517f,
    0.920718014f, 0.894965827f, 0.870613694f, 0.847566426f, 0.825710118f, 0.804943144f,
    0.785170496f, 0.766385317f, 0.748453617f, 0.731333971f, 0.714997649f,
};
constexpr float LOG2[32] = {
    -0.484127134f, -0.45296222f, -0.422416687f, -0.392568201f, -0.363279104f, -0.334567636f,
    -0.306373954f, -0.278728485f, -0.251688123f, -0.225066483f, -0.198922783f, -0.173292235f,
    -0.148161411f, -0.123301283f, -0.0989928171f, -0.0750859082f, -0.0515202954f, -0.0283512641f,
    0.0f, 0.0336128399f, 0.0770509019f, 0.119168721f, 0.160095498f, 0.199895382f, 0.238601655f,
    0.276292711f, 0.31304121f, 0.348922133f, 0.383858174f, 0.418015182f, 0.451397717f,
    0.483989596f,
};

#define LSF_EACH _Pragma("GCC unroll 8") for (int k = 0; k < K; ++k)

// log2 of K vectors of numbers x >= 0, absolute error 6e-9 before rounding, exactly 0 at 1; finite
// at 0, so that x * log2(x) is 0 there, and for NaN. Takes 0.6 of the time of log2_of in math.h.
class Log2Table {
 public:
  Log2Table() {
    for (int half = 0; half < 2; ++half) {
      inverse_[half] = _mm512_loadu_ps(INVERSE + 16 * half);
      log2_[half] = _mm512_loadu_ps(LOG2 + 16 * half);
    }
  }

  template <int K>
  inline __attribute__((always_inline)) void of(const __m512 (&x)[K], __m512 (&y)[K]) const {
    __m512i at[K], exponent[K];
    __m512 r[K];
    LSF_EACH at[k] = _mm512_sub_epi32(_mm512_castps_si512(x[k]), _mm512_set1_epi32(0x3f3504f3));
    LSF_EACH exponent[k] = _mm512_and_si512(at[k], _mm512_set1_epi32(int32_t(0xff800000)));
    LSF_EACH at[k] = _mm512_srli_epi32(at[k], 18);  // its low five bits count
    LSF_EACH r[k] = _mm512_permutex2var_ps(inverse_[0], at[k], inverse_[1]);
    LSF_EACH y[k] = _mm512_permutex2var_ps(log2_[0], at[k], log2_[1]);
    LSF_EACH at[k] = _mm512_sub_epi32(_mm512_castps_si512(x[k]), exponent[k]);  // z
    LSF_EACH r[k] = _mm512_fmsub_ps(_mm512_castsi512_ps(at[k]), r[k], _mm512_set1_ps(1.0f));
    __m512 slope[K];  // log2(1 + r) / r, a minimax fit for |r| < 0.0153
    LSF_EACH slope[k] = _mm512_fmadd_ps(r[k], _mm512_set1_ps(0.48099388f),
                                        _mm512_set1_ps(-0.72141716f));
    LSF_EACH slope[k] = _mm512_fmadd_ps(slope[k], r[k], _mm512_set1_ps(1.44269503f));
    LSF_EACH y[k] = _mm512_fmadd_ps(slope[k], r[k], y[k]);
    LSF_EACH y[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exponent[k]),
                                    _mm512_set1_ps(1.0f / (1 << 23)), y[k]);
  }

 private:
  __m512 inverse_[2], log2_[2];
};

// e^x of K vectors, as exp_of in math.h: the same polynomial, in half the instructions.
template <int K>
inline __attribute__((always_inline)) void exp_of_each(const __m512 (&x)[K], __m512 (&y)[K]) {
  __m512 n[K], f[K];
  LSF_EACH f[k] = _mm512_max_ps(_mm512_set1_ps(-105.0f), x[k]);  // NaN stays: it comes second
  LSF_EACH n[k] = _mm512_mul_ps(f[k], _mm512_set1_ps(1.44269504f));
  LSF_EACH n[k] = _mm512_roundscale_ps(n[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  LSF_EACH f[k] = _mm512_fnmadd_ps(n[k], _mm512_set1_ps(0.693359375f), f[k]);
  LSF_EACH f[k] = _mm512_fmadd_ps(n[k], _mm512_set1_ps(2.12194440e-4f), f[k]);
  LSF_EACH y[k] = _mm512_fmadd_ps(f[k], _mm512_set1_ps(0.00138146088f),
                                  _mm512_set1_ps(0.008368709862f));
  LSF_EACH y[k] = _mm512_fmadd_ps(y[k], f[k], _mm512_set1_ps(0.04166838744f));
  LSF_EACH y[k] = _mm512_fmadd_ps(y[k], f[k], _mm512_set1_ps(0.1666652069f));
  LSF_EACH y[k] = _mm512_fmadd_ps(y[k], f[k], _mm512_set1_ps(0.4999999345f));
  LSF_EACH y[k] = _mm512_fmadd_ps(y[k], f[k], _mm512_set1_ps(1.0f));
  LSF_EACH y[k] = _mm512_fmadd_ps(y[k], f[k], _mm512_set1_ps(1.0f));
  LSF_EACH y[k] = _mm512_scalef_ps(y[k], n[k]);
}

#undef LSF_EACH

}  // namespace
}  // namespace landscape_fast

#endif
