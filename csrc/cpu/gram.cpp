// Gram matrices of K models: tasks of consecutive elements on threads, added up in a fixed order.
#include "gram.h"

#include <vector>

#include "isa.h"
#include "parallel.h"
#include "variants.h"

namespace landscape_fast {
namespace {

constexpr int64_t LEAST = 8192;  // elements of a task, unless a part has fewer
constexpr int64_t TASKS = 64;    // of a network, beside one for each part

struct Task {
  int64_t part, first, last;
};

// Tasks depend on the sizes alone, never on the number of threads.
std::vector<Task> tasks_of(const GramPart* parts, int64_t L) {
  int64_t elements = 0;
  for (int64_t l = 0; l < L; ++l) elements += parts[l].P;
  const int64_t share = (elements + TASKS - 1) / TASKS;
  const int64_t most = (share + LEAST - 1) / LEAST * LEAST;
  std::vector<Task> tasks;
  for (int64_t l = 0; l < L; ++l) {
    for (int64_t first = 0; first < parts[l].P; first += most) {
      tasks.push_back({l, first, first + most < parts[l].P ? first + most : parts[l].P});
    }
  }
  return tasks;
}

}  // namespace

void gram(const GramPart* parts, int64_t L, int64_t K, double* out, int threads) {
  const Isa which = isa();
  const std::vector<Task> tasks = tasks_of(parts, L);
  const int64_t count = int64_t(tasks.size()), area = K * K;
  int64_t elements = 0;
  for (const Task& task : tasks) elements += task.last - task.first;
  threads = elements * K < 2 * ALONE ? 1 : fewer(threads, count);
  const auto sums = zeros<double>(count * area);
  in_parallel(count, threads, [&](int64_t index, int) {
    const Task& task = tasks[size_t(index)];
    LSF_VARIANT(which, gram_task)
    (parts[task.part], K, task.first, task.last, sums.get() + index * area);
  });
  for (int64_t k = 0; k < L * area; ++k) out[k] = 0;
  for (int64_t index = 0; index < count; ++index) {
    const double* from = sums.get() + index * area;
    double* to = out + tasks[size_t(index)].part * area;
    for (int64_t k = 0; k < area; ++k) to[k] += from[k];
  }
  for (int64_t l = 0; l < L; ++l) {
    double* matrix = out + l * area;
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[i * K + j] = matrix[j * K + i];
    }
  }
}

}  // namespace landscape_fast
