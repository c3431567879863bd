// Runs CUDA kernels on the CPU, for tests: g++ compiles the same .cu, with the threads of a block
// as fibres that switch at barriers and shuffles. Blocks run one after another.
//
// What it finds: wrong indexing and arithmetic (results), races and missing barriers (results that
// change with the order in which threads run), barriers that not all threads reach, shuffles that
// name a lane which has left or waits elsewhere, launches outside the limits of a GPU, shared
// memory that is read before it is written (it starts as NaN), and with
// -fsanitize=address,undefined accesses out of bounds and misaligned vector accesses. What it
// cannot find: races between blocks other than by order, anything about memory ordering or speed,
// errors of inline PTX.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibre.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline

namespace cuda_on_cpu {

enum class Order { forward, reverse, random };

struct Thread {
  enum State { ready, at_barrier, in_warp, done };
  Fibre fibre;
  uint3 index{};
  State state = ready;
  const char* where = nullptr;  // source line of the barrier or warp operation it waits at
  // The warp operation: lanes that take part, value offered, lane to read from, what comes back.
  unsigned mask = 0, source = 0, votes = 0;
  unsigned long long offer = 0, result = 0;
};

// The one block that runs, and how blocks are to be run.
struct Machine {
  Order order = Order::forward;
  unsigned seed = 0;
  dim3 grid, block;
  uint3 block_index{};
  std::vector<Thread> threads;
  size_t live = 0;  // threads of this block; `threads` keeps the stacks of the largest so far
  Thread* current = nullptr;
  std::function<void()> body;
  struct Bytes {
    std::unique_ptr<char[]> data;
    size_t size = 0;
  };
  Bytes dynamic_shared;
  std::map<const void*, Bytes> shared;  // by declaration
  std::string failure;                  // of the launch under way, then of the last one that failed
  cudaError_t error = cudaSuccess;
  long long launches = 0, blocks = 0;
};

inline Machine machine;

// In a kernel: ends the launch, with a message.
[[noreturn]] inline void fail(const std::string& what) {
  Thread& me = *machine.current;
  machine.failure = what;
  me.state = Thread::done;
  me.fibre.leave();
  std::abort();
}

inline std::string at(const char* where) { return std::string(" at ") + (where ? where : "?"); }

inline void run_thread() {
  machine.body();
  machine.current->state = Thread::done;
}

inline size_t lane() { return size_t(machine.current - machine.threads.data()) % 32; }

// Lets the warp operation of thread i happen if every lane it names has arrived there.
inline bool release_warp(size_t i) {
  std::vector<Thread>& threads = machine.threads;
  const Thread& me = threads[i];
  const size_t first = i / 32 * 32;
  unsigned votes = 0;
  for (size_t k = 0; k < 32; ++k) {
    if (!(me.mask >> k & 1)) continue;
    if (first + k >= machine.live || threads[first + k].state == Thread::done) {
      throw std::runtime_error("a warp operation names lane " + std::to_string(k) +
                               ", which has left the kernel or never was," + at(me.where));
    }
    const Thread& other = threads[first + k];
    if (other.state != Thread::in_warp) return false;
    if (other.mask != me.mask || std::strcmp(other.where, me.where) != 0) {
      throw std::runtime_error("lanes of a warp are in different operations," + at(me.where) +
                               " and" + at(other.where));
    }
    votes |= unsigned(other.offer & 1) << k;
  }
  for (size_t k = 0; k < 32; ++k) {
    if (!(me.mask >> k & 1)) continue;
    Thread& t = threads[first + k];
    t.result = threads[first + t.source].offer;
    t.votes = votes;
    t.state = Thread::ready;
  }
  return true;
}

// Releases the barrier of the block when all its threads wait there.
inline bool release_block() {
  const char* where = nullptr;
  size_t waiting = 0, done = 0;
  for (size_t i = 0; i < machine.live; ++i) {
    const Thread& t = machine.threads[i];
    if (t.state == Thread::done) ++done;
    if (t.state != Thread::at_barrier) continue;
    if (waiting++ && std::strcmp(t.where, where) != 0) {
      throw std::runtime_error("threads wait at different barriers," + at(where) + " and" +
                               at(t.where));
    }
    where = t.where;
  }
  if (!waiting || waiting + done < machine.live) return false;
  if (done) {
    throw std::runtime_error("threads have left the kernel while others wait at the barrier" +
                             at(where));
  }
  for (size_t i = 0; i < machine.live; ++i) machine.threads[i].state = Thread::ready;
  return true;
}

inline std::string deadlock() {
  std::string text = "deadlock: part of a warp or of the block never arrives;";
  const char* last = "";
  for (size_t i = 0; i < machine.live; ++i) {
    const Thread& t = machine.threads[i];
    if (t.state == Thread::done || std::strcmp(t.where, last) == 0) continue;
    text += " thread " + std::to_string(i) + " waits" + at(last = t.where) + ";";
  }
  return text;
}

inline void poison(Machine::Bytes& bytes) { std::memset(bytes.data.get(), 0xff, bytes.size); }

inline void run_block(std::mt19937& random) {
  Machine& m = machine;
  ++m.blocks;
  m.live = size_t(m.block.x) * m.block.y * m.block.z;
  if (m.threads.size() < m.live) m.threads = std::vector<Thread>(m.live);
  poison(m.dynamic_shared);
  for (auto& [declaration, bytes] : m.shared) poison(bytes);
  std::vector<size_t> turn(m.live);
  for (size_t i = 0; i < m.live; ++i) {
    Thread& t = m.threads[i];
    t.index = {unsigned(i % m.block.x), unsigned(i / m.block.x % m.block.y),
               unsigned(i / (size_t(m.block.x) * m.block.y))};
    t.state = Thread::ready;
    t.fibre.start(run_thread);
    turn[i] = m.order == Order::reverse ? m.live - 1 - i : i;
  }
  for (size_t left = m.live; left;) {
    if (m.order == Order::random) std::shuffle(turn.begin(), turn.end(), random);
    bool progress = false;
    for (size_t i : turn) {
      Thread& t = m.threads[i];
      if (t.state == Thread::ready) {
        m.current = &t;
        t.fibre.resume();
        progress = true;
        if (!m.failure.empty()) throw std::runtime_error(m.failure);
        left -= t.state == Thread::done;
      }
      if (t.state == Thread::in_warp) progress = release_warp(i) || progress;
    }
    if (!progress && left && !release_block()) throw std::runtime_error(deadlock());
  }
}

// What a GPU of compute capability 8.0 to 10.0 refuses.
inline cudaError_t check(dim3 grid, dim3 block, size_t shared_bytes) {
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || block.z > 64 ||
      uint64_t(block.x) * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  return shared_bytes > 48 * 1024 ? cudaErrorInvalidValue : cudaSuccess;
}

template <class... P, class... A>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...), A&&... arguments) {
  Machine& m = machine;
  const std::tuple<std::decay_t<P>...> values(std::forward<A>(arguments)...);
  ++m.launches;
  m.failure.clear();
  if (const cudaError_t error = check(grid, block, shared_bytes); error != cudaSuccess) {
    m.error = error;
    return;
  }
  m.grid = grid;
  m.block = block;
  m.body = [&] { std::apply(kernel, values); };
  m.dynamic_shared = {std::unique_ptr<char[]>(new char[shared_bytes]), shared_bytes};
  m.shared.clear();
  std::mt19937 random(m.seed);
  std::vector<uint64_t> turn(uint64_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < turn.size(); ++i) {
    turn[i] = m.order == Order::reverse ? turn.size() - 1 - i : i;
  }
  if (m.order == Order::random) std::shuffle(turn.begin(), turn.end(), random);
  try {
    for (uint64_t i : turn) {
      m.block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                       unsigned(i / (uint64_t(grid.x) * grid.y))};
      run_block(random);
    }
  } catch (const std::runtime_error& error) {
    const uint3& b = m.block_index;
    m.failure = std::string(error.what()) + " (block " + std::to_string(b.x) + ", " +
                std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
    m.error = cudaErrorLaunchFailure;
  }
}

// Waits until all lanes of `mask` have arrived here.
inline Thread& warp_operation(unsigned mask, unsigned long long offer, unsigned source,
                              const char* where) {
  Thread& me = *machine.current;
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask of its warp operation" + at(where));
  if (!(mask >> source & 1)) fail("a lane reads from one outside the mask" + at(where));
  me.mask = mask;
  me.offer = offer;
  me.source = source;
  me.where = where;
  me.state = Thread::in_warp;
  me.fibre.leave();
  return me;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* where) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  unsigned long long offer = 0;
  std::memcpy(&offer, &value, sizeof value);
  std::memcpy(&value, &warp_operation(mask, offer, source, where).result, sizeof value);
  return value;
}

inline unsigned ballot(unsigned mask, bool vote, const char* where) {
  return warp_operation(mask, vote, unsigned(lane()), where).votes;
}

// The lane a shuffle reads from: within its group of `width` lanes, or itself.
inline unsigned source_down(unsigned delta, int width = 32) {
  const unsigned l = unsigned(lane());
  return l % width + delta < unsigned(width) ? l + delta : l;
}
inline unsigned source_up(unsigned delta, int width = 32) {
  const unsigned l = unsigned(lane());
  return l % width >= delta ? l - delta : l;
}
inline unsigned source_xor(int bits, int width = 32) {
  const unsigned l = unsigned(lane()), other = l ^ unsigned(bits);
  return other / width <= l / width ? other : l;
}
inline unsigned source_index(int source, int width = 32) {
  return unsigned(lane()) / width * width + unsigned(source) % width;
}

inline void barrier(const char* where) {
  Thread& me = *machine.current;
  me.where = where;
  me.state = Thread::at_barrier;
  me.fibre.leave();
}

template <class T>
T* shared_array(const void* declaration, size_t count) {
  Machine::Bytes& bytes = machine.shared[declaration];
  if (!bytes.data) {
    bytes.size = count * sizeof(T);
    bytes.data.reset(new char[bytes.size]);
    poison(bytes);
  }
  return reinterpret_cast<T*>(bytes.data.get());
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::machine.current->index)
#define blockIdx (cuda_on_cpu::machine.block_index)
#define blockDim (cuda_on_cpu::machine.block)
#define gridDim (cuda_on_cpu::machine.grid)

namespace cuda_on_cpu {
inline unsigned mask_or_all(unsigned mask = 0xffffffffu) { return mask; }
}  // namespace cuda_on_cpu

#define LSF_TEXT_OF(x) #x
#define LSF_TEXT(x) LSF_TEXT_OF(x)
#define LSF_HERE __FILE__ ":" LSF_TEXT(__LINE__)

#define __syncthreads() cuda_on_cpu::barrier(LSF_HERE)
#define __syncwarp(...) \
  cuda_on_cpu::ballot(cuda_on_cpu::mask_or_all(__VA_ARGS__), true, LSF_HERE)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(mask, vote, LSF_HERE)
#define __any_sync(mask, vote) (cuda_on_cpu::ballot(mask, vote, LSF_HERE) != 0)
#define __all_sync(mask, vote) (cuda_on_cpu::ballot(mask, vote, LSF_HERE) == (mask))
#define __shfl_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_index(__VA_ARGS__), LSF_HERE)
#define __shfl_xor_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_xor(__VA_ARGS__), LSF_HERE)
#define __shfl_up_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_up(__VA_ARGS__), LSF_HERE)
#define __shfl_down_sync(mask, value, ...) \
  cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::source_down(__VA_ARGS__), LSF_HERE)

constexpr int warpSize = 32;

// Integers only: kernels whose sums must not depend on the order of threads add no floats this way.
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicAdd(T* address, T value) {
  const T old = *address;
  *address = T(old + value);
  return old;
}

template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

// What launchers call of the runtime.
extern "C" inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::machine.error;
  cuda_on_cpu::machine.error = cudaSuccess;
  return error;
}

extern "C" inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes,
                                              cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

extern "C" inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

extern "C" inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

extern "C" inline const char* cudaGetErrorString(cudaError_t) {
  return cuda_on_cpu::machine.failure.c_str();
}

#define LSF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream),                                                       \
   cuda_on_cpu::launch(dim3(grid), dim3(block), size_t(shared_bytes), kernel, __VA_ARGS__))
#define LSF_SHARED(T, name, count)            \
  static const char name##_declaration = 0; \
  T* const name = cuda_on_cpu::shared_array<T>(&name##_declaration, count)
#define LSF_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(cuda_on_cpu::machine.dynamic_shared.data.get())
