"""csrc/math.h, the scalar formulas under the CPU and CUDA kernels, against NumPy in float64."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
from small_tree import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

SOURCE = """
#include "math.h"
using namespace landscape_fast;
#define UNARY(name) \\
  extern "C" void each_##name(const float* x, double* y, long n) { \\
    for (long k = 0; k < n; ++k) y[k] = name##_of(x[k]); \\
  }
UNARY(log2)
UNARY(ln)
UNARY(exp)
extern "C" void each_js(const float* p, const float* q, double* y, long n) {
  for (long k = 0; k < n; ++k) y[k] = js_term(p[k], q[k]);
}
extern "C" void each_kl(const float* p, const float* q, double* y, long n) {
  for (long k = 0; k < n; ++k) y[k] = kl_term(p[k], q[k]);
}
extern "C" void each_kl_log(const float* p, const float* d, double* y, long n) {
  for (long k = 0; k < n; ++k) y[k] = kl_term_log(p[k], p[k] * std::exp(d[k]), d[k]);
}
extern "C" void each_displaced(const float* x, const float* best, double* y, long n) {
  for (long k = 0; k < n; ++k) y[k] = displaces(x[k], best[k]);
}
extern "C" void each_bin(const float* x, const float* bins, double* y, long n) {
  for (long k = 0; k < n; ++k) y[k] = calibration_bin(x[k], int(bins[k]));
}
"""
EPS = np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """call(name, *float32 arrays) -> float64 array."""
    try:
        cxx = toolchain.find_cxx()
    except toolchain.BuildProblem as exc:
        pytest.skip(f"needs a C++ compiler: {exc}")
    folder = tmp_path_factory.mktemp("math")
    (folder / "math.cpp").write_text(SOURCE.replace('"math.h"', f'"{ROOT}/csrc/math.h"'))
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
    library = folder / "math.so"
    subprocess.run([*cxx, *flags, str(folder / "math.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def call(name, *arrays):
        arrays = [np.ascontiguousarray(a, dtype=np.float32) for a in np.broadcast_arrays(*arrays)]
        out = np.empty(arrays[0].shape)
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, out)]
        getattr(loaded, f"each_{name}")(*pointers, ctypes.c_long(out.size))
        return out

    return call


def positive(low, high, count=200_000):
    return np.exp(np.random.default_rng(0).uniform(np.log(low), np.log(high), count))


def test_logarithms(call):
    for x in (positive(1.2e-38, 3e38), positive(0.5, 2), 1 + positive(1e-7, 0.1), np.arange(1, 99)):
        x = x.astype(np.float32)
        truth = np.log2(x.astype(np.float64))
        error = np.abs(call("log2", x) - truth)
        assert np.max(error - 1.5 * EPS * np.abs(truth)) <= 0  # also near 1, where log2 is small
        error = np.abs(call("ln", x) - np.log(x.astype(np.float64)))
        assert np.max(error) < 5e-8  # of a fraction below ln(2) / 2: polynomial and rounding
    special = np.array([0, np.inf, np.nan, 1])
    assert np.array_equal(call("ln", special), [-np.inf, np.inf, np.nan, 0], equal_nan=True)
    assert np.isfinite(call("log2", special)).all() and call("log2", special)[3] == 0


def test_exponential(call):
    x = -np.concatenate([positive(1e-9, 1), np.linspace(0, 87, 100_001)]).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    assert np.max(np.abs(call("exp", x) / truth - 1)) < 0.75 * EPS
    small = np.linspace(-103.9, -87.5, 1000).astype(np.float32)  # subnormal: half a step of 2^-149
    assert np.max(np.abs(call("exp", small) - np.exp(small.astype(np.float64)))) <= 2.0**-149
    special = np.array([0, -104.1, -1e38, -np.inf, np.nan])
    assert np.array_equal(call("exp", special), [1, 0, 0, 0, np.nan], equal_nan=True)


def pairs():
    """Probabilities of every ratio: from 1 + 1e-7 to 1e6, and 0."""
    q = positive(1e-20, 1).astype(np.float32)
    ratio = np.random.default_rng(1).permutation(
        np.concatenate([1 + positive(1e-7, 1, 100_000), positive(1e-6, 1e6, 100_000)])
    )
    p = np.minimum(q * ratio, 1).astype(np.float32)
    p[:50], q[50:100] = 0, 0
    return p, q


def off(got, truth):
    """Relative errors where there is something to be relative to."""
    return np.abs(got[truth > 0] / truth[truth > 0] - 1)


def test_terms_of_js_are_accurate_one_by_one(call):
    p, q = pairs()
    got = call("js", p, q)
    P, Q = p.astype(np.longdouble), q.astype(np.longdouble)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = (P - Q) / (P + Q)
        truth = (np.where(P > 0, P * np.log1p(u), 0) + np.where(Q > 0, Q * np.log1p(-u), 0)) / 2
    near = np.abs(u) > 1e-3  # below, even the longdouble sum cancels: compare with the series
    truth = np.where(near, truth, (P + Q) * u * u * (1 + u * u / 6) / 4)
    # Logarithms up to 100 are rounded to float32 where p and q differ by more than a factor of 3.
    assert off(got, truth).max() < 1e-4
    similar = (np.abs(u) < 0.5) & (truth > 0)
    assert off(got, truth)[similar[truth > 0]].max() < 4 * EPS
    assert (got >= 0).all() and (got[p == q] == 0).all()
    assert np.array_equal(got, call("js", q, p))


def test_terms_of_kl_are_accurate_one_by_one(call):
    p, q = pairs()
    mixture = ((p + q) / 2).astype(np.float32)  # kl_term is for a q that holds p
    got = call("kl", p, mixture)
    P, Q = p.astype(np.longdouble), mixture.astype(np.longdouble)
    v = (P - Q) / Q
    with np.errstate(divide="ignore", invalid="ignore"):
        truth = Q * (np.where(P > 0, (1 + v) * np.log1p(v), 0) - v)
    truth = np.where(np.abs(v) > 1e-3, truth, Q * v * v * (0.5 - v / 6 + v * v / 12))
    # Where |v| passes 1/2 the terms cancel to a fifth of themselves.
    assert off(got, truth).max() < 16 * EPS
    assert (got >= 0).all()

    d = np.concatenate([positive(1e-6, 30, 50_000), -positive(1e-6, 30, 50_000)]).astype(np.float32)
    D = d.astype(np.longdouble)
    truth = np.where(np.abs(D) > 1e-3, np.expm1(D) - D, D * D * (0.5 + D / 6 + D * D / 24))
    assert np.max(np.abs(call("kl_log", 0.25, d) / (truth / 4) - 1)) < 10 * EPS
    assert call("kl_log", np.array([0.0]), np.array([0.0])) == 0


def test_argmax_rule(call):
    nan, inf = np.nan, np.inf
    x = np.array([1, 2, 2, nan, nan, 1, inf, -inf, 0.0])
    best = np.array([2, 2, 1, 1, nan, nan, inf, -inf, -0.0])
    assert call("displaced", x, best).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bins", [1, 2, 3, 10, 15, 100, 4096])
def test_bins_are_closed_above(call, bins):
    edges = np.arange(1, bins, dtype=np.float32) / np.float32(bins)
    x = np.concatenate(
        [
            edges,
            np.nextafter(edges, np.float32(0)),
            np.nextafter(edges, np.float32(2)),
            positive(1e-9, 1),
        ]
    ).astype(np.float32)
    assert np.array_equal(call("bin", x, bins), np.searchsorted(edges, x, side="left"))
    special = np.array([0, 1, 1.0001, np.nan])
    assert call("bin", special, bins).tolist() == [0, bins - 1, bins - 1, bins - 1]
