// C entry points of the kernels for ctypes; structs go by their fields, as in csrc/module.cpp.
#include "api.h"

using namespace landscape_fast;

extern "C" {

int64_t shim_divergence_workspace(int64_t M, int64_t N, int64_t C, int kind) {
  return pairwise_divergence_cuda_workspace(M, N, C, Divergence(kind));
}

int shim_divergence(const void* data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm,
                    int64_t sn, int64_t sc, int kind, void* workspace, float* out, double* sums) {
  return pairwise_divergence_cuda({data, Dtype(dtype), M, N, C, sm, sn, sc}, Divergence(kind),
                                  workspace, out, sums, nullptr);
}

int64_t shim_disagreement_workspace(int64_t M, int64_t N) {
  return pairwise_disagreement_cuda_workspace(M, N);
}

int shim_disagreement(const void* data, int itemsize, int64_t M, int64_t N, int64_t sm, int64_t sn,
                      void* workspace, float* out, double* sums) {
  return pairwise_disagreement_cuda({data, itemsize, M, N, sm, sn}, workspace, out, sums, nullptr);
}

int64_t shim_summary_workspace(int64_t M, int64_t N, int64_t C, int64_t bins) {
  return ensemble_summary_cuda_workspace(M, N, C, bins);
}

int shim_summary(const void* data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm,
                 int64_t sn, int64_t sc, const int64_t* targets, int64_t bins,
                 int64_t ignore_index, void* workspace, float* members, float* ensemble,
                 int64_t* bad, double* sums) {
  return ensemble_summary_cuda({data, Dtype(dtype), M, N, C, sm, sn, sc}, targets, bins,
                               ignore_index, workspace, members, ensemble, bad, sums,
                               nullptr);
}

int shim_combine(const int64_t* rows, int64_t L, int dtype, const void* coeffs, int coeffs_dtype,
                 int64_t M, int64_t K, int64_t cm, int64_t cl, int64_t ck, const void* anchors,
                 void* weights) {
  return combine_cuda(reinterpret_cast<const CombinePart*>(rows), L, Dtype(dtype),
                      {coeffs, Dtype(coeffs_dtype), M, K, cm, cl, ck}, anchors, weights, nullptr);
}

int64_t shim_combine_backward_workspace(const int64_t* rows, int64_t L, int dtype, int64_t M,
                                        int64_t K) {
  return combine_backward_cuda_workspace(reinterpret_cast<const CombinePart*>(rows), L,
                                         Dtype(dtype), M, K);
}

int shim_combine_backward(const int64_t* rows, int64_t L, int dtype, const void* coeffs,
                          int coeffs_dtype, int64_t M, int64_t K, int64_t cm, int64_t cl,
                          int64_t ck, const void* anchors, const void* dweights, void* workspace,
                          void* danchors, void* dcoeffs, int64_t dcoeffs_parts) {
  return combine_backward_cuda(reinterpret_cast<const CombinePart*>(rows), L, Dtype(dtype),
                               {coeffs, Dtype(coeffs_dtype), M, K, cm, cl, ck}, anchors, dweights,
                               workspace, danchors, dcoeffs, dcoeffs_parts, nullptr);
}

int64_t shim_perturb_tiles(int64_t P) { return perturb_tiles(P); }

static Perturbation perturbation_at(const int64_t* t, float scale, float dropout) {
  return {t[0],
          t[1],
          t[2],
          uint64_t(t[3]),
          reinterpret_cast<const int64_t*>(t[4]),
          reinterpret_cast<const float*>(t[5]),
          reinterpret_cast<const float*>(t[6]),
          {reinterpret_cast<const void*>(t[7]), Dtype(t[8]), t[9]},
          scale,
          dropout};
}

int shim_perturb(const int64_t* draw, float scale, float dropout, const void* weights, int dtype,
                 int64_t stride_m, void* y) {
  return perturb_cuda(perturbation_at(draw, scale, dropout), {weights, Dtype(dtype), stride_m}, y,
                      nullptr);
}

int shim_perturb_backward(const int64_t* draw, float scale, float dropout, const void* dy,
                          int dtype, int64_t stride_m, void* dweights, int weights_shared,
                          void* dsigma, int sigma_shared, void* parts) {
  return perturb_backward_cuda(perturbation_at(draw, scale, dropout), {dy, Dtype(dtype), stride_m},
                               {dweights, weights_shared != 0, dsigma, sigma_shared != 0, parts},
                               nullptr);
}

static SubspaceConv2d conv_at(const int64_t* t) {
  return {t[0], t[1], t[2], t[3], t[4], t[5], Dtype(t[6]), t[7] != 0, t[8]};
}

static MemberImages images_at(const int64_t* t) {
  return {reinterpret_cast<const void*>(t[0]), t[1], t[2], t[3], t[4]};
}

int shim_subspace_conv2d(const int64_t* op, const int64_t* x, const void* weight,
                         const float* bias, int turned, void* y) {
  return subspace_conv2d_cuda(conv_at(op), images_at(x), weight, bias, turned != 0, y, nullptr);
}

int64_t shim_subspace_conv2d_weight_parts(const int64_t* op) {
  return subspace_conv2d_weight_cuda_parts(conv_at(op));
}

int shim_subspace_conv2d_weight(const int64_t* op, const int64_t* x, const int64_t* dy,
                                float* parts) {
  return subspace_conv2d_weight_cuda(conv_at(op), images_at(x), images_at(dy), parts, nullptr);
}

}  // extern "C"
