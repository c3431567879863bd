// The switches of the machine that runs kernels, and what it says, for ctypes.
#include "machine.h"

extern "C" {

// order: 0 forward, 1 reverse, 2 random by `seed`.
void shim_order(int order, unsigned seed) {
  cuda_on_cpu::machine.order = cuda_on_cpu::Order(order);
  cuda_on_cpu::machine.seed = seed;
}

// Why the last launch failed; "" if it did not.
const char* shim_failure() { return cuda_on_cpu::machine.failure.c_str(); }

long long shim_launches() { return cuda_on_cpu::machine.launches; }

}  // extern "C"
