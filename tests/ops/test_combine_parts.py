"""The parts of combine: registered ops, launches, the table of addresses, far offsets."""

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from landscape_fast.kernels import _table
from landscape_fast.kernels import combine as kernels
from landscape_fast.kernels._launch import INTERPRETED
from landscape_fast.ops import _combine_parts
from landscape_fast.ops.combine import combine, combine_reference
from landscape_fast.testing import assert_as_exact, check_registered

BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
LIST = [(0, 2), (3, 5), (), (64, 32), (1031,), (16,)]  # shapes of a small network's parameters


def network(K, device):
    return [torch.randn(K, *shape, device=device) for shape in LIST]


@pytest.mark.parametrize("backend", BACKENDS)
def test_registered_ops(backend, device):
    coeffs, layers = torch.randn(2, 3, device=device), torch.randn(2, 2, 3, device=device)
    flat = [torch.randn(3, 7, device=device)]
    # sizes that leave no gap in the buffer, since opcheck would compare what lies there
    pair = [torch.randn(3, 64, device=device), torch.randn(3, 2, 32, device=device)]
    for arguments in ((coeffs, flat, None), (layers, flat, (3, 4)), (layers, pair, None)):
        check_registered(_combine_parts.combine_op, (*arguments, backend))
        weights = _combine_parts.views(
            _combine_parts.combine_op(*arguments, backend), 2, arguments[1]
        )
        dweights = [torch.randn_like(w) for w in weights]
        for needs in ((True, True), (False, True), (True, False)):
            given = (*arguments[:2], dweights, arguments[2], list(range(len(dweights))))
            wanted = [needs[1]] * len(dweights)
            check_registered(
                _combine_parts.combine_backward_op, (*given, needs[0], wanted, backend)
            )


def test_one_launch_for_the_whole_network(device, monkeypatch):
    launches = []
    launch = kernels.launch

    def counted(kernel, programs, *args):
        launches.append((kernel, programs))
        launch(kernel, programs, *args)

    monkeypatch.setattr(kernels, "launch", counted)
    coeffs = torch.randn(3, len(LIST), 2, device=device, requires_grad=True)
    anchors = [a.requires_grad_() for a in network(2, device)]
    weights = combine(coeffs, anchors, backend="triton")
    assert [kernel for kernel, _ in launches] == [kernels.combine_fwd_kernel]
    torch.autograd.grad(sum(w.sum() for w in weights), [coeffs, *anchors])
    assert [k for k, _ in launches[1:]] == [kernels.combine_bwd_kernel, kernels.combine_sum_kernel]
    launches.clear()
    P = 5008
    combine(torch.randn(64, 2, device=device), torch.randn(2, P, device=device), backend="triton")
    ((_, programs),) = launches  # one program makes a tile of all 64 members
    assert programs == -(-P // kernels.FORWARD_SHIPPED[90, 2].tiles["BLOCK_P"])


@pytest.mark.parametrize("sizes", [(19200,), (9000, 200, 10000)])
def test_partial_sums_of_many_tiles(sizes, device, monkeypatch):
    """More of them than one program of the sum has in flight, as in the largest networks."""
    monkeypatch.setattr(kernels, "SUM_TILE", 128)
    M, K, L, P = 2, 3, len(sizes), sum(sizes)
    anchors, dweights = torch.randn(K, P, device=device), torch.randn(M, P, device=device)
    starts = [sum(sizes[:part]) for part in range(L)]
    rows = [(sizes[i], starts[i], P, starts[i], P, -1, 0, i) for i in range(L)]
    coeffs, dcoeffs = torch.randn(M, L, K, device=device), torch.empty(M, L, K, device=device)
    small = kernels.BACKWARD_SHIPPED[90, 4]._replace(tiles={"BLOCK_K": 4, "BLOCK_P": 64})
    kernels.combine_bwd(coeffs, anchors, dweights, None, dcoeffs, rows, small)
    assert max(sizes) / 64 > 128
    pairs = zip(dweights.split(sizes, 1), anchors.split(sizes, 1), strict=True)
    plain = torch.stack([d @ a.T for d, a in pairs], 1)
    pairs = zip(dweights.double().split(sizes, 1), anchors.double().split(sizes, 1), strict=True)
    assert_as_exact("dcoeffs", dcoeffs, plain, torch.stack([d @ a.T for d, a in pairs], 1))


def test_the_table_is_uploaded_once_and_the_cache_is_bounded(device, monkeypatch):
    uploads = []
    upload = _table._upload

    def counted(numbers, device):
        uploads.append(len(numbers))
        return upload(numbers, device)

    monkeypatch.setattr(_table, "_upload", counted)
    monkeypatch.setattr(_table, "KEPT", 3)
    _table._entries.clear()
    coeffs, anchors = torch.randn(2, 3, device=device), network(3, device)
    for _ in range(3):
        combine(coeffs, anchors, backend="triton")
    assert len(uploads) == 1
    for n in range(1, 8):
        tensor = torch.randn(3, 2 * n, device=device)
        combine(torch.randn(2, 2, 3, device=device), tensor, sizes=(n, n), backend="triton")
    assert len(_table._entries) == 3
    combine(coeffs, anchors, backend="triton")
    assert len(uploads) == 1 + 7 + 1  # forgotten in the meantime, and made again


def test_numbers_written_inside_a_graph_are_the_uploaded_ones(device):
    numbers = [0, 1, -1, 2**31 + 5, 2**47 - 16, -(2**40) - 3] * 40
    here = torch.device(device)
    uploaded, written = _table._upload(numbers, here), _table._write_in_graph(numbers, here)
    assert torch.equal(uploaded, written) and written.tolist() == numbers


def step(coeffs, anchors):
    """Weights and all gradients on the path that reads tables."""
    weights = combine(coeffs, anchors, backend="triton")
    return weights + list(torch.autograd.grad(sum(w.sin().sum() for w in weights), anchors))


def leaves():
    coeffs = torch.randn(2, len(LIST), 3, device="cuda")
    return coeffs, [a.requires_grad_() for a in network(3, "cuda")]


@pytest.mark.gpu
@pytest.mark.parametrize("known", [True, False])
def test_a_captured_graph_finds_or_writes_its_table(known):
    coeffs, anchors = leaves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(coeffs, anchors)
    torch.cuda.current_stream().wait_stream(side)
    if not known:
        _table._entries.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(coeffs, anchors)
    _table._entries.clear()  # what a replay reads must not be given back
    torch.empty(1 << 20, device="cuda").fill_(float("nan"))
    with torch.no_grad():
        for a in anchors:
            a.neg_()
    graph.replay()
    got = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(got, step(coeffs, anchors), strict=True))


@pytest.mark.gpu
def test_new_tables_do_not_synchronise_and_other_streams_wait_for_them():
    coeffs, anchors = leaves()
    expected = step(coeffs, anchors)
    _table._entries.clear()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # the upload waits behind it
            step(coeffs, anchors)
        got = step(coeffs, anchors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_wide_and_narrow_tiles_cover_each_part_once():
    rows = [
        (2048 + 21, 64, 32, 0, 48, -1, 0, 0),  # the last element apart
        (40, 6, 32, 16, 48, 0, 16, 2),  # pairs
        (5, 0, 0, 0, 0, 0, 0, 3),
    ]
    cut = [_table.pieces(row, 4) for row in rows]
    units = [[(p.P, p.unit) for p in each] for each in cut]
    assert units == [[(2068, 4), (1, 1)], [(40, 2)], [(4, 4), (1, 1)]]
    assert cut[0][1] == (1, 64 + 2068, 32, 2068, 48, -1, 0, 0, 1)
    assert [p.unit for p in _table.pieces(rows[1], 8)] == [2]
    table = _table.table(rows, 1024, torch.empty(0))
    first = table.data[: table.rows + 1].tolist()
    assert first == [0, 3, 4, 5, 6, 7] and table.tiles == 7 and 2**table.steps >= table.rows
    sums = table.data[table.rows + 1 + table.rows * len(_table.Row._fields) :]
    assert sums.view(-1, 3).tolist() == [[0, 0, 4], [2, 4, 5], [3, 5, 7]]  # part, tiles from, to
    assert (table.parts, table.most, table.unit) == (3, 4, 1)


def sparse(elements):
    """float16 zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=np.float16)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program of a grid, and wraps as it would")
@pytest.mark.parametrize("with_table", [False, True])
def test_offsets_beyond_int32(with_table, monkeypatch):
    # One tile that starts at element 2**31, of rows that lie 2**30 apart (or more than 2**31, with
    # a table): in 32 bits, where the interpreter wraps too, each of these products would go wrong.
    start, block, size = 2**31, 1024, 40
    M, K, far = 3, 3, 2**31 + 64 if with_table else 2**30 + 64
    at = [start + row * far for row in range(3)]
    anchors, weights, danchors = (sparse(at[2] + 2 * block) for _ in range(3))
    values = torch.randn(K, size).half()
    for row in range(K):
        anchors[at[row] : at[row] + size] = values[row].numpy()
    coeffs = torch.tensor([[1.0, 2.0, 0.5], [-0.5, 0.25, 1.0], [0.0, -1.0, 0.0]])
    table, numbers = None, [M, K, start + size, 1, 0, K, 0, 1, far, far]
    if with_table:  # its first tile is so far below 0 that program 0 is tile 2**31 / block
        table = torch.tensor([-(start // block), 1, start + size, 0, far, 0, far, 0, far, 0, 1])
        numbers[2], numbers[-2:] = 0, [0, 0]
        block *= _table.NARROW.value
    else:
        first = TensorHandle(np.array([start // block], np.int32), triton.language.int32)
        monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: first)

    def head(array):
        return torch.from_numpy(array[:16])

    def stored(array):
        return torch.stack([torch.from_numpy(array[a : a + size].copy()) for a in at])

    kernels.combine_fwd_kernel[(1,)](
        coeffs, head(anchors), table, head(weights), *numbers, 1, 8,
        BLOCK_M=8, BLOCK_K=4, BLOCK_P=block,
    )  # fmt: skip
    made = stored(weights)
    torch.testing.assert_close(made, combine_reference(coeffs, values))
    kernels.combine_bwd_kernel[(1,)](
        coeffs, head(anchors), head(weights), table, head(danchors), None, *numbers, numbers[-1],
        1, 8, BLOCK_K=4, BLOCK_P=block,
    )  # fmt: skip
    torch.testing.assert_close(stored(danchors), combine_reference(coeffs.T, made))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_than_two_to_the_31_elements(backend):
    P = 2**31 + 4099
    anchors = torch.zeros(2, P, dtype=torch.float16, device="cuda")
    anchors[:, -3:] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    anchors.requires_grad_()
    coeffs = torch.tensor([[1.0, 1.0], [0.5, 0.0]], device="cuda", requires_grad=True)
    weights = combine(coeffs, anchors, backend=backend)
    assert weights[:, -3:].tolist() == [[5.0, 7.0, 9.0], [0.5, 1.0, 1.5]]
    dcoeffs, danchors = torch.autograd.grad(weights, (coeffs, anchors), torch.ones_like(weights))
    assert dcoeffs.tolist() == [[6.0, 15.0], [6.0, 15.0]]
    assert danchors[:, -1].tolist() == [1.5, 1.0] and danchors[:, 2**31].tolist() == [1.5, 1.0]


GUARDED = """
import ctypes, mmap
import numpy as np, torch
from landscape_fast.ops.combine import combine, combine_reference

libc = ctypes.CDLL(None, use_errno=True)

def guarded(t, at_end):
    # a copy of t whose last (first) byte is next to a page that must not be touched
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(at), page, 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    array = np.frombuffer(memory, t.numpy().dtype, t.numel(), offset)
    return torch.from_numpy(array).view(t.shape).copy_(t)

CASES = (1, 1, [(3,)]), (3, 3, [(1027,)]), (9, 33, [(40,)]), (2, 5, [(7,), (4, 8)])
for at_end in (False, True):
    for M, K, shapes in CASES:
        inputs = [torch.randn(M, K), *(torch.randn(K, *shape) for shape in shapes)]
        inputs = [guarded(t, at_end).requires_grad_() for t in inputs]
        weights = combine(inputs[0], inputs[1:], backend="triton")
        plain = combine_reference(inputs[0], inputs[1:])
        incoming = [guarded(torch.randn_like(w), at_end) for w in weights]
        grads, truth = (torch.autograd.grad(w, inputs, incoming) for w in (weights, plain))
        for got, want in zip([*weights, *grads], [*plain, *truth]):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
print("untouched")
"""


@pytest.mark.skipif(not INTERPRETED, reason="guards the memory of the interpreter")
def test_nothing_is_read_beside_the_inputs():
    # A masked-out value is never seen, so only the machine can tell that its address was read.
    found = subprocess.run(
        [sys.executable, "-c", GUARDED], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert found.returncode == 0 and "untouched" in found.stdout, found.stderr or found.returncode
