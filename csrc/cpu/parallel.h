// Running the chunks of a job on threads, for the files that choose the variant.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace landscape_fast {

// Below this many elements of work, starting a second thread costs more than it saves.
constexpr int64_t ALONE = 1 << 15;

// In how many chunks a job is cut: 64, unless their partial results of `sums` numbers each would
// take much memory. Never a function of the number of threads.
static inline int64_t chunk_count(int64_t blocks, int64_t sums) {
  const int64_t room = (int64_t(1) << 22) / (sums > 0 ? sums : 1);
  const int64_t most = room > 64 ? 64 : room < 4 ? 4 : room;
  return blocks < most ? blocks : most;
}

static inline int fewer(int threads, int64_t chunks) {
  return threads > chunks ? (chunks > 0 ? int(chunks) : 1) : threads > 0 ? threads : 1;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// `count` numbers of any value, on a cache line. Throws std::bad_alloc, which Python sees as
// MemoryError.
template <class T>
std::unique_ptr<T[], Free> uninitialized(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 64) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

template <class T>
std::unique_ptr<T[], Free> zeros(int64_t count) {
  auto p = uninitialized<T>(count);
  memset(p.get(), 0, size_t(count) * sizeof(T));
  return p;
}

// Scratch memory of `bytes` for each thread, a whole number of cache lines apart.
class Scratch {
 public:
  Scratch(int64_t bytes, int threads)
      : stride_((bytes + 63) / 64 * 64), memory_(zeros<char>(stride_ * threads)) {}
  void* of(int thread) const { return memory_.get() + stride_ * thread; }

 private:
  int64_t stride_;
  std::unique_ptr<char[], Free> memory_;
};

// task(index, thread) for index < count, on at most `threads` threads.
template <class Task>
void in_parallel(int64_t count, int threads, Task task) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t index = 0; index < count; ++index) {
#ifdef _OPENMP
    task(index, omp_get_thread_num());
#else
    task(index, 0);
#endif
  }
}

}  // namespace landscape_fast
