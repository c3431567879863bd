// Products of small matrices by the tensor cores, D [16, 8] += A [16, K] B [K, 8] by a warp, K = 16
// for elements of 16 bits and 8 for float32, and the loads that arrange the operands.
//
// Lane l holds, with g = l / 4 and t = l % 4:
//   16 bits, two elements in a register: a = A(g, 2t), A(g + 8, 2t), A(g, 2t + 8),
//     A(g + 8, 2t + 8), each with its right neighbour; b = B(2t, g), B(2t + 8, g), each with the
//     one below
//   float32: a = A(g, t), A(g + 8, t), A(g, t + 4), A(g + 8, t + 4); b = B(t, g), B(t + 4, g)
//   d = D(g, 2t), D(g, 2t + 1), D(g + 8, 2t), D(g + 8, 2t + 1)
//
// A compiler that makes no device code gets the same from shuffles, so that tests on a CPU see
// everything but the instructions themselves.
#pragma once

#include "cuda/access.h"
#include "cuda/reduce.h"

namespace landscape_fast {

template <class T>
constexpr int MMA_K = sizeof(T) == 2 ? 16 : 8;

// x rounded to the 11 bits of tf32, ties away from 0, as the bits of a float.
__device__ __forceinline__ uint32_t tf32_of(float x) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
#endif
}

__device__ __forceinline__ float float_at(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Four matrices of 8 by 8 elements of 16 bits from shared memory; lane l names row l % 8 of matrix
// l / 8 (16 bytes, aligned), and r[j] becomes elements (l / 4, 2 (l % 4)) and the next of matrix j,
// or with TRANSPOSED elements (2 (l % 4), l / 4) and the one below.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&r)[4]) {
#ifdef __CUDA_ARCH__
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int from = TRANSPOSED ? 2 * t + k : g, at = TRANSPOSED ? g : 2 * t + k;
      const auto* elements = reinterpret_cast<const uint16_t*>(
          __shfl_sync(WHOLE_WARP, reinterpret_cast<uintptr_t>(row), 8 * j + from));
      pair[k] = elements[at];
    }
    r[j] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
#endif
}

#ifndef __CUDA_ARCH__
// What the instruction computes, register by register; `pick` says what half k of a register is.
template <int HALVES, class Pick>
__device__ inline void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2], Pick pick) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int other = 0; other < 4; ++other) {  // the lanes that hold parts of K
    uint32_t left[4], right[2][2];
    const auto pair = [](uint32_t low, uint32_t high, int lane, uint32_t* to) {
      const uint64_t both = __shfl_sync(WHOLE_WARP, uint64_t(high) << 32 | low, lane);
      to[0] = uint32_t(both);
      to[1] = uint32_t(both >> 32);
    };
    for (int i = 0; i < 4; i += 2) pair(a[i], a[i + 1], 4 * g + other, left + i);
    for (int k = 0; k < 2; ++k) pair(b[0], b[1], 4 * (2 * t + k) + other, right[k]);
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < HALVES; ++k) {
        for (int e = 0; e < 4; ++e) {
          d[e] += pick(left[2 * i + e / 2], k) * pick(right[e % 2][i], k);
        }
      }
    }
  }
}
#endif

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  if constexpr (sizeof(T) == 4) {
    mma_by_shuffles<1>(d, a, b, [](uint32_t bits, int) { return float_at(bits); });
  } else {
    mma_by_shuffles<2>(d, a, b, [](uint32_t bits, int k) {
      const uint16_t half = uint16_t(bits >> (16 * k));
      T x;
      memcpy(static_cast<void*>(&x), &half, sizeof x);
      return to_float(x);
    });
  }
#endif
}

// The same with float32 operands: tf32 factors, or with EXACT each in two of them, which leaves out
// only products of their last bits, and makes NaN of an infinite one.
template <bool EXACT>
__device__ __forceinline__ void mma_float(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t a_high[4], b_high[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a_high[i] = tf32_of(a[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) b_high[i] = tf32_of(b[i]);
  if constexpr (EXACT) {
    uint32_t a_low[4], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) a_low[i] = tf32_of(a[i] - float_at(a_high[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) b_low[i] = tf32_of(b[i] - float_at(b_high[i]));
    mma<float>(d, a_low, b_high);
    mma<float>(d, a_high, b_low);
  }
  mma<float>(d, a_high, b_high);
}

}  // namespace landscape_fast
