// Which compiled variant of a CPU kernel runs here.
//
// The build compiles every *_simd.cpp once per instruction set, into namespace
// landscape_fast::baseline, ::avx2 or ::avx512 (macro LSF_ISA). Off x86-64, and with a compiler
// that does not know the flags, LSF_X86_VARIANTS is undefined and only the baseline exists.
// This header is for the files that choose, never for a *_simd.cpp.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace landscape_fast {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The best variant this CPU can run.
static inline Isa best_isa() {
#ifdef LSF_X86_VARIANTS
  __builtin_cpu_init();
  // x86-64-v3 and -v4 by their members: compilers before GCC 12 do not know the levels by name.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::avx512 : v3 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

// The variant to run: the best one, or a lower one that LANDSCAPE_FAST_ISA names (for tests, so it
// is read at every call). A name above what the CPU has gives the best it has.
static inline Isa isa() {
  static const Isa best = best_isa();
  const char* wish = std::getenv("LANDSCAPE_FAST_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  const std::string name(wish);
  Isa asked;
  if (name == "baseline") {
    asked = Isa::baseline;
  } else if (name == "avx2") {
    asked = Isa::avx2;
  } else if (name == "avx512") {
    asked = Isa::avx512;
  } else {
    throw std::invalid_argument("LANDSCAPE_FAST_ISA must be baseline, avx2 or avx512; got " + name);
  }
  return asked < best ? asked : best;
}

static inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace landscape_fast
