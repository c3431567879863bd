// A block of a CUDA kernel on the CPU: its threads as fibres, in an order that can be chosen.
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

// Lets every thread of a warp that can run do so until it waits or is done. Whether any could.
inline bool run_warp(size_t first, std::mt19937& random) {
  Machine& m = machine;
  const size_t count = std::min<size_t>(32, m.live - first);
  size_t lanes[32];
  for (size_t k = 0; k < count; ++k) lanes[k] = m.order == Order::reverse ? count - 1 - k : k;
  if (m.order == Order::random) std::shuffle(lanes, lanes + count, random);
  bool progress = false;
  for (size_t k = 0; k < count; ++k) {
    Thread& t = m.threads[first + lanes[k]];
    if (t.state != Thread::ready) continue;
    m.current = &t;
    t.fibre.resume();
    progress = true;
    if (!m.failure.empty()) throw std::runtime_error(m.failure);
  }
  for (size_t i = first; i < first + count; ++i) {
    if (m.threads[i].state == Thread::in_warp) progress = release_warp(i) || progress;
  }
  return progress;
}

// A warp runs ahead of the others as far as it can: to a barrier or the end. In random order only
// now and then, and else to its next warp operation, so that many interleavings are tried.
inline void run_block(std::mt19937& random) {
  Machine& m = machine;
  ++m.blocks;
  m.live = size_t(m.block.x) * m.block.y * m.block.z;
  if (m.threads.size() < m.live) m.threads = std::vector<Thread>(m.live);
  poison(m.dynamic_shared);
  for (auto& [declaration, bytes] : m.shared) poison(bytes);
  for (size_t i = 0; i < m.live; ++i) {
    Thread& t = m.threads[i];
    t.index = {unsigned(i % m.block.x), unsigned(i / m.block.x % m.block.y),
               unsigned(i / (size_t(m.block.x) * m.block.y))};
    t.state = Thread::ready;
    t.fibre.start(run_thread);
  }
  std::vector<size_t> warps;
  for (size_t first = 0; first < m.live; first += 32) warps.push_back(first);
  if (m.order == Order::reverse) std::reverse(warps.begin(), warps.end());
  const auto left = [&] {
    return std::any_of(m.threads.begin(), m.threads.begin() + m.live,
                       [](const Thread& t) { return t.state != Thread::done; });
  };
  for (;;) {
    if (m.order == Order::random) std::shuffle(warps.begin(), warps.end(), random);
    bool progress = false;
    for (size_t first : warps) {
      const bool ahead = m.order != Order::random || random() % 2;
      while (run_warp(first, random)) {
        progress = true;
        if (!ahead) break;
      }
    }
    if (progress) continue;
    if (!left()) return;
    if (!release_block()) throw std::runtime_error(deadlock());
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

inline unsigned mask_or_all(unsigned mask = 0xffffffffu) { return mask; }

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
