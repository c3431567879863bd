// The Python module landscape_fast._C: conversion of arguments and nothing else.
// Pointers arrive as integers (tensor.data_ptr()), enums as theirs (see api.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"

#ifndef LSF_BUILD_INFO  // the build says in JSON how it was made
#define LSF_BUILD_INFO "{}"
#endif

namespace py = pybind11;
using namespace landscape_fast;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Logits logits_at(uintptr_t data, int dtype, int64_t M, int64_t N, int64_t C, int64_t stride_m,
                 int64_t stride_n, int64_t stride_c) {
  return {pointer<const void>(data), Dtype(dtype), M, N, C, stride_m, stride_n, stride_c};
}

Labels labels_at(uintptr_t data, int itemsize, int64_t M, int64_t N, int64_t stride_m,
                 int64_t stride_n) {
  return {pointer<const void>(data), itemsize, M, N, stride_m, stride_n};
}

void cpu_entries(py::module_& m) {
  m.def("cpu_isa", &cpu_isa);
  m.def("pairwise_divergence",
        [](uintptr_t data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm, int64_t sn,
           int64_t sc, int kind, uintptr_t out, uintptr_t sums, int threads) {
          py::gil_scoped_release released;
          pairwise_divergence(logits_at(data, dtype, M, N, C, sm, sn, sc), Divergence(kind),
                              pointer<float>(out), pointer<double>(sums), threads);
        });
  m.def("pairwise_disagreement", [](uintptr_t data, int itemsize, int64_t M, int64_t N, int64_t sm,
                                    int64_t sn, uintptr_t out, uintptr_t sums, int threads) {
    py::gil_scoped_release released;
    pairwise_disagreement(labels_at(data, itemsize, M, N, sm, sn), pointer<float>(out),
                          pointer<double>(sums), threads);
  });
  m.def("ensemble_summary",
        [](uintptr_t data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm, int64_t sn,
           int64_t sc, uintptr_t targets, int64_t bins, int64_t ignore_index, uintptr_t members,
           uintptr_t ensemble, uintptr_t sums, int threads) {
          py::gil_scoped_release released;
          return ensemble_summary(logits_at(data, dtype, M, N, C, sm, sn, sc),
                                  pointer<const int64_t>(targets), bins, ignore_index,
                                  pointer<float>(members), pointer<float>(ensemble),
                                  pointer<double>(sums), threads);
        });
}

using Integers2 = std::array<int64_t, 2>;
using Integers4 = std::array<int64_t, 4>;

MemberRows rows_at(const Integers4& t) {  // address, strides
  return {pointer<const float>(uintptr_t(t[0])), t[1], t[2], t[3]};
}

MemberFactor factor_at(const Integers2& t) {
  return {pointer<const float>(uintptr_t(t[0])), t[1]};
}

BatchEnsembleLinear linear_at(const Integers4& sizes, const Integers4& x,
                              const std::array<int64_t, 3>& weight, const Integers2& r,
                              const Integers2& s, const Integers2& bias, bool relu) {
  return {sizes[0],     sizes[1],  sizes[2],     sizes[3],        rows_at(x),
          pointer<const float>(uintptr_t(weight[0])), weight[1], weight[2],
          factor_at(r), factor_at(s), factor_at(bias), relu};
}

void cpu_linear_entries(py::module_& m) {
  m.def("batch_ensemble_linear",
        [](const Integers4& sizes, const Integers4& x, const std::array<int64_t, 3>& weight,
           const Integers2& r, const Integers2& s, const Integers2& bias, bool relu,
           const Integers4& y, bool few, int threads) {
          py::gil_scoped_release released;
          batch_ensemble_linear(linear_at(sizes, x, weight, r, s, bias, relu),
                                pointer<float>(uintptr_t(y[0])), y[1], y[2], few, threads);
        });
  m.def("batch_ensemble_linear_backward",
        [](const Integers4& sizes, const Integers4& x, const std::array<int64_t, 3>& weight,
           const Integers2& r, const Integers2& s, bool relu, const Integers4& dy,
           const Integers4& y, const std::array<int64_t, 3>& dx, uintptr_t dweight, uintptr_t dr,
           uintptr_t ds, uintptr_t dbias, bool dbias_shared, int threads) {
          py::gil_scoped_release released;
          const BatchEnsembleLinearGradients out{
              pointer<float>(uintptr_t(dx[0])), dx[1], dx[2], pointer<float>(dweight),
              pointer<float>(dr), pointer<float>(ds), pointer<float>(dbias), dbias_shared};
          batch_ensemble_linear_backward(linear_at(sizes, x, weight, r, s, {0, 0}, relu),
                                         rows_at(dy), rows_at(y), out, threads);
        });
}

// M, P, first_member, seed; addresses of seeds, scales, dropouts, sigma; sigma's dtype, stride_m.
using PerturbIntegers = std::array<int64_t, 10>;

Perturbation perturbation_at(const PerturbIntegers& t, float scale, float dropout) {
  return {t[0],
          t[1],
          t[2],
          uint64_t(t[3]),
          pointer<const int64_t>(uintptr_t(t[4])),
          pointer<const float>(uintptr_t(t[5])),
          pointer<const float>(uintptr_t(t[6])),
          {pointer<const void>(uintptr_t(t[7])), Dtype(t[8]), t[9]},
          scale,
          dropout};
}

PerturbGradients perturb_gradients_at(const Integers2& dweights, const Integers2& dsigma,
                                      uintptr_t parts) {  // address, whether one for all members
  return {pointer<void>(uintptr_t(dweights[0])), dweights[1] != 0,
          pointer<void>(uintptr_t(dsigma[0])), dsigma[1] != 0, pointer<void>(parts)};
}

void cpu_perturb_entries(py::module_& m) {
  m.def("perturb_tiles", &perturb_tiles);
  m.def("perturb", [](const PerturbIntegers& draw, float scale, float dropout, uintptr_t weights,
                      int64_t stride_m, uintptr_t y, int threads) {
    py::gil_scoped_release released;
    perturb(perturbation_at(draw, scale, dropout), pointer<const float>(weights), stride_m,
            pointer<float>(y), threads);
  });
  m.def("perturb_backward",
        [](const PerturbIntegers& draw, float scale, float dropout, uintptr_t dy, int64_t stride_m,
           const Integers2& dweights, const Integers2& dsigma, uintptr_t parts, int threads) {
          py::gil_scoped_release released;
          perturb_backward(perturbation_at(draw, scale, dropout), pointer<const float>(dy),
                           stride_m, perturb_gradients_at(dweights, dsigma, parts), threads);
        });
}

// One tuple (address, stride_k, P) for each part; see GramPart.
void cpu_gram_entries(py::module_& m) {
  m.def("gram", [](const std::vector<std::array<int64_t, 3>>& rows, int64_t K, uintptr_t out,
                   int threads) {
    py::gil_scoped_release released;
    std::vector<GramPart> parts;
    for (const auto& row : rows) {
      parts.push_back({pointer<const float>(uintptr_t(row[0])), row[1], row[2]});
    }
    gram(parts.data(), int64_t(parts.size()), K, pointer<double>(out), threads);
  });
}

// Addresses of grad, coeffs, anchors, fixed, first, second, step, lr, selected, penalty, pair and
// gram, 0 for none; strides of grad, anchors, fixed; M, T, F; the rest as in AnchorStep. coeffs and
// penalty are contiguous, [M, L, S] and [L, S, S] with the first two flags; the third asks for gram
// by part.
void cpu_anchor_entries(py::module_& m) {
  using Integers3 = std::array<int64_t, 3>;
  m.def("anchor_step", [](const std::array<uintptr_t, 12>& at, const Integers3& strides,
                          const Integers3& counts, const std::vector<int64_t>& sizes, int rule,
                          const std::array<double, 7>& hyper, const std::array<bool, 3>& flags,
                          int threads) {
    py::gil_scoped_release released;
    const int64_t L = int64_t(sizes.size()), S = counts[1] + counts[2];
    int64_t P = 0;
    for (int64_t size : sizes) P += size;
    const AnchorStep op{counts[0], counts[1], counts[2], L, P, sizes.data(),
                        pointer<const float>(at[0]), strides[0],
                        pointer<const float>(at[1]), flags[0] ? L * S : S, flags[0] ? S : 0,
                        pointer<float>(at[2]), strides[1],
                        pointer<const float>(at[3]), strides[2],
                        pointer<float>(at[4]), pointer<float>(at[5]), pointer<float>(at[6]),
                        pointer<const float>(at[7]), AnchorRule(rule), hyper[0],
                        {hyper[1], hyper[2], hyper[3]}, hyper[4], hyper[5],
                        pointer<const bool>(at[8]),
                        pointer<const double>(at[9]), flags[1] ? S * S : 0,
                        pointer<const int64_t>(at[10]), hyper[6]};
    anchor_step(op, pointer<double>(at[11]), flags[2], threads);
  });
}

#ifdef LSF_WITH_CUDA
void raise_on(int error, const char* what) {
  if (error != 0) {
    throw std::runtime_error(std::string("landscape_fast: ") + what + ": CUDA error " +
                             std::to_string(error) + ", " + cuda_error_string(error));
  }
}

void cuda_entries(py::module_& m) {
  m.def("cuda_runtime_version", &cuda_runtime_version);
  m.def("cuda_driver_version", &cuda_driver_version);
  m.def("pairwise_divergence_cuda_workspace", [](int64_t M, int64_t N, int64_t C, int kind) {
    return pairwise_divergence_cuda_workspace(M, N, C, Divergence(kind));
  });
  m.def("pairwise_divergence_cuda",
        [](uintptr_t data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm, int64_t sn,
           int64_t sc, int kind, uintptr_t workspace, uintptr_t out, uintptr_t sums,
           uintptr_t stream) {
          raise_on(pairwise_divergence_cuda(logits_at(data, dtype, M, N, C, sm, sn, sc),
                                            Divergence(kind), pointer<void>(workspace),
                                            pointer<float>(out), pointer<double>(sums),
                                            pointer<void>(stream)),
                   "pairwise_divergence");
        });
  m.def("pairwise_disagreement_cuda_workspace", &pairwise_disagreement_cuda_workspace);
  m.def("pairwise_disagreement_cuda", [](uintptr_t data, int itemsize, int64_t M, int64_t N,
                                         int64_t sm, int64_t sn, uintptr_t workspace, uintptr_t out,
                                         uintptr_t sums, uintptr_t stream) {
    raise_on(pairwise_disagreement_cuda(labels_at(data, itemsize, M, N, sm, sn),
                                        pointer<void>(workspace), pointer<float>(out),
                                        pointer<double>(sums), pointer<void>(stream)),
             "pairwise_disagreement");
  });
  m.def("ensemble_summary_cuda_workspace", &ensemble_summary_cuda_workspace);
  m.def("ensemble_summary_cuda",
        [](uintptr_t data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm, int64_t sn,
           int64_t sc, uintptr_t targets, int64_t bins, int64_t ignore_index, uintptr_t workspace,
           uintptr_t members, uintptr_t ensemble, uintptr_t bad, uintptr_t sums,
           uintptr_t stream) {
          raise_on(ensemble_summary_cuda(logits_at(data, dtype, M, N, C, sm, sn, sc),
                                         pointer<const int64_t>(targets), bins, ignore_index,
                                         pointer<void>(workspace), pointer<float>(members),
                                         pointer<float>(ensemble), pointer<int64_t>(bad),
                                         pointer<double>(sums), pointer<void>(stream)),
                   "ensemble_summary");
        });
}

// One tuple (P, anchors, anchors_stride_k, weights, weights_stride_m, danchors, danchors_stride_k,
// part) for each part; see CombinePart.
using Rows = std::vector<std::array<int64_t, 8>>;

const CombinePart* parts_of(const Rows& rows) {
  static_assert(sizeof(CombinePart) == sizeof(Rows::value_type), "a row is a CombinePart");
  return reinterpret_cast<const CombinePart*>(rows.data());
}

void cuda_combine_entries(py::module_& m) {
  m.def("combine_cuda",
        [](const Rows& rows, int dtype, uintptr_t coeffs, int coeffs_dtype, int64_t M, int64_t K,
           int64_t cm, int64_t cl, int64_t ck, uintptr_t anchors, uintptr_t weights,
           uintptr_t stream) {
          const Coeffs c{pointer<const void>(coeffs), Dtype(coeffs_dtype), M, K, cm, cl, ck};
          raise_on(combine_cuda(parts_of(rows), int64_t(rows.size()), Dtype(dtype), c,
                                pointer<const void>(anchors), pointer<void>(weights),
                                pointer<void>(stream)),
                   "combine");
        });
  m.def("combine_backward_cuda_workspace", [](const Rows& rows, int dtype, int64_t M, int64_t K) {
    return combine_backward_cuda_workspace(parts_of(rows), int64_t(rows.size()), Dtype(dtype), M,
                                           K);
  });
  m.def("combine_backward_cuda",
        [](const Rows& rows, int dtype, uintptr_t coeffs, int coeffs_dtype, int64_t M, int64_t K,
           int64_t cm, int64_t cl, int64_t ck, uintptr_t anchors, uintptr_t dweights,
           uintptr_t workspace, uintptr_t danchors, uintptr_t dcoeffs, int64_t dcoeffs_parts,
           uintptr_t stream) {
          const Coeffs c{pointer<const void>(coeffs), Dtype(coeffs_dtype), M, K, cm, cl, ck};
          raise_on(combine_backward_cuda(parts_of(rows), int64_t(rows.size()), Dtype(dtype), c,
                                         pointer<const void>(anchors),
                                         pointer<const void>(dweights), pointer<void>(workspace),
                                         pointer<void>(danchors), pointer<void>(dcoeffs),
                                         dcoeffs_parts, pointer<void>(stream)),
                   "combine_backward");
        });
}

void cuda_perturb_entries(py::module_& m) {
  m.def("perturb_cuda",
        [](const PerturbIntegers& draw, float scale, float dropout, uintptr_t weights, int dtype,
           int64_t stride_m, uintptr_t y, uintptr_t stream) {
          const MemberElements w{pointer<const void>(weights), Dtype(dtype), stride_m};
          raise_on(perturb_cuda(perturbation_at(draw, scale, dropout), w, pointer<void>(y),
                                pointer<void>(stream)),
                   "perturb");
        });
  m.def("perturb_backward_cuda",
        [](const PerturbIntegers& draw, float scale, float dropout, uintptr_t dy, int dtype,
           int64_t stride_m, const Integers2& dweights, const Integers2& dsigma, uintptr_t parts,
           uintptr_t stream) {
          const MemberElements d{pointer<const void>(dy), Dtype(dtype), stride_m};
          raise_on(perturb_backward_cuda(perturbation_at(draw, scale, dropout), d,
                                         perturb_gradients_at(dweights, dsigma, parts),
                                         pointer<void>(stream)),
                   "perturb_backward");
        });
}

// M, B, H, W, I, O, dtype, exact, blocks
using ConvIntegers = std::array<int64_t, 9>;

SubspaceConv2d conv_at(const ConvIntegers& t) {
  return {t[0], t[1], t[2], t[3], t[4], t[5], Dtype(t[6]), t[7] != 0, t[8]};
}

MemberImages images_at(const std::array<int64_t, 5>& t) {  // address, strides
  return {pointer<const void>(uintptr_t(t[0])), t[1], t[2], t[3], t[4]};
}

void cuda_conv_entries(py::module_& m) {
  m.def("subspace_conv2d_cuda",
        [](const ConvIntegers& op, const std::array<int64_t, 5>& x, uintptr_t weight,
           uintptr_t bias, bool turned, uintptr_t y, uintptr_t stream) {
          raise_on(subspace_conv2d_cuda(conv_at(op), images_at(x), pointer<const void>(weight),
                                        pointer<const float>(bias), turned, pointer<void>(y),
                                        pointer<void>(stream)),
                   "subspace_conv2d");
        });
  m.def("subspace_conv2d_weight_cuda_parts",
        [](const ConvIntegers& op) { return subspace_conv2d_weight_cuda_parts(conv_at(op)); });
  m.def("subspace_conv2d_weight_cuda",
        [](const ConvIntegers& op, const std::array<int64_t, 5>& x,
           const std::array<int64_t, 5>& dy, uintptr_t parts, uintptr_t stream) {
          raise_on(subspace_conv2d_weight_cuda(conv_at(op), images_at(x), images_at(dy),
                                               pointer<float>(parts), pointer<void>(stream)),
                   "subspace_conv2d_weight");
        });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU and CUDA kernels of landscape_fast; reach it through landscape_fast._extension.";
  m.attr("build_info") = LSF_BUILD_INFO;
  cpu_entries(m);
  cpu_linear_entries(m);
  cpu_anchor_entries(m);
  cpu_gram_entries(m);
  cpu_perturb_entries(m);
#ifdef LSF_WITH_CUDA
  m.attr("with_cuda") = true;
  cuda_entries(m);
  cuda_combine_entries(m);
  cuda_perturb_entries(m);
  cuda_conv_entries(m);
#else
  m.attr("with_cuda") = false;
#endif
}
