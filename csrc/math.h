// Scalar maths shared by CPU and CUDA kernels: plain expressions that compilers vectorise, with no
// library call, no branch and no table. Natural units are nats.
//
// The polynomials are minimax fits (Remez); the error in each comment is that of the polynomial.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LSF_HD static __host__ __device__ __forceinline__
#else
#define LSF_HD static inline __attribute__((always_inline))
#endif

namespace landscape_fast {

constexpr float LN2 = 0.693147180559945f;

// A divergence summed from differences of p ln p carries an absolute error near 1e-8 nats. Where
// the mean over a block of examples is below this many nats it is summed again from terms that are
// each accurate and not negative (js_term, kl_term): nearly equal members keep their digits.
constexpr float CLOSE = 1.0f / 256;

LSF_HD int32_t bits_of(float x) {
  int32_t i;
  memcpy(&i, &x, sizeof i);
  return i;
}

LSF_HD float float_of(int32_t i) {
  float x;
  memcpy(&x, &i, sizeof x);
  return x;
}

// 2^n for -127 < n < 128; for any other n, which only NaN brings, some float.
LSF_HD float two_to(int32_t n) { return float_of(int32_t(uint32_t(n + 127) << 23)); }

// log2(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)), relative error 3e-8 before rounding.
LSF_HD float log2_near_one(float f) {
  float y = 0.1258355944f;
  y = y * f - 0.2072682098f;
  y = y * f + 0.2157154338f;
  y = y * f - 0.2389450378f;
  y = y * f + 0.2879162895f;
  y = y * f - 0.3607036749f;
  y = y * f + 0.4809106416f;
  y = y * f - 0.7213473469f;
  y = y * f + 1.442695004f;
  return f * y;
}

// log2(x) - e for x >= 0, relative error 3e-8, with the e that brings it nearest to 0. At 0 (and
// below 1e-38), for NaN and for infinity, some finite numbers.
LSF_HD float log2_beside(float x, int32_t& e) {
  const uint32_t i = uint32_t(bits_of(x));
  e = int32_t(i - 0x3f3504f3u) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  return log2_near_one(float_of(int32_t(i - (uint32_t(e) << 23))) - 1.0f);
}

// log2(x), finite at 0: x * log2_of(x) is 0 there with no test.
LSF_HD float log2_of(float x) {
  int32_t e;
  const float rest = log2_beside(x, e);
  return float(e) + rest;
}

// ln x for x >= 0, absolute error 5e-8; -inf at 0; NaN and infinity stay.
LSF_HD double ln_of(float x) {
  int32_t e;
  const float rest = log2_beside(x, e);
  const double y = 0.6931471805599453 * (double(e) + double(rest));
  return x > 0.0f && x < HUGE_VALF ? y : x == 0.0f ? -HUGE_VAL : double(x);
}

// e^x for x <= 0, relative error 3e-9 before rounding; below the smallest float 0; e^0 is exactly
// 1; NaN stays NaN.
LSF_HD float exp_of(float x) {
  x = x < -105.0f ? -105.0f : x;  // e^-105 rounds to 0
  const float shift = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest integer low
  const float z = x * 1.44269504f + shift;
  const int32_t n = bits_of(z) - 0x4b400000;
  const float k = z - shift;
  float f = x - k * 0.693359375f;  // ln 2 in two parts: the first product is exact
  f = f + k * 2.12194440e-4f;
  float y = 0.00138146088f;  // (e^f - 1 - f) / f^2: the first two terms are then exact
  y = y * f + 0.008368709862f;
  y = y * f + 0.04166838744f;
  y = y * f + 0.1666652069f;
  y = y * f + 0.4999999345f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  const int32_t half = n >> 1;  // 2^n in two factors, since it may be subnormal
  return y * two_to(half) * two_to(n - half);
}

// One class of JS(p, q): (p ln(p / m) + q ln(q / m)) / 2 with m = (p + q) / 2. Not negative, 0
// where p = q, symmetric to the bit, and accurate relative to itself for any p and q (0 included).
// `far` is the same by logarithms, taken where p and q differ by more than a factor of 3.
LSF_HD float js_term(float p, float q, float far) {
  const float t = p + q;
  const float u = (p - q) / (t < 1e-37f ? 1e-37f : t);
  const float x = u * u;  // ((1+u) ln(1+u) + (1-u) ln(1-u)) / u^2 for u^2 <= 1/4, error 3e-9
  float near = 0.02762526703f;
  near = near * x + 0.01823734418f;
  near = near * x + 0.03626623197f;
  near = near * x + 0.06663290631f;
  near = near * x + 0.1666674138f;
  near = near * x + 0.9999999973f;
  return x <= 0.25f ? 0.25f * t * (near * x) : far;
}

LSF_HD float js_term(float p, float q) {
  const float m = 0.5f * (p + q);
  const float sum = p * log2_of(p) + q * log2_of(q);
  return js_term(p, q, 0.5f * LN2 * (sum - 2.0f * m * log2_of(m)));
}

// One class of KL(p || q) = sum_c p ln(p / q), written p ln(p / q) - p + q: what is added sums to 0
// over the classes, each term is not negative, and an error common to all ln(p / q) cancels. For q
// a mixture that holds p (q = 0 only where p = 0).
LSF_HD float kl_term(float p, float q) {
  const float v = (p - q) / (q < 1e-37f ? 1e-37f : q);
  float near = 0.01397600159f;  // ((1+v) ln(1+v) - v) / v^2 for |v| <= 1/2, error 1e-8
  near = near * v - 0.01550625165f;
  near = near * v + 0.009016858865f;
  near = near * v - 0.01208874895f;
  near = near * v + 0.01815530518f;
  near = near * v - 0.02401835784f;
  near = near * v + 0.03331448187f;
  near = near * v - 0.04999032652f;
  near = near * v + 0.08333376809f;
  near = near * v - 0.1666667908f;
  near = (near * v + 0.4999999984f) * v * v;
  const float w = 1.0f + v;
  const float far = LN2 * w * log2_of(w) - v;
  return q * (v * v <= 0.25f ? near : far);
}

// The same from d = ln q - ln p, for any p and q: exact where q underflows. Where p = 0, d must be
// finite.
LSF_HD float kl_term_log(float p, float q, float d) {
  float near = 2.772283005e-6f;  // (e^d - 1 - d) / d^2 for |d| <= 1, error 5e-9
  near = near * d + 2.535482314e-5f;
  near = near * d + 1.984402363e-4f;
  near = near * d + 1.388545208e-3f;
  near = near * d + 8.333310276e-3f;
  near = near * d + 0.04166673454f;
  near = near * d + 0.1666666701f;
  near = (near * d + 0.4999999979f) * d * d;
  const float far = (q - p) - p * d;
  return d * d <= 1.0f ? p * near : far;
}

// Whether logit x displaces the largest one so far, as in torch.argmax: NaN is the largest of all,
// and of equals the first stays.
LSF_HD bool displaces(float x, float best) { return x > best || (x != x && best == best); }

// Calibration bin of a confidence: bin b of B holds (b/B, (b+1)/B], the first one 0 too, the last
// one all above. Edges are the float32 quotients b/B. NaN goes to the last bin.
LSF_HD int32_t calibration_bin(float confidence, int32_t bins) {
  const float scaled = confidence * float(bins);
  int32_t b = scaled < float(bins) ? int32_t(scaled) : bins - 1;  // off by at most one
  b = b < 0 ? 0 : b;
  b -= b > 0 && confidence <= float(b) / float(bins);
  b += b < bins - 1 && confidence > float(b + 1) / float(bins);
  return b;
}

}  // namespace landscape_fast
