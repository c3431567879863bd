// Counter-based random numbers: value (seed, member, element) is a function of these three alone,
// and its integers are the same everywhere: here, in landscape_fast/ops/_noise.py, in
// kernels/perturb.py.
//
// The generator is Philox4x32-10 (Salmon et al. 2011). Its key is the seed (low word, high word);
// the counter holds element / 4 (low, high), the member and the stream. One call gives the words of
// four neighbouring elements: stream NORMALS their Gaussian numbers, stream UNIFORMS their masks.
#pragma once

#include "api.h"
#include "math.h"

namespace landscape_fast {

constexpr uint32_t NORMALS = 0, UNIFORMS = 1;
constexpr int WORDS = 4;  // elements per call

struct Words {
  uint32_t at[WORDS];
};

LSF_HD Words philox(Words c, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t(0xD2511F53u) * c.at[0];
    const uint64_t right = uint64_t(0xCD9E8D57u) * c.at[2];
    c = {{uint32_t(right >> 32) ^ c.at[1] ^ k0, uint32_t(right),
          uint32_t(left >> 32) ^ c.at[3] ^ k1, uint32_t(left)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

LSF_HD bool has_noise(const Perturbation& draw) { return draw.scales || draw.scale != 0.0f; }
LSF_HD bool has_dropout(const Perturbation& draw) { return draw.dropouts || draw.dropout != 0.0f; }

LSF_HD Words words_of(uint64_t seed, uint64_t quad, uint32_t member, uint32_t stream) {
  const Words counter = {{uint32_t(quad), uint32_t(quad >> 32), member, stream}};
  return philox(counter, uint32_t(seed), uint32_t(seed >> 32));
}

// The nearest float; in two exact halves on the CPU, where few instruction sets convert unsigned
// integers.
LSF_HD float rounded(uint32_t x) {
#ifdef __CUDA_ARCH__
  return float(x);
#else
  return float(int32_t(x >> 16)) * 65536.0f + float(int32_t(x & 0xffffu));
#endif
}

// (x + 1/2) / 2^32
LSF_HD float fraction(uint32_t x) { return rounded(x) * 0x1p-32f + 0x1p-33f; }

// sqrt(-2 ln u) for u = (x + 1/2) / 2^32, in [1.5e-5, 6.77]; relative error below 2e-7. Near
// u = 1, where a float has lost it, 1 - u comes from the integer.
LSF_HD float radius_of(uint32_t x) {
  const uint32_t i = uint32_t(bits_of(fraction(x)));
  const int32_t e = int32_t(i - 0x3f3504f3u) >> 23;  // as in log2_beside; at most 0
  const float mantissa = float_of(int32_t(i - (uint32_t(e) << 23)));
  const float f = e == 0 ? -fraction(~x) : mantissa - 1.0f;
  return sqrtf(-2.0f * LN2 * (float(e) + log2_near_one(f)));
}

// cos and sin of 2 pi x / 2^32, error below 1.2e-7. The quarter turn is found in integers; the
// polynomials serve an eighth of a turn to either side.
LSF_HD void turn_of(uint32_t x, float& cosine, float& sine) {
  const uint32_t quarter = (x + 0x20000000u) >> 30;
  const float t = float(int32_t(x - (quarter << 30))) * 0x1p-32f;
  const float z = t * t;
  float s = -75.39356272f;  // sin(2 pi t) / t, relative error 3e-9
  s = s * z + 81.59235356f;
  s = s * z - 41.34166146f;
  s = (s * z + 6.283185287f) * t;
  float c = 59.22924326f;  // (cos(2 pi t) - 1) / t^2; error of the cosine 7e-11
  c = c * z - 85.44323627f;
  c = c * z + 64.93932185f;
  c = c * z - 19.73920868f;
  c = c * z + 1.0f;
  const float along = quarter & 1 ? s : c, across = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -along : along;
  sine = quarter & 2 ? -across : across;
}

// Two independent standard normal numbers (Box and Muller 1958).
LSF_HD void normals_of(uint32_t x, uint32_t y, float& first, float& second) {
  const float r = radius_of(x);
  float c, s;
  turn_of(y, c, s);
  first = r * c;
  second = r * s;
}

// Whether an element stays that is dropped with probability p; its first 24 bits decide, exactly.
LSF_HD bool stays(uint32_t x, float p) { return float(int32_t(x >> 8)) >= p * 0x1p24f; }

}  // namespace landscape_fast
