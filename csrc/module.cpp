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
           int64_t sc, int kind, uintptr_t out, int threads) {
          py::gil_scoped_release released;
          pairwise_divergence(logits_at(data, dtype, M, N, C, sm, sn, sc), Divergence(kind),
                              pointer<float>(out), threads);
        });
  m.def("pairwise_disagreement", [](uintptr_t data, int itemsize, int64_t M, int64_t N, int64_t sm,
                                    int64_t sn, uintptr_t out, int threads) {
    py::gil_scoped_release released;
    pairwise_disagreement(labels_at(data, itemsize, M, N, sm, sn), pointer<float>(out), threads);
  });
  m.def("ensemble_summary",
        [](uintptr_t data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm, int64_t sn,
           int64_t sc, uintptr_t targets, int64_t bins, int64_t ignore_index, uintptr_t members,
           uintptr_t ensemble, int threads) {
          py::gil_scoped_release released;
          return ensemble_summary(logits_at(data, dtype, M, N, C, sm, sn, sc),
                                  pointer<const int64_t>(targets), bins, ignore_index,
                                  pointer<float>(members), pointer<float>(ensemble), threads);
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
           int64_t sc, int kind, uintptr_t workspace, uintptr_t out, uintptr_t stream) {
          raise_on(pairwise_divergence_cuda(logits_at(data, dtype, M, N, C, sm, sn, sc),
                                            Divergence(kind), pointer<void>(workspace),
                                            pointer<float>(out), pointer<void>(stream)),
                   "pairwise_divergence");
        });
  m.def("pairwise_disagreement_cuda_workspace", &pairwise_disagreement_cuda_workspace);
  m.def("pairwise_disagreement_cuda", [](uintptr_t data, int itemsize, int64_t M, int64_t N,
                                         int64_t sm, int64_t sn, uintptr_t workspace, uintptr_t out,
                                         uintptr_t stream) {
    raise_on(pairwise_disagreement_cuda(labels_at(data, itemsize, M, N, sm, sn),
                                        pointer<void>(workspace), pointer<float>(out),
                                        pointer<void>(stream)),
             "pairwise_disagreement");
  });
  m.def("ensemble_summary_cuda_workspace", &ensemble_summary_cuda_workspace);
  m.def("ensemble_summary_cuda",
        [](uintptr_t data, int dtype, int64_t M, int64_t N, int64_t C, int64_t sm, int64_t sn,
           int64_t sc, uintptr_t targets, int64_t bins, int64_t ignore_index, uintptr_t workspace,
           uintptr_t members, uintptr_t ensemble, uintptr_t bad, uintptr_t stream) {
          raise_on(ensemble_summary_cuda(logits_at(data, dtype, M, N, C, sm, sn, sc),
                                         pointer<const int64_t>(targets), bins, ignore_index,
                                         pointer<void>(workspace), pointer<float>(members),
                                         pointer<float>(ensemble), pointer<int64_t>(bad),
                                         pointer<void>(stream)),
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
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU and CUDA kernels of landscape_fast; reach it through landscape_fast._extension.";
  m.attr("build_info") = LSF_BUILD_INFO;
  cpu_entries(m);
  cpu_linear_entries(m);
#ifdef LSF_WITH_CUDA
  m.attr("with_cuda") = true;
  cuda_entries(m);
  cuda_combine_entries(m);
#else
  m.attr("with_cuda") = false;
#endif
}
