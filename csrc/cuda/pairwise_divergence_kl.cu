// KL of 9 to 128 members as products on the tensor cores: kl_product.h makes the cross terms of
// every chunk of examples, here they become divergences, pairs that come out close are summed again
// from accurate terms, and the chunks are added.
//
// Bytes, for logits of 4: rows of 512 to 16384 classes, and any of more than 64 members, are read
// once, 4 M N C. Shorter ones come from HBM once too, the second time from L2, since a group of
// examples is at most 96 KiB, or one; longer ones come twice. The cross terms are at most
// 264 * 8 * 128^2 bytes.
#include "cuda/pairwise_divergence_kl.h"

#include <algorithm>

#include "cuda/kl_product.h"

namespace landscape_fast {
namespace {

// The members for which the product is worth its padding to 16, 32, 64 or 128. Estimates, in
// instructions of a lane for each logit as nvcc 13.0 makes them for sm_90: the product takes about
// 90 whatever M is (loads, exp, splitting, shared memory), with its multiplications; tiles of
// pairs in float32 take 45 for each tile that reads the logit, about M / 8 of them, 30 for the
// statistics, and 1.5 for each other member. Up to 8 members there is one tile, which does no work
// on padding.
// By that count an H200 needs 4 ms for 128 members, 10,000 examples and 1000 classes, where its
// memory needs 1.2 and its tensor cores 1.6: the loads and the splitting are what to shorten first.
// The count leaves out that 128 members have one block on an SM at a time, for want of registers.
constexpr int64_t FEWEST = 9, MOST = 128;

constexpr int64_t KL_BLOCKS = 264;  // at most: 2 for each of 132 SMs
constexpr int64_t GROUP_BYTES = 96 * 1024;
// From where to where rows are read once: below, a step would be mostly padding; above, too many
// terms would be added in float32.
constexpr int64_t LEAST_ONLINE = 512, MOST_ONLINE = 16384;
// Where a step has 32 classes: rows are no shorter, or adding up their few examples is no longer
// than a second read would be.
template <int MEMBERS>
constexpr bool ALWAYS_ONLINE = MEMBERS == 128;

template <int MEMBERS, bool ONLINE>
__global__ void __launch_bounds__(KL_THREADS, KlShape<MEMBERS>::BLOCKS)
kl_product_kernel(const KlJob job) {
  using S = KlShape<MEMBERS>;
  using Block = KlBlock<MEMBERS, ONLINE>;
  LSF_SHARED(__half, operand, 4 * MEMBERS * S::PITCH);
  LSF_SHARED(float4, part, KL_THREADS);
  LSF_SHARED(Span, spans, S::SPANS * MEMBERS);
  LSF_SHARED(float, scale, MEMBERS);
  LSF_SHARED(float, from, MEMBERS);
  LSF_SHARED(double, of_spans, S::SPANS * MEMBERS);
  LSF_SHARED(unsigned, columns, S::KB / 16);
  LSF_SHARED(int, seen, 2);
  const Block block{job, operand, part, spans, scale, from, of_spans, columns, seen};
  const int thread = int(threadIdx.x);
  const int64_t left = job.rows.logits.N - int64_t(blockIdx.x) * job.per_chunk;
  const int examples = int(left < job.per_chunk ? left : job.per_chunk);
  for (int done = 0; done < examples; done += job.group) {
    const int64_t n = int64_t(blockIdx.x) * job.per_chunk + done;
    const int group = examples - done < job.group ? examples - done : job.group;
    const int count = group * block.C();
    if (ONLINE) {
      block.find_from(n, false);
    } else {
      make_stats_of<KL_THREADS>(job.rows, 0, block.M(), n, n + group, {job.stats, nullptr});
    }
    if (thread < 2) seen[thread] = 0;
    __syncthreads();
    typename Block::Sums sums = {};
    int again = 0;
    do {
      for (int e = 0; e < count; e += S::KB) {
        block.build(n, e, count);
        block.multiply(sums);
        __syncthreads();
        const int next = e + S::KB;
        if (!ONLINE && (next % (STEPS_OF_SUM * S::KB) == 0 || next >= count)) {
          block.flush(sums, done == 0 && next <= STEPS_OF_SUM * S::KB);
        }
      }
      // The same for all threads; recomputed(), or nvcc makes a second loop for the second time.
      again = ONLINE && !recomputed(again) && seen[Block::FAR_ABOVE];
      if (again) {
        block.drop(sums);
        block.find_from(n, true);
        __syncthreads();
      }
    } while (again);
    const bool far = seen[Block::FAR_BELOW];
    if (ONLINE) {
      block.close_example(n);
      block.flush(sums, done == 0);
    }
    __syncthreads();
    for (int e = 0; far && e < count; e += S::KB) block.add_far(n, e, count);
  }
  for (int m = thread / 32; m < block.M(); m += KL_WARPS) {
    double sum = 0;
    for (int k = thread % 32; k < examples; k += 32) {
      const float4 row = block.stats_at(m, int64_t(blockIdx.x) * job.per_chunk + k);
      sum += ONLINE ? double(row.z) + double(row.w) : double(row.w);
    }
    sum = group_sum(sum, 32);
    if (thread % 32 == 0) job.logs[int64_t(blockIdx.x) * block.M() + m] = sum;
  }
}

constexpr int FINISH_THREADS = 128;

// KL of member blockIdx.x from all others over one chunk, into the first slice of its cross terms.
template <int MEMBERS>
__global__ void __launch_bounds__(FINISH_THREADS) kl_finish_kernel(const KlJob job) {
  using S = KlShape<MEMBERS>;
  LSF_SHARED(double, scratch, FINISH_THREADS / 32);
  LSF_SHARED(int, close, FINISH_THREADS);
  const Logits& logits = job.rows.logits;
  const int64_t M = logits.M, N = logits.N, C = logits.C, chunk = blockIdx.y;
  const int64_t first = chunk * job.per_chunk;
  const int64_t last = first + job.per_chunk < N ? first + job.per_chunk : N;
  const int i = int(blockIdx.x), thread = int(threadIdx.x), j = thread < M ? thread : i;
  double* const cross = job.cross + chunk * S::SLICES * MEMBERS * MEMBERS + i * MEMBERS;
  double of_i = 0, of_j = 0;
  for (int s = 0; s < S::SLICES; ++s) {
    of_i += cross[s * MEMBERS * MEMBERS + i];
    of_j += cross[s * MEMBERS * MEMBERS + j];
  }
  const double* const logs = job.logs + chunk * M;
  double sum = (of_i - of_j) - (logs[i] - logs[j]);
  close[thread] = thread < M && j != i && sum < double(CLOSE) * double(last - first);
  __syncthreads();
  const auto value = [&](int64_t m, int64_t n, int64_t c) {
    float x;
    with_element(logits.dtype, logits.data, [&](const auto* data) {
      x = to_float(data[m * logits.stride_m + n * logits.stride_n + c * logits.stride_c]);
    });
    return kl_value(x, job.stats[m * N + n]);
  };
  for (int other = 0; other < FINISH_THREADS; ++other) {
    if (!close[other]) continue;  // the same for all threads
    double again = 0;
    for (int64_t e = thread; e < (last - first) * C; e += FINISH_THREADS) {
      const int64_t n = first + e / C, c = e % C;
      again += double(kl_accurate(value(i, n, c), value(other, n, c)));
    }
    again = block_sum<FINISH_THREADS>(again, scratch);
    if (thread == other) sum = again;
  }
  if (thread < M) cross[thread] = j == i ? logs[i] - logs[i] : sum;
}

constexpr int MEAN_PAIRS = 32, MEAN_ROWS = 8;

// out [M, M] and, unless null, total [M, M]: what the chunks add up to.
template <int MEMBERS>
__global__ void __launch_bounds__(MEAN_PAIRS * MEAN_ROWS)
kl_means_kernel(const KlJob job, int64_t chunks, float* __restrict__ out,
                double* __restrict__ total) {
  LSF_SHARED(double, parts, MEAN_PAIRS * MEAN_ROWS);
  const int64_t M = job.rows.logits.M, pair = int64_t(blockIdx.x) * MEAN_PAIRS + threadIdx.x;
  const int64_t step = KlShape<MEMBERS>::SLICES * MEMBERS * MEMBERS;
  double sum = 0;
  if (pair < M * M) {
    const double* const from = job.cross + pair / M * MEMBERS + pair % M;
    for (int64_t k = threadIdx.y; k < chunks; k += MEAN_ROWS) sum += from[k * step];
  }
  parts[threadIdx.y * MEAN_PAIRS + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || pair >= M * M) return;
  for (int y = 1; y < MEAN_ROWS; ++y) sum += parts[y * MEAN_PAIRS + threadIdx.x];
  out[pair] = float(sum / double(job.rows.logits.N));
  if (total) total[pair] = sum;
}

// Calls `f` with an integral constant: the padded number of members.
template <class F>
auto with_members(int64_t M, F&& f) {
  if (M <= 16) return f(std::integral_constant<int, 16>());
  if (M <= 32) return f(std::integral_constant<int, 32>());
  if (M <= 64) return f(std::integral_constant<int, 64>());
  return f(std::integral_constant<int, 128>());
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// The chunks, and where things are in the workspace.
template <int MEMBERS>
struct Layout {
  using S = KlShape<MEMBERS>;
  bool online;
  int64_t chunks, per_chunk, group;
  int64_t rows, cross, logs;  // bytes

  Layout(int64_t M, int64_t N, int64_t C) {
    online = ALWAYS_ONLINE<MEMBERS> || (C >= LEAST_ONLINE && C <= MOST_ONLINE);
    const int64_t least = ceil_div(2 * S::KB, C);  // examples: two steps
    const int64_t wanted = std::clamp<int64_t>(ceil_div(N, least), 1, KL_BLOCKS);
    per_chunk = std::max<int64_t>(1, ceil_div(N, wanted));
    chunks = ceil_div(N, per_chunk);
    group = online ? 1 : std::max<int64_t>(1, GROUP_BYTES / (4 * M * C));
    rows = aligned(M * N * int64_t(sizeof(float4)));
    cross = chunks * S::SLICES * MEMBERS * MEMBERS * int64_t(sizeof(double));
    logs = aligned(chunks * M * int64_t(sizeof(double)));
  }

  int64_t bytes() const { return rows + cross + logs; }
};

template <int MEMBERS>
void launch(const Logits& logits, void* workspace, float* out, double* sums, void* stream) {
  const Layout<MEMBERS> layout(logits.M, logits.N, logits.C);
  char* const at = static_cast<char*>(workspace);
  KlJob job;
  job.rows = rows_of(logits);
  job.stats = reinterpret_cast<float4*>(at);
  job.per_chunk = int(layout.per_chunk);
  job.group = int(layout.group);
  job.cross = reinterpret_cast<double*>(at + layout.rows);
  job.logs = reinterpret_cast<double*>(at + layout.rows + layout.cross);
  const unsigned chunks = unsigned(layout.chunks), M = unsigned(logits.M);
  if (chunks > 0) {
    auto product = kl_product_kernel<MEMBERS, true>;
    if constexpr (!ALWAYS_ONLINE<MEMBERS>) {
      if (!layout.online) product = kl_product_kernel<MEMBERS, false>;
    }
    LSF_LAUNCH(product, dim3(chunks, 1, 1), dim3(KL_THREADS, 1, 1), 0, stream, job);
    const auto finish = kl_finish_kernel<MEMBERS>;
    LSF_LAUNCH(finish, dim3(M, chunks, 1), dim3(FINISH_THREADS, 1, 1), 0, stream, job);
  }
  const auto means = kl_means_kernel<MEMBERS>;
  const dim3 grid(unsigned(ceil_div(int64_t(M) * M, MEAN_PAIRS)), 1, 1);
  LSF_LAUNCH(means, grid, dim3(MEAN_PAIRS, MEAN_ROWS, 1), 0, stream, job, layout.chunks, out, sums);
}

}  // namespace

bool pairwise_kl_is_for(int64_t M, int64_t C) {
  return M >= FEWEST && M <= MOST && (M <= 64 || C <= MOST_ONLINE);
}

int64_t pairwise_kl_cuda_workspace(int64_t M, int64_t N, int64_t C) {
  return with_members(M, [&](auto members) { return Layout<members()>(M, N, C).bytes(); });
}

int pairwise_kl_cuda(const Logits& logits, void* workspace, float* out, double* sums,
                     void* stream) {
  with_members(logits.M, [&](auto members) {
    launch<members()>(logits, workspace, out, sums, stream);
  });
  return int(cudaGetLastError());
}

}  // namespace landscape_fast
