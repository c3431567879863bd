// G = dy^T x of a block of examples of one member, and what is summed from its tiles while they are
// in the cache; compiled once per instruction set.
#include "batch_ensemble_linear.h"
#include "tiles.h"

namespace landscape_fast {
namespace {

// Panels of x packed at a time: its rows are then read in long pieces, and half of a cache of 1 MB
// is left for the rest.
constexpr int64_t GROUP = 512 / PANEL;

struct Scratch {
  float* columns;  // dy by strips: [strips, examples, STRIP]
  float* panels;   // of x: [GROUP, examples, PANEL]
  float* lanes;    // sums for ds: [outputs, LANES]
  float* row;      // of dy: [outputs]
  float* few;      // the sum of a few such rows: [outputs]
};

constexpr int64_t FEW = 16;  // rows of dy added up before they go to dbias: a smaller error

int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

Scratch carve(float* scratch, int64_t outputs) {
  float* panels = scratch + whole(outputs, STRIP) * GRAM_BLOCK;
  float* lanes = panels + GROUP * GRAM_BLOCK * PANEL;
  float* row = lanes + outputs * LANES;
  return {scratch, panels, lanes, row, row + outputs};
}

// Rows of dy [o, o + outputs), shut where the ReLU was, into strips; their sums into dbias.
void pack_columns(const GramJob& job, int64_t m, int64_t b, int64_t examples, int64_t o,
                  int64_t outputs, const Scratch& at, float* dbias) {
  const int64_t step = job.dy.stride_f;
  for (int64_t j = 0; j < outputs; ++j) dbias[j] = at.few[j] = 0;
  for (int64_t e = 0; e < examples; ++e) {
    const float* dy = job.dy.data + m * job.dy.stride_m + (b + e) * job.dy.stride_b + o * step;
    if (step == 1) {
      memcpy(at.row, dy, size_t(outputs) * sizeof(float));
    } else {
      for (int64_t j = 0; j < outputs; ++j) at.row[j] = dy[j * step];
    }
    if (job.mask.data != nullptr) {
      const float* y = job.mask.data + m * job.mask.stride_m + (b + e) * job.mask.stride_b + o;
      for (int64_t j = 0; j < outputs; ++j) at.row[j] = y[j] <= 0.0f ? 0.0f : at.row[j];
    }
    for (int64_t j = 0; j < outputs; ++j) at.few[j] += at.row[j];
    if ((e + 1) % FEW == 0 || e + 1 == examples) {
      for (int64_t j = 0; j < outputs; ++j) dbias[j] += at.few[j], at.few[j] = 0;
    }
    if (!job.products) continue;
    int64_t j = 0;
    float* to = at.columns + e * STRIP;
    for (; j + STRIP <= outputs; j += STRIP, to += examples * STRIP) {
      memcpy(to, at.row + j, STRIP * sizeof(float));
    }
    for (int64_t rest = j; rest < outputs; ++rest) to[rest - j] = at.row[rest];
  }
}

// Features [i, ..) of x, `count` panels of them.
void pack_panels(const GramJob& job, int64_t m, int64_t b, int64_t examples, int64_t i,
                 int64_t count, float* out) {
  const int64_t step = job.x.stride_f;
  for (int64_t e = 0; e < examples; ++e) {
    const float* x = job.x.data + m * job.x.stride_m + (b + e) * job.x.stride_b + i * step;
    float* to = out + e * PANEL;
    for (int64_t p = 0; p < count; ++p, x += PANEL * step, to += examples * PANEL) {
      const int64_t rest = job.I - i - p * PANEL;
      pack_row(x, step, rest < PANEL ? rest : PANEL, to);
    }
  }
}

// One row of a tile of G: dweight += s G r, ds += weight G r, dr += weight s G.
inline __attribute__((always_inline)) void use_row(const float* g, const float* weight, float s,
                                                   const Vec* r, bool first, float* dweight,
                                                   float* lanes, Vec* dr) {
  Vec ds = load(lanes);
  for (int j = 0; j < 2; ++j) {
    const Vec w = load(weight + j * LANES), product = load(g + j * LANES);
    const Vec scaled = product * r[j];
    float* to = dweight + j * LANES;
    store(to, first ? scaled * s : load(to) + scaled * s);
    ds += w * scaled;
    dr[j] += (w * s) * product;
  }
  store(lanes, ds);
}

// One panel of x against all strips of dy. `weight` and `dweight` are panels, too.
void use_panel(const float* columns, const float* panel, int64_t examples, int64_t outputs,
               const float* weight, const float* s, const float* r_panel, bool first,
               float* dweight, float* lanes, float* dr_panel) {
  alignas(64) float tile[STRIP * PANEL];
  const Vec r[2] = {load(r_panel), load(r_panel + LANES)};
  Vec dr[2] = {Vec{}, Vec{}};
  for (int64_t j = 0; j < outputs; j += STRIP) {
    const int64_t strip = outputs - j < STRIP ? outputs - j : STRIP;
    for (int64_t k = 0; k < strip * PANEL; k += 16) {  // here by the time the tile is done
      __builtin_prefetch(weight + j * PANEL + k);
      __builtin_prefetch(dweight + j * PANEL + k, 1);
    }
    tile_of<true>(strip, columns + j * examples, panel, examples, false, panel, tile);
    for (int64_t row = j; row < j + strip; ++row) {
      use_row(tile + (row - j) * PANEL, weight + row * PANEL, s == nullptr ? 1.0f : s[row], r,
              first, dweight + row * PANEL, lanes + row * LANES, dr);
    }
  }
  store(dr_panel, dr[0]);
  store(dr_panel + LANES, dr[1]);
}

}  // namespace

namespace LSF_ISA {

int64_t gram_scratch(int64_t outputs) {
  return whole(outputs, STRIP) * GRAM_BLOCK + GROUP * GRAM_BLOCK * PANEL + outputs * (LANES + 2);
}

void gram_block(const GramJob& job, int64_t m, int64_t b, int64_t b_last, int64_t o, int64_t o_last,
                bool first, const GramParts& parts, float* scratch) {
  const int64_t examples = b_last - b, outputs = o_last - o;
  const Scratch at = carve(scratch, outputs);
  pack_columns(job, m, b, examples, o, outputs, at, parts.dbias);
  if (!job.products) return;
  for (int64_t k = 0; k < outputs * LANES; ++k) at.lanes[k] = 0;
  const float* s = job.s.data == nullptr ? nullptr : job.s.data + m * job.s.stride_m + o;
  const int64_t panels = whole(job.I, PANEL) / PANEL;
  for (int64_t p = 0; p < panels; ++p) {
    if (p % GROUP == 0) {
      const int64_t count = panels - p < GROUP ? panels - p : GROUP;
      pack_panels(job, m, b, examples, p * PANEL, count, at.panels);
    }
    const int64_t i = p * PANEL, valid = job.I - i < PANEL ? job.I - i : PANEL;
    alignas(64) float r[PANEL];
    for (int64_t j = 0; j < PANEL; ++j) r[j] = 1;
    if (job.r.data != nullptr) pack_row(job.r.data + m * job.r.stride_m + i, 1, valid, r);
    use_panel(at.columns, at.panels + p % GROUP * examples * PANEL, examples, outputs,
              job.panels + (p * job.O + o) * PANEL, s, r, first, parts.dweight + p * parts.stride,
              at.lanes, parts.dr + i);
  }
  for (int64_t j = 0; j < outputs; ++j) parts.ds[j] = sum_of_lanes(at.lanes + j * LANES);
}

}  // namespace LSF_ISA
}  // namespace landscape_fast
