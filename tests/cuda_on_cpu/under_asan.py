"""Runs every kernel on buffers of exactly their size, for a library built with AddressSanitizer.

`python under_asan.py LIBRARY`, or `python under_asan.py LIBRARY MISTAKE` for breakable.cu. The
sanitizer ends the process at the first bad access. Numbers are checked elsewhere.
"""

import ctypes
import random
import struct
import sys
from itertools import product

from shim import Kernels

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
ITEMSIZE = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2}


def empty(nbytes: int) -> int:
    """The address of exactly so many bytes of 0xff: NaN, should anyone take them for numbers."""
    address = libc.malloc(nbytes)
    ctypes.memset(address, 0xFF, nbytes)
    return address


def filled(data: bytes) -> int:
    address = libc.malloc(len(data))
    ctypes.memmove(address, data, len(data))
    return address


def numbers(dtype: int, count: int, special: float = 0.0) -> int:
    """`count` random numbers, of which a share of `special` are -inf."""
    values = [random.gauss(0, 2) for _ in range(count)]
    values = [-float("inf") if random.random() < special else v for v in values]
    if dtype == FLOAT16:
        return filled(struct.pack(f"{count}e", *values))
    data = struct.pack(f"<{count}f", *values)
    if dtype == BFLOAT16:
        data = b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))
    return filled(data)


def integers(itemsize: int, count: int, high: int) -> int:
    values = [random.randrange(high) for _ in range(count)]
    return filled(b"".join(v.to_bytes(itemsize, "little") for v in values))


def divergences(kernels):
    shapes = [(1, 1, 1), (3, 7, 10), (10, 40, 10), (16, 3, 33), (17, 5, 40), (9, 2, 515), (4, 6, 8)]
    for (M, N, C), dtype, kind in product(shapes, ITEMSIZE, range(3)):
        logits = numbers(dtype, M * N * C, special=0.1)
        workspace = empty(kernels.divergence_workspace(M, N, C, kind))
        strides = (N * C, C, 1)
        out, sums = empty(4 * M * M), empty(8 * M * M)
        kernels.divergence(logits, dtype, M, N, C, *strides, kind, workspace, out, sums)
        transposed = (1, M * C, M)  # members last
        kernels.divergence(logits, dtype, M, N, C, *transposed, kind, workspace, out, None)
    for M, N, C in [(40, 2, 70), (34, 1, 520), (70, 1, 33)]:  # KL padded to 64 and 128 members
        logits = numbers(FLOAT32, M * N * C, special=0.1)
        workspace, out, sums = (
            empty(n) for n in (kernels.divergence_workspace(M, N, C, 1), 4 * M * M, 8 * M * M)
        )
        kernels.divergence(logits, FLOAT32, M, N, C, N * C, C, 1, 1, workspace, out, sums)


def disagreements(kernels):
    for (M, N), size in product([(1, 1), (5, 1000), (16, 3), (40, 33)], (1, 2, 4, 8)):
        workspace = empty(kernels.disagreement_workspace(M, N))
        labels = integers(size, M * N, 5)
        out, sums = empty(4 * M * M), empty(8 * M * M)
        kernels.disagreement(labels, size, M, N, N, 1, workspace, out, sums)
        kernels.disagreement(labels, size, M, N, 1, M, workspace, out, None)


def summaries(kernels):
    shapes = [(1, 1, 1), (3, 50, 10), (4, 9, 16), (2, 7, 100), (3, 5, 512), (2, 3, 1000)]
    for (M, N, C), dtype, bins in product([*shapes, (3, 3, 1031)], ITEMSIZE, (1, 15)):
        logits, targets = numbers(dtype, M * N * C, special=0.1), integers(8, N, C + 1)
        workspace = empty(kernels.summary_workspace(M, N, C, bins))
        outputs = empty(16 * M), empty(24), empty(8), empty(8 * ((M + 1) * (3 + bins) + 3))
        about = (logits, dtype, M, N, C, N * C, C, 1, targets, bins, 0)
        kernels.summary(*about, workspace, *outputs)
    M, N, C, bins = 330, 3, 4, 40  # more than fits in shared memory
    workspace = empty(kernels.summary_workspace(M, N, C, bins))
    outputs = empty(16 * M), empty(24), empty(8), None
    about = (numbers(FLOAT32, M * N * C), FLOAT32, M, N, C, N * C, C, 1, integers(8, N, C), bins, 0)
    kernels.summary(*about, workspace, *outputs)


def combinations(kernels):
    for dtype, K, sizes in product(ITEMSIZE, (1, 3, 7, 11), ([1], [2048], [2050, 3, 1000])):
        for flat, shared in product((True, False), repeat=2):
            combination(kernels, dtype, 5, K, sizes, flat, shared)
    combination(kernels, FLOAT32, 150, 8, [65], True, False)
    combination(kernels, BFLOAT16, 3, 2, [5] * 260, False, False)


def combination(kernels, dtype, M, K, sizes, flat, shared):
    """All parts side by side in every model (flat), or the models of each part side by side."""
    L, P = len(sizes), sum(sizes)
    rows, start = [], 0
    for part, size in enumerate(sizes):
        if flat:
            row = (size, start, P, start, P, start, P, part)
        else:
            row = (size, K * start, size, M * start, size, K * start, size, part)
        rows += row
        start += size
    table = (ctypes.c_int64 * len(rows))(*rows)
    table = filled(bytes(table))
    coeffs = numbers(dtype, M * K if shared else M * L * K)
    strides = (K, 0, 1) if shared else (L * K, K, 1)
    item = ITEMSIZE[dtype]
    anchors, weights = numbers(dtype, K * P), empty(item * M * P)
    about = (table, L, dtype, coeffs, dtype, M, K, *strides)
    kernels.combine(*about, anchors, weights)
    workspace = empty(kernels.combine_backward_workspace(table, L, dtype, M, K))
    danchors, dcoeffs = empty(item * K * P), empty(item * M * K * (1 if shared else L))
    parts = 1 if shared else L
    kernels.combine_backward(*about, anchors, weights, workspace, danchors, dcoeffs, parts)
    kernels.combine_backward(*about, anchors, weights, None, danchors, None, parts)
    kernels.combine_backward(*about, anchors, weights, workspace, None, dcoeffs, parts)


def perturbations(kernels):
    for dtype, (M, P), shared in product(
        ITEMSIZE, [(1, 1), (3, 1023), (2, 2048), (4, 3001)], (0, 1)
    ):
        item, rows = ITEMSIZE[dtype], 1 if shared else M
        each, seed = filled(struct.pack(f"<{M}f", *[0.5] * M)), integers(8, 1, 2**63)
        sigma, stride = numbers(dtype, rows * P), 0 if shared else P
        fields = (M, P, 0, 7, seed, each, each, sigma, dtype, stride)
        draw = filled(struct.pack("<10q", *fields))
        kernels.perturb(draw, 1, 0, numbers(dtype, rows * P), dtype, stride, empty(item * M * P))
        dweights, dsigma = (empty(item * rows * P) for _ in range(2))
        parts = empty(4 * M * kernels.perturb_tiles(P))
        outputs = dweights, shared, dsigma, shared, parts
        kernels.perturb_backward(draw, 1, 0, numbers(dtype, M * P), dtype, P, *outputs)


def convolutions(kernels):
    """x and dy in images with a gap between rows, and after the last row nothing."""
    for dtype, (I, O), exact in product(ITEMSIZE, [(16, 16), (16, 32), (32, 16), (32, 32)], (0, 1)):
        M, B, H, W = 2, 2, 3, 5
        item, images = ITEMSIZE[dtype], []
        op = filled(struct.pack("<9q", M, B, H, W, I, O, dtype, exact, 3))
        for C in (I, O):
            strides = [n * (W + 1) * C for n in (B * H, H, 1)]
            last = sum(s * (n - 1) for s, n in zip(strides, (M, B, H), strict=True))
            data = numbers(dtype, last + W * C)
            images.append(filled(struct.pack("<5q", data, *strides, C)))
        x, dy, weight = *images, numbers(dtype, M * O * 9 * I)
        bias = numbers(FLOAT32, M * O)
        kernels.subspace_conv2d(op, x, weight, bias, 0, empty(item * M * B * H * W * O))
        kernels.subspace_conv2d(op, dy, weight, None, 1, empty(item * M * B * H * W * I))
        parts = kernels.subspace_conv2d_weight_parts(op)
        kernels.subspace_conv2d_weight(op, x, dy, empty(4 * parts * M * O * 9 * I))


RUNS = (divergences, disagreements, summaries, combinations, perturbations, convolutions)


def breakable(path, mistake):
    run = ctypes.CDLL(path).run_breakable
    run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int] * 4
    assert run(numbers(FLOAT32, 3 * 200), empty(4 * 3), 3, 200, 96, mistake) == 0


if __name__ == "__main__":
    random.seed(0)
    if len(sys.argv) == 3:
        breakable(sys.argv[1], int(sys.argv[2]))
    else:
        library = Kernels(sys.argv[1])
        for run in RUNS:
            run(library)
        print(f"{library.launches()} launches")
