// batch_ensemble_linear on the CPU: products cut into tasks for threads, partial sums added in a
// fixed order.
#include "batch_ensemble_linear.h"

#include "isa.h"
#include "parallel.h"

namespace landscape_fast {
namespace {

int64_t pieces(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Memory for `count` floats of each thread.
class Floats {
 public:
  Floats(int64_t count, int threads)
      : stride_((count + 15) / 16 * 16), memory_(uninitialized<float>(stride_ * threads)) {}
  float* of(int thread) const { return memory_.get() + stride_ * thread; }

 private:
  int64_t stride_;
  std::unique_ptr<float[], Free> memory_;
};

struct Matrix {
  const float* data;
  int64_t stride_n, stride_k;
};

// Rows of one task: a multiple of the strip that fits the cache, fewer where tasks would be few.
int64_t rows_of_task(const RowsJob& job, int64_t rows, int64_t strip) {
  const int64_t cache = (int64_t(1) << 16) / (job.K < 512 ? 512 : job.K) / strip;
  const int64_t share = rows / 16 / strip;
  int64_t strips = cache < share ? cache : share;
  strips = strips > MOST_STRIPS ? MOST_STRIPS : strips < 1 ? 1 : strips;
  return strips * strip;
}

// A matrix [N, K] in panels of N.
std::unique_ptr<float[], Free> packed(const Matrix& matrix, int64_t N, int64_t K, Isa which,
                                      int threads) {
  const int64_t panel = LSF_VARIANT(which, tile_sizes)().panel, panels = pieces(N, panel);
  auto out = uninitialized<float>(panels * panel * K);
  in_parallel(panels, threads, [&](int64_t p, int) {
    LSF_VARIANT(which, pack_panel)
    (matrix.data, matrix.stride_n, matrix.stride_k, N, K, p, out.get() + p * panel * K);
  });
  return out;
}

void by_panels(const RowsJob& job, const float* panels, Isa which, int threads) {
  const int64_t rows = job.out_stride_m == 0 ? job.B : job.M * job.B;
  const int64_t each = rows_of_task(job, rows, LSF_VARIANT(which, tile_sizes)().strip);
  const int64_t tasks = pieces(rows, each);
  threads = fewer(threads, tasks);
  const Floats scratch(LSF_VARIANT(which, rows_scratch)(job, each), threads);
  in_parallel(tasks, threads, [&](int64_t index, int thread) {
    const int64_t first = index * each, last = first + each < rows ? first + each : rows;
    LSF_VARIANT(which, rows_task)(job, panels, first, last, scratch.of(thread));
  });
}

// Few rows: panels are made of them, and tasks are strips of the matrix. Turning rows costs less
// than turning the matrix.
void flipped(const RowsJob& job, const Matrix& matrix, Isa which, int threads) {
  const int64_t rows = job.M * job.B, panel = LSF_VARIANT(which, tile_sizes)().panel;
  const int64_t count = pieces(rows, panel);
  const auto panels = uninitialized<float>(count * panel * job.K);
  in_parallel(count, fewer(threads, count), [&](int64_t p, int) {
    LSF_VARIANT(which, pack_rows_panel)(job, p, panels.get() + p * panel * job.K);
  });
  const int64_t outputs = LSF_VARIANT(which, tile_sizes)().outputs, tasks = pieces(job.N, outputs);
  threads = fewer(threads, tasks);
  const Floats scratch(LSF_VARIANT(which, rows_scratch)(job, outputs), threads);
  in_parallel(tasks, threads, [&](int64_t index, int thread) {
    const int64_t n = index * outputs, last = n + outputs < job.N ? n + outputs : job.N;
    LSF_VARIANT(which, flipped_task)
    (job, panels.get(), matrix.data, matrix.stride_n, n, last, scratch.of(thread));
  });
}

int useful(const BatchEnsembleLinear& op, int threads) {
  return op.M * op.B * op.I * op.O < 8 * ALONE ? 1 : threads;
}

// How `gram` is cut: blocks of at most GRAM_BLOCK examples of a member, in order; chunks of blocks,
// each with a dweight of its own; ranges of outputs.
struct Cut {
  int64_t blocks_of_member, blocks, chunks, outputs, ranges;
};

Cut cut_of(const BatchEnsembleLinear& op) {
  Cut cut;
  cut.blocks_of_member = pieces(op.B, GRAM_BLOCK);
  cut.blocks = op.M * cut.blocks_of_member;
  const int64_t room = (int64_t(1) << 24) / (op.O * op.I);  // 64 MB for the chunks' dweights
  cut.chunks = room > 8 ? 8 : room < 1 ? 1 : room;
  cut.chunks = cut.chunks > cut.blocks ? cut.blocks : cut.chunks;
  cut.outputs = op.O < 256 ? op.O : 256;
  cut.ranges = pieces(op.O, cut.outputs);
  return cut;
}

// Partial sums of `gram`, for every block but dweight, which is for every chunk.
struct Partial {
  int64_t panel, width;  // of dweight and dr: in panels, padded I
  std::unique_ptr<float[], Free> dweight, dr, ds, dbias;
};

void add_up(const BatchEnsembleLinear& op, const Cut& cut, const Partial& partial,
            const BatchEnsembleLinearGradients& out, int threads) {
  const int64_t O = op.O, I = op.I, width = partial.width;
  if (out.dweight != nullptr) {
    in_parallel(O, threads, [&](int64_t o, int) {
      for (int64_t i = 0; i < I; i += partial.panel) {
        const int64_t valid = I - i < partial.panel ? I - i : partial.panel;
        const float* from = partial.dweight.get() + i * O + o * partial.panel;
        float* to = out.dweight + o * I + i;
        for (int64_t j = 0; j < valid; ++j) to[j] = from[j];
        for (int64_t chunk = 1; chunk < cut.chunks; ++chunk) {
          from += O * width;
          for (int64_t j = 0; j < valid; ++j) to[j] += from[j];
        }
      }
    });
  }
  const auto total = [&](const float* from, int64_t count, int64_t stride) {
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += from[k * stride];
    return float(sum);
  };
  const int64_t blocks = cut.blocks_of_member;
  in_parallel(op.M, threads, [&](int64_t m, int) {
    const int64_t block = m * blocks;
    for (int64_t i = 0; out.dr != nullptr && i < I; ++i) {
      const float* from = partial.dr.get() + block * cut.ranges * width + i;
      out.dr[m * I + i] = total(from, blocks * cut.ranges, width);
    }
    for (int64_t o = 0; out.ds != nullptr && o < O; ++o) {
      out.ds[m * O + o] = total(partial.ds.get() + block * O + o, blocks, O);
    }
    for (int64_t o = 0; out.dbias != nullptr && !out.dbias_shared && o < O; ++o) {
      out.dbias[m * O + o] = total(partial.dbias.get() + block * O + o, blocks, O);
    }
  });
  for (int64_t o = 0; out.dbias != nullptr && out.dbias_shared && o < O; ++o) {
    out.dbias[o] = total(partial.dbias.get() + o, cut.blocks, O);
  }
}

void by_gram(const BatchEnsembleLinear& op, const GramJob& job,
             const BatchEnsembleLinearGradients& out, Isa which, int threads) {
  const Cut cut = cut_of(op);
  const int64_t panel = LSF_VARIANT(which, tile_sizes)().panel;
  Partial partial{panel, pieces(op.I, panel) * panel, nullptr, nullptr, nullptr, nullptr};
  const int64_t width = partial.width, O = op.O;
  partial.dbias = uninitialized<float>(cut.blocks * O);
  if (job.products) {
    partial.dweight = uninitialized<float>(cut.chunks * O * width);
    partial.dr = uninitialized<float>(cut.blocks * cut.ranges * width);
    partial.ds = uninitialized<float>(cut.blocks * O);
  }
  const int64_t tasks = cut.chunks * cut.ranges;
  const Floats scratch(LSF_VARIANT(which, gram_scratch)(cut.outputs), fewer(threads, tasks));
  in_parallel(tasks, fewer(threads, tasks), [&](int64_t index, int thread) {
    const int64_t chunk = index / cut.ranges, range = index % cut.ranges;
    const int64_t o = range * cut.outputs, o_last = o + cut.outputs < O ? o + cut.outputs : O;
    const Chunk which_blocks = chunk_of(chunk, cut.chunks, cut.blocks);
    for (int64_t block = which_blocks.first; block < which_blocks.last; ++block) {
      const int64_t m = block / cut.blocks_of_member;
      const int64_t b = block % cut.blocks_of_member * GRAM_BLOCK;
      const int64_t b_last = b + GRAM_BLOCK < op.B ? b + GRAM_BLOCK : op.B;
      GramParts parts{};
      parts.dbias = partial.dbias.get() + block * O + o;
      if (job.products) {
        parts.dweight = partial.dweight.get() + chunk * O * width + o * panel;
        parts.stride = O * panel;
        parts.dr = partial.dr.get() + (block * cut.ranges + range) * width;
        parts.ds = partial.ds.get() + block * O + o;
      }
      LSF_VARIANT(which, gram_block)
      (job, m, b, b_last, o, o_last, block == which_blocks.first, parts, scratch.of(thread));
    }
  });
  add_up(op, cut, partial, out, threads);
}

}  // namespace

void batch_ensemble_linear(const BatchEnsembleLinear& op, float* y, int64_t y_stride_m,
                           int64_t y_stride_b, bool few, int threads) {
  const Isa which = isa();
  threads = useful(op, threads);
  RowsJob job{};
  job.M = op.M, job.B = op.B, job.K = op.I, job.N = op.O;
  job.in = op.x, job.factor = op.r, job.scale = op.s, job.shift = op.bias, job.relu = op.relu;
  job.out = y, job.out_stride_m = y_stride_m, job.out_stride_b = y_stride_b;
  const Matrix weight{op.weight, op.weight_stride_o, op.weight_stride_i};
  if (few) {
    flipped(job, weight, which, threads);
  } else {
    by_panels(job, packed(weight, op.O, op.I, which, threads).get(), which, threads);
  }
}

void batch_ensemble_linear_backward(const BatchEnsembleLinear& op, const MemberRows& dy,
                                    const MemberRows& y, const BatchEnsembleLinearGradients& out,
                                    int threads) {
  const Isa which = isa();
  threads = useful(op, threads);
  const bool products = out.dweight != nullptr || out.dr != nullptr || out.ds != nullptr;
  const Matrix weight{op.weight, op.weight_stride_i, op.weight_stride_o};
  std::unique_ptr<float[], Free> panels;
  if (out.dx != nullptr || products) panels = packed(weight, op.I, op.O, which, threads);
  const MemberRows mask = op.relu ? y : MemberRows{};
  if (out.dx != nullptr) {
    RowsJob job{};
    job.M = op.M, job.B = op.B, job.K = op.O, job.N = op.I;
    job.in = dy, job.mask = mask, job.factor = op.s, job.scale = op.r;
    job.out = out.dx, job.out_stride_m = out.dx_stride_m, job.out_stride_b = out.dx_stride_b;
    by_panels(job, panels.get(), which, threads);
  }
  if (products || out.dbias != nullptr) {
    GramJob job{};
    job.M = op.M, job.B = op.B, job.I = op.I, job.O = op.O;
    job.dy = dy, job.x = op.x, job.mask = mask, job.r = op.r, job.s = op.s;
    job.panels = panels.get(), job.products = products;
    by_gram(op, job, out, which, threads);
  }
}

}  // namespace landscape_fast
