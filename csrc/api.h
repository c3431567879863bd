// Every entry point of the compiled module. Torch-free: plain pointers, sizes, strides in elements.
//
// CPU functions take the number of threads (torch's) and give the same bits for any of them.
// CUDA functions only launch: no allocation, no synchronisation; they return a cudaError_t as int,
// and take a workspace of the size that *_cuda_workspace gives in bytes, 256-byte aligned, with any
// content. All expect arguments that landscape_fast/ops has checked.
#pragma once

#include <cstdint>

namespace landscape_fast {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Divergence : int { js = 0, kl = 1, disagreement = 2 };

// What M members say about N examples of C classes, C >= 1: element (m, n, c) is
// data[m * stride_m + n * stride_n + c * stride_c].
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t M, N, C;
  int64_t stride_m, stride_n, stride_c;
};

// Labels of M members: [M, N] integers of `itemsize` bytes (1, 2, 4 or 8), strides in elements.
struct Labels {
  const void* data;
  int itemsize;
  int64_t M, N;
  int64_t stride_m, stride_n;
};

// out [M, M]: mean over N of the divergence of members i and j, in nats (or a fraction). NaN where
// N = 0. JS and KL of a member with a NaN, a +inf or a row of -inf are NaN, also on the diagonal.
// sums [M, M], unless null: the sums of which these are the means (for disagreement, counts).
void pairwise_divergence(const Logits& logits, Divergence kind, float* out, double* sums,
                         int threads);

// out [M, M]: share of the N examples on which members i and j have different labels. sums [M, M],
// unless null: their number.
void pairwise_disagreement(const Labels& labels, float* out, double* sums, int threads);

// members [4, M]: accuracy, NLL, Brier score, ECE of each member; ensemble [6]: accuracy, NLL,
// Brier score, ECE of the averaged probabilities, entropy of the averaged probabilities, mutual
// information. Means over the examples whose target is not ignore_index. Returns the first n with
// a target that is neither in [0, C) nor ignore_index (outputs are then unspecified), else -1.
// sums, unless null: the sums of which these are the means. [M + 1, 3 + bins], a row for each
// member and one for the averaged probabilities: of right answers, NLL, Brier score, and for each
// calibration bin of (right - confidence); then 3 numbers: examples, entropy, mutual information.
int64_t ensemble_summary(const Logits& logits, const int64_t* targets, int64_t bins,
                         int64_t ignore_index, float* members, float* ensemble, double* sums,
                         int threads);

// Float32 rows of M members: feature f of row (m, b) is data[m * stride_m + b * stride_b + f *
// stride_f]. A stride of 0 repeats.
struct MemberRows {
  const float* data;
  int64_t stride_m, stride_b, stride_f;
};

// One float32 vector per member, of unit stride; null for none, stride_m 0 for one for all.
struct MemberFactor {
  const float* data;
  int64_t stride_m;
};

// y[m, b, o] = act(s[m, o] * sum_i weight[o, i] * r[m, i] * x[m, b, i] + bias[m, o]), act the
// identity or ReLU; weight[o, i] is at o * stride_o + i * stride_i. No size is 0.
struct BatchEnsembleLinear {
  int64_t M, B, I, O;
  MemberRows x;
  const float* weight;
  int64_t weight_stride_o, weight_stride_i;
  MemberFactor r, s, bias;
  bool relu;
};

// Where y (m, b) lies, O elements. With `few`, the weight (which then has unit stride along I) is
// read where it is, else packed first: quicker from a few hundred rows on.
void batch_ensemble_linear(const BatchEnsembleLinear& op, float* y, int64_t y_stride_m,
                           int64_t y_stride_b, bool few, int threads);

// What is wanted of the gradients, contiguous; null for what is not.
struct BatchEnsembleLinearGradients {
  float* dx;  // rows (m, b) of I elements at these strides; stride_m 0 adds the members up
  int64_t dx_stride_m, dx_stride_b;
  float *dweight, *dr, *ds;  // [O, I], [M, I], [M, O]
  float* dbias;              // [M, O], or [O]: the sum over the members
  bool dbias_shared;
};

// dy [M, B, O]; y, of unit stride along O, is read where op.relu, and null otherwise.
void batch_ensemble_linear_backward(const BatchEnsembleLinear& op, const MemberRows& dy,
                                    const MemberRows& y, const BatchEnsembleLinearGradients& out,
                                    int threads);

// A part of K models of float32 parameters: P elements of each, model k at data + k * stride_k.
struct GramPart {
  const float* data;
  int64_t stride_k, P;
};

// out [L, K, K]: the inner products of the models in each part, in float64. K >= 1; a part may have
// no elements.
void gram(const GramPart* parts, int64_t L, int64_t K, double* out, int threads);

// Rows of M members, P elements each of unit stride; null for none, stride_m 0 for one for all.
struct MemberElements {
  const void* data;
  Dtype dtype;
  int64_t stride_m;
};

// perturb: y[m, p] = (weights[m, p] + scale * sigma[m, p] * normal) * (dropped ? 0 : 1 / (1 - d)),
// the random numbers of noise.h, of member first_member + m and element p.
struct Perturbation {
  int64_t M, P, first_member;
  uint64_t seed;
  const int64_t* seeds;  // the seed is there, unless null
  const float* scales;   // [M], or null: all have `scale`, and 0 draws nothing
  const float* dropouts;
  MemberElements sigma;  // null: ones
  float scale, dropout;
};

constexpr int64_t PERTURB_TILE = 1024;  // elements
static constexpr int64_t perturb_tiles(int64_t P) { return (P + PERTURB_TILE - 1) / PERTURB_TILE; }

// y [M, P] contiguous; all float32 on the CPU, also sigma.
void perturb(const Perturbation& draw, const float* weights, int64_t weights_stride_m, float* y,
             int threads);

// What is wanted, contiguous; null for what is not. [M, P] each, or [P] where one for all members;
// parts [tiles, M], to be summed: of the gradient of the scales (float64 on the CPU, float32 on
// CUDA). On CUDA dweights has the dtype of dy, dsigma that of sigma.
struct PerturbGradients {
  void* dweights;
  bool dweights_shared;
  void* dsigma;
  bool dsigma_shared;
  void* parts;
};

void perturb_backward(const Perturbation& draw, const float* dy, int64_t dy_stride_m,
                      const PerturbGradients& out, int threads);

// The rules of torch.optim that anchor_step knows.
enum class AnchorRule : int { sgd = 0, momentum = 1, nesterov = 2, adam = 3, adamw = 4 };

// One step of T trained anchors, S = T + F with the fixed ones, from the gradients of M points that
// were mixed from them; see landscape_fast/ops/anchor_step.py. Rows are float32 of P elements with
// unit stride, P the sum of the L sizes.
struct AnchorStep {
  int64_t M, T, F, L, P;
  const int64_t* sizes;
  const float* grad;
  int64_t grad_stride_m;
  const float* coeffs;  // unit stride along the anchors
  int64_t coeffs_stride_m, coeffs_stride_l;
  float* anchors;
  int64_t anchors_stride_k;
  const float* fixed;
  int64_t fixed_stride_k;
  float *first, *second;  // [T, P] contiguous, null where the rule has none
  float* step;            // one is added
  const float* lr_tensor;  // in the place of lr, or null
  AnchorRule rule;
  double lr, numbers[3];  // momentum, dampening; or beta1, beta2, eps
  double weight_decay, curve_l2;
  const bool* selected;   // [L]; null for all
  const double* penalty;  // [S, S], or [L, S, S] with penalty_stride_l S * S; or null
  int64_t penalty_stride_l;
  const int64_t* pair;  // where not null, penalty is a Gram matrix and this names a pair of Cos2
  double beta;
};

// gram: [S, S], or [L, S, S] with `parts`, or null.
void anchor_step(const AnchorStep& op, double* gram, bool parts, int threads);

// The SIMD variant that CPU kernels run here: "avx512", "avx2" or "baseline".
const char* cpu_isa();

#ifdef LSF_WITH_CUDA

int64_t pairwise_divergence_cuda_workspace(int64_t M, int64_t N, int64_t C, Divergence kind);
int pairwise_divergence_cuda(const Logits& logits, Divergence kind, void* workspace, float* out,
                             double* sums, void* stream);

int64_t pairwise_disagreement_cuda_workspace(int64_t M, int64_t N);
int pairwise_disagreement_cuda(const Labels& labels, void* workspace, float* out, double* sums,
                               void* stream);

// As on the CPU, except for targets out of range: their number goes to *bad (device memory). If it
// is not 0, every output that depends on the targets is NaN: all but entropy and mutual
// information, which count such an example like any other.
int64_t ensemble_summary_cuda_workspace(int64_t M, int64_t N, int64_t C, int64_t bins);
int ensemble_summary_cuda(const Logits& logits, const int64_t* targets, int64_t bins,
                          int64_t ignore_index, void* workspace, float* members, float* ensemble,
                          int64_t* bad, double* sums, void* stream);

// combine: weights[m, p] = sum_k coeffs[m, part of p, k] * anchors[k, p], sums in float32.
//
// One part of the parameters: P >= 1 elements that share their coefficients, contiguous within an
// anchor and within a model. Offsets count elements from the base pointers of the call.
struct CombinePart {
  int64_t P;
  int64_t anchors, anchors_stride_k;
  int64_t weights, weights_stride_m;
  int64_t danchors, danchors_stride_k;  // danchors is -1 where no gradient is wanted
  int64_t part;                         // its place along L of the coefficients
};

// coeffs [M, L, K], K <= 12288, strides in elements; stride_l is 0 where all parts share them.
struct Coeffs {
  const void* data;
  Dtype dtype;
  int64_t M, K;
  int64_t stride_m, stride_l, stride_k;
};

// All parts in one launch for each 256 of them; `parts` is host memory, read during the call.
int combine_cuda(const CombinePart* parts, int64_t L, Dtype dtype, const Coeffs& coeffs,
                 const void* anchors, void* weights, void* stream);

// Reads the anchors once, and dweights once for each 8 of them (4 of a 16-bit type). Writes
// danchors (null: not wanted) and dcoeffs (null: not wanted): [M, L, K] contiguous in the dtype of
// coeffs, or [M, K], the sum over the parts, where coeffs.stride_l is 0. Parts that are not listed
// are left alone. `weights` of a part is where its dweights lie.
int64_t combine_backward_cuda_workspace(const CombinePart* parts, int64_t L, Dtype dtype, int64_t M,
                                        int64_t K);
int combine_backward_cuda(const CombinePart* parts, int64_t L, Dtype dtype, const Coeffs& coeffs,
                          const void* anchors, const void* dweights, void* workspace,
                          void* danchors, void* dcoeffs, int64_t dcoeffs_parts, void* stream);

// As on the CPU, of any dtype; y has that of the weights.
int perturb_cuda(const Perturbation& draw, const MemberElements& weights, void* y, void* stream);
int perturb_backward_cuda(const Perturbation& draw, const MemberElements& dy,
                          const PerturbGradients& out, void* stream);

// subspace_conv2d of 3 by 3 weights, stride 1, one zero on every side: I and O are 16 or 32 each.
// float32 is multiplied as tf32, unless `exact`. About so many `blocks` share the work, and each
// takes several tiles if there are more; 0 for the usual number.
struct SubspaceConv2d {
  int64_t M, B, H, W, I, O;
  Dtype dtype;
  bool exact;
  int64_t blocks;
};

// Pixel (m, b, h, w), 16-byte aligned, its channels of unit stride; strides in elements, stride_m 0
// where members share the images.
struct MemberImages {
  const void* data;
  int64_t stride_m, stride_b, stride_h, stride_w;
};

// y [M, B, H, W, O] contiguous; weight [M, O, 3, 3, I] of the dtype; bias [M, O] or null. `turned`
// is the gradient of x: of dy [M, B, H, W, O] in its place, into [M, B, H, W, I].
int subspace_conv2d_cuda(const SubspaceConv2d& op, const MemberImages& x, const void* weight,
                         const float* bias, bool turned, void* y, void* stream);

// parts [count, M, O, 3, 3, I], whose sum over the first is the gradient of the weights.
int64_t subspace_conv2d_weight_cuda_parts(const SubspaceConv2d& op);
int subspace_conv2d_weight_cuda(const SubspaceConv2d& op, const MemberImages& x,
                                const MemberImages& dy, float* parts, void* stream);

int cuda_runtime_version();  // 13000 is 13.0; of the runtime linked in
int cuda_driver_version();   // 0 without a driver
const char* cuda_error_string(int error);

#endif

}  // namespace landscape_fast
