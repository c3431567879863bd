// What the CUDA runtime says about itself; see show_config.
#include "api.h"
#include "cuda/launch.h"

namespace landscape_fast {

int cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace landscape_fast
