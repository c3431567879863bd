"""The random numbers of perturb: the generator's published vectors, the same integers everywhere,
Gaussian numbers as accurate as float32 is, and statistics of what comes out."""

import ctypes
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from landscape_fast.ops import _noise
from landscape_fast.ops.perturb import perturb_reference

triton = pytest.importorskip("triton")
from small_tree import ROOT  # noqa: E402

from landscape_fast.kernels import perturb as kernels  # noqa: E402

tl = triton.language
sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

# philox4x32, 10 rounds: counter, key, output; kat_vectors of Random123 1.09
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
SOURCE = """
#include "csrc/noise.h"
using namespace landscape_fast;
extern "C" void each_block(const uint32_t* c, const uint32_t* k, uint32_t* out) {
  const Words w = philox({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
  for (int i = 0; i < 4; ++i) out[i] = w.at[i];
}
extern "C" void each_word(uint64_t seed, uint32_t member, uint32_t stream, uint64_t first,
                          uint32_t* out, long quads) {
  for (long k = 0; k < quads; ++k) {
    const Words w = words_of(seed, first + k, member, stream);
    for (int i = 0; i < 4; ++i) out[4 * k + i] = w.at[i];
  }
}
extern "C" void each_radius(const uint32_t* x, float* y, long n) {
  for (long k = 0; k < n; ++k) y[k] = radius_of(x[k]);
}
extern "C" void each_turn(const uint32_t* x, float* c, float* s, long n) {
  for (long k = 0; k < n; ++k) turn_of(x[k], c[k], s[k]);
}
"""
EPS = np.finfo(np.float32).eps
EDGES = [0, 1, 2, 2**24, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**29, 3037000499,
         3037000500, 2**32 - 2**24, 2**32 - 129, 2**32 - 2, 2**32 - 1]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """csrc/noise.h as the C++ and the CUDA kernels see it."""
    try:
        cxx = toolchain.find_cxx()
    except toolchain.BuildProblem as exc:
        pytest.skip(f"needs a C++ compiler: {exc}")
    folder = tmp_path_factory.mktemp("noise")
    (folder / "noise.cpp").write_text(SOURCE.replace("csrc/", f"{ROOT}/csrc/"))
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
    command = [*cxx, *flags, str(folder / "noise.cpp"), "-o", str(folder / "noise.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "noise.so"))


def address(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def integers(count=100_000):
    random = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    return np.concatenate([random, np.array(EDGES, dtype=np.uint32)])


def hexadecimal(words):
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_known_answers(counter, key, output, compiled):
    counter, key, output = map(hexadecimal, (counter, key, output))
    drawn = _noise.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(word) for word in drawn] == output
    arrays = [np.array(words, dtype=np.uint32) for words in (counter, key, [0] * 4)]
    compiled.each_block(*map(address, arrays))
    assert arrays[2].tolist() == output


@triton.jit
def words_kernel(out_ptr, seed, first, member, STREAM: tl.constexpr, QUADS: tl.constexpr):
    quads = first.to(tl.int64) + tl.arange(0, QUADS)
    x0, x1, x2, x3 = kernels.words(seed.to(tl.int64), quads, member.to(tl.int64), STREAM)
    at = out_ptr + tl.arange(0, QUADS)
    tl.store(at, x0.to(tl.int64))
    tl.store(at + QUADS, x1.to(tl.int64))
    tl.store(at + 2 * QUADS, x2.to(tl.int64))
    tl.store(at + 3 * QUADS, x3.to(tl.int64))


@pytest.mark.parametrize("stream", [_noise.NORMALS, _noise.UNIFORMS])
@pytest.mark.parametrize("seed", [0, 12345, -(2**63) + 7, -1])
@pytest.mark.parametrize("member", [0, 77, 2**32 - 1])
def test_the_same_integers_everywhere(member, seed, stream, compiled, device):
    quads = 64
    truth = _noise.words(torch.tensor(seed), member, 1, 4 * quads, stream)[0]
    found = np.zeros(4 * quads, dtype=np.uint32)
    about = ctypes.c_uint64(seed % 2**64), ctypes.c_uint32(member), ctypes.c_uint32(stream)
    compiled.each_word(*about, ctypes.c_uint64(0), address(found), ctypes.c_long(quads))
    assert found.tolist() == truth.tolist()
    out = torch.zeros(4, quads, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, seed, 0, member, stream, quads)
    assert out.t().flatten().tolist() == truth.tolist()


def test_elements_beyond_32_bits_have_numbers_of_their_own(compiled, device):
    first, quads = 2**32 - 8, 16  # the counter's low word wraps half way
    quad = torch.arange(first, first + quads)
    one = torch.full_like(quad, 3)
    drawn = _noise.philox((quad & 0xFFFFFFFF, quad >> 32, one, 0 * one), (one[0], 0 * one[0]))
    truth = torch.stack(drawn, -1)
    assert len({tuple(row) for row in truth.tolist()}) == quads
    found = np.zeros(4 * quads, dtype=np.uint32)
    about = ctypes.c_uint64(3), ctypes.c_uint32(3), ctypes.c_uint32(0), ctypes.c_uint64(first)
    compiled.each_word(*about, address(found), ctypes.c_long(quads))
    assert found.tolist() == truth.flatten().tolist()
    out = torch.zeros(4, quads, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, 3, first, 3, 0, quads)
    assert torch.equal(out.t().cpu(), truth)


def test_radii_and_angles_are_accurate_everywhere(compiled):
    """Near a radius of 0 too, where a float32 (x + 1/2) / 2^32 would be 1."""
    x = integers()
    radius, cosine, sine = (np.zeros(len(x), dtype=np.float32) for _ in range(3))
    compiled.each_radius(address(x), address(radius), ctypes.c_long(len(x)))
    compiled.each_turn(address(x), address(cosine), address(sine), ctypes.c_long(len(x)))
    u = (x.astype(np.longdouble) + 0.5) / 2**32
    truth = np.sqrt(-2 * np.log(u))
    assert np.max(np.abs(radius / truth - 1)) < 1.5 * EPS
    assert radius.max() < 6.77 and radius.min() > 1e-5
    angle = 2 * np.pi * x.astype(np.float64) / 2**32
    for got, truth in ((cosine, np.cos(angle)), (sine, np.sin(angle))):
        assert np.max(np.abs(got - truth)) < EPS
    exact = {0: (1, 0), 2**30: (0, 1), 2**31: (-1, 0), 3 * 2**30: (0, -1)}
    x = np.array(list(exact), dtype=np.uint32)
    compiled.each_turn(address(x), address(cosine), address(sine), ctypes.c_long(4))
    assert list(zip(cosine[:4], sine[:4], strict=True)) == list(exact.values())


# -- statistics: the seeds are fixed, so these either hold or do not -------------------------------

N = 1 << 17


def test_bytes_of_the_words_are_uniform():
    """Chi-square of 255 degrees of freedom: mean 255, standard deviation 22.6."""
    for stream in (_noise.NORMALS, _noise.UNIFORMS):
        words = _noise.words(torch.tensor(2020), 4, 1, N, stream)[0]
        for shift in (0, 8, 16, 24):
            counts = torch.bincount((words >> shift) & 255, minlength=256).double()
            chi_square = ((counts - N / 256).square() / (N / 256)).sum()
            assert abs(chi_square - 255) < 4 * 22.6, (stream, shift)


def kolmogorov_smirnov(sample, cdf):
    """sqrt(n) times the largest distance; above 1.95 once in a thousand samples."""
    at = cdf(sample.double().sort().values)
    n = at.numel()
    above = torch.arange(1, n + 1) / n - at
    return math.sqrt(n) * torch.maximum(above, at - torch.arange(n) / n).max()


def test_noise_is_standard_normal():
    noise = perturb_reference(torch.zeros(N), 7, members=2)
    for m in range(2):
        assert kolmogorov_smirnov(noise[m], torch.special.ndtr) < 1.95
        for lane in range(4):  # cosines and sines, first and second pair
            assert kolmogorov_smirnov(noise[m, lane::4], torch.special.ndtr) < 1.95
    moments = [noise.double().pow(k).mean() for k in (1, 2, 3, 4)]
    spread = [1, 2, 15, 96]  # variances of the powers of one number
    for got, want, variance in zip(moments, (0, 1, 0, 3), spread, strict=True):
        assert abs(got - want) < 4 * math.sqrt(variance / (2 * N))
    assert noise.abs().max() > 4  # one in 16,000: tails are there


def test_neighbours_members_and_seeds_are_uncorrelated():
    rows = [perturb_reference(torch.zeros(N), seed, members=3) for seed in (1, 2, 1 + 2**32)]
    rows = torch.cat(rows)
    rows = torch.cat([rows, rows[:1].roll(1, 1), rows[:1].roll(2, 1), rows[:1].roll(4, 1)])
    for values in (rows, rows.square(), rows.sign()):
        r = torch.corrcoef(values)
        r.fill_diagonal_(0)
        assert r.abs().max() < 5 / math.sqrt(N)


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
def test_masks_drop_as_many_as_they_should(p):
    masks = perturb_reference(torch.ones(N), 5, members=3, scale=0.0, dropout=p)
    dropped = (masks == 0).double()
    for share in dropped.mean(1):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / N)
    torch.testing.assert_close(masks[masks != 0].unique(), torch.tensor([1 / (1 - p)]))
    r = torch.corrcoef(torch.cat([dropped, dropped[:1].roll(1, 1)]))
    assert r.fill_diagonal_(0).abs().max() < 5 / math.sqrt(N)
