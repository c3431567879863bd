"""The hyper-batch kernels in every way they are launched, in tiles small enough for many; plans."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from landscape_fast.kernels import _launch
from landscape_fast.kernels import hyper_batch_conv2d as conv
from landscape_fast.kernels import hyper_batch_linear as forward
from landscape_fast.kernels import hyper_batch_linear_backward as backward
from landscape_fast.kernels import hyper_batch_linear_tiles as tiles
from landscape_fast.kernels._launch import INTERPRETED, Config
from landscape_fast.ops import _hyper_batch_conv2d_fused as conv_plan
from landscape_fast.ops import hyper_batch_linear, hyper_batch_linear_reference
from landscape_fast.ops._batch_ensemble_conv2d_plan import Problem as ConvProblem
from landscape_fast.ops._hyper_batch_linear_plan import Plan, Problem, choose
from landscape_fast.ops._hyper_batch_linear_ways import backward_op, forward_op
from landscape_fast.testing import check_op, check_registered

PAGE = sys.modules[hyper_batch_linear.__module__]
MODES = ["pointers", "folded rows", "descriptors"]
TIED = (6, 7)


def small(tma=False, folded=None, block=16):
    """A configuration with the smallest tiles."""
    blocks = {f"BLOCK_{letter}": block for letter in "BIO"} | {"GROUP": 2}
    blocks |= {} if folded is None else {"FOLDED": folded}
    return Config(blocks, num_warps=4, num_stages=2, tma=tma)


def inputs(M, B, I, O, layout="member_major", device="cpu"):
    rows = (B, M) if layout == "batch_major" else (M, B)
    own = (B,) if layout == "shared" else rows
    shapes = [(*own, I), (O, I), (O, I), (*rows, O), (M, I), (M, O), (M, I), (M, O)]
    shapes += [(M, O), (M, O), (*rows, O)]
    return [torch.randn(shape).to(device) for shape in shapes]


@pytest.fixture
def mode(request, monkeypatch):
    """Makes `backend="triton"` take small tiles in one of `MODES`; checks that it did."""
    name = request.param
    tma, launched = name == "descriptors", []

    def buckets(arch, stage, kind, with_descriptors):
        assert with_descriptors or not tma, "these inputs allow descriptors"
        launched.append(stage)
        return ((1.0, small(tma, name == "folded rows" if stage == "fwd" else None)),)

    monkeypatch.setattr(tiles, "buckets", buckets)
    if tma and not torch.cuda.is_available():
        for module in (forward, backward):
            monkeypatch.setattr(module, "arch", lambda tensor: 90)
    caches = (tiles.forward_config, tiles.input_config)
    for cache in caches:
        cache.cache_clear()
    yield name
    for cache in caches:
        cache.cache_clear()
    assert set(launched) >= {"fwd"}


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("layout", ["member_major", "batch_major", "shared"])
def test_every_mode_agrees_with_the_definition(mode, layout, device):
    arguments = inputs(2, 19, 24, 40, layout, device)
    if layout == "batch_major":
        arguments = [None if i in TIED else t for i, t in enumerate(arguments)]
    layout = "member_major" if layout == "shared" else layout
    options = {"layout": layout, "backend": "triton"}
    check_op(hyper_batch_linear, hyper_batch_linear_reference, arguments, **options)


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_every_mode_in_half_precision(mode, device):
    options = {"dtype": torch.float16, "backend": "triton"}
    arguments = inputs(2, 19, 24, 40, device=device)
    check_op(hyper_batch_linear, hyper_batch_linear_reference, arguments, **options)


@pytest.mark.parametrize("layout", ["member_major", "batch_major"])
@pytest.mark.parametrize("per_split", [16, 48, 64])
@pytest.mark.parametrize("folded", [False, True])
def test_any_split_of_the_inputs_gives_the_same_sums(folded, per_split, layout, device):
    tensors = inputs(2, 19, 57, 18, device=device)
    shape = (2, 19, 18)
    y, z = (torch.full(shape, float("nan"), device=device) for _ in range(2))
    if layout == "batch_major":
        y, z = (t.new_full((19, 2, 18), float("nan")).transpose(0, 1) for t in (y, z))
    options = {"config": small(folded=folded), "per_split": per_split}
    forward.hyper_batch_linear_fwd(*tensors, y, z, False, **options)
    x, _, delta, *_ = tensors
    u = tensors[6]
    torch.testing.assert_close(y, hyper_batch_linear_reference(*tensors), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z, (x * u[:, None]) @ delta.T, rtol=1e-4, atol=1e-4)


def test_few_tiles_are_split():
    """A layer of 128 rows has 64 tiles, half of what the chip holds; more rows fill it."""
    few = (4, 32, 4096, 4096)
    config = tiles.forward_config("half", True, 90, 132, *few)
    assert config.tiles["FOLDED"] and tiles.inputs_per_split(config, 132, *few) == 2048
    many = (4, 1024, 4096, 4096)
    config = tiles.forward_config("half", True, 90, 132, *many)
    assert tiles.inputs_per_split(config, 132, *many) == 4096


@pytest.mark.parametrize("plan", [("fused", "composed"), ("composed", "fused")], ids=str)
@pytest.mark.parametrize("tie", [False, True])
def test_each_direction_may_go_its_own_way(plan, tie, monkeypatch, device):
    monkeypatch.setattr(PAGE, "FUSED", Plan(*plan))
    arguments = inputs(2, 7, 5, 4, device=device)
    arguments = [None if tie and i in TIED else t for i, t in enumerate(arguments)]
    check_op(hyper_batch_linear, hyper_batch_linear_reference, arguments, backend="triton")


def test_same_bits_every_time(device):
    arguments = [t.requires_grad_() for t in inputs(2, 19, 24, 18, "shared", device)]
    dy = torch.randn(2, 19, 18, device=device)

    def run():
        y = hyper_batch_linear(*arguments, backend="triton")
        return [y, *torch.autograd.grad(y, arguments, dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_same_in_64_bit_offsets(device):
    x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias = inputs(2, 17, 5, 18, device=device)
    found = []
    for long in (False, True):
        ys = []
        for folded in (False, True):
            y, z = x.new_empty(2, 17, 18), x.new_empty(2, 17, 18)
            factors = (r, s, u, v, bias, delta_bias, e_bias)
            options = {"config": small(folded=folded), "long": long}
            arguments = (x, weight, delta, e, *factors, y, z)
            forward.hyper_batch_linear_fwd(*arguments, False, **options)
            ys += [y, z]
        outputs = [t.new_empty(t.shape) for t in (x, r, u)]
        tensors = (ys[0], x, weight, delta, e, r, s, u, v, *outputs)
        backward.hyper_batch_linear_bwd_x(*tensors, False, config=small(), long=long)
        found.append(ys + outputs)
    for a, b in zip(*found, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has no sparse files")
def test_convolution_with_offsets_beyond_32_bits(tmp_path):
    """Images whose channels lie 2**31 elements apart, read and written."""
    size, far = (1, 1, 5, 2, 2), []
    for name in ("x", "y"):  # pages of the files come on demand
        big = torch.from_file(str(tmp_path / name), shared=True, size=2**31 + 200)
        far.append(big.as_strided(size, (0, 0, 2**29 + 8, 2, 1)).copy_(torch.randn(size)))
    near = [t.contiguous() for t in far]
    factors = (torch.randn(1, 1, 5), *[torch.randn(1, 5) for _ in range(4)], None)
    weight, delta = torch.randn(2, 5, 3, 3, 5)
    for x, y in (far, near):
        options = ((1, 1), (1, 1), (1, 1), False)
        conv.hyper_batch_conv2d_fwd(x, weight, delta, *factors, y, None, *options)
    assert torch.equal(far[1], near[1])


def test_errors_name_the_op(monkeypatch, device):
    monkeypatch.setattr(_launch, "MAX_GRID_X", 0)
    with pytest.raises(ValueError, match="^hyper_batch_linear: .* for 0 programs; got 2"):
        hyper_batch_linear(*inputs(2, 5, 4, 3, device=device), backend="triton")


def test_launches_only_what_is_wanted(monkeypatch, device):
    """One product for each weight whose gradients are wanted; none for a gradient of e alone."""
    launched = []
    for name in ("hyper_batch_linear_bwd_x", "batch_ensemble_linear_bwd"):
        original = getattr(backward, name)

        def spy(*arguments, name=name, original=original):
            launched.append(name)
            return original(*arguments)

        monkeypatch.setattr(backward, name, spy)
    x_kernel, weight_kernel = "hyper_batch_linear_bwd_x", "batch_ensemble_linear_bwd"
    for wanted, names in (
        ("x", [x_kernel]),
        ("x r u", [x_kernel]),
        ("r", [weight_kernel]),
        ("weight s", [weight_kernel]),
        ("weight delta", [weight_kernel] * 2),
        ("x weight delta r s u v bias", [x_kernel, weight_kernel, weight_kernel]),
        ("e e_bias delta_bias", []),
    ):
        launched.clear()
        fields = dict(zip(PAGE.Inputs._fields, inputs(2, 5, 4, 3, device=device), strict=True))
        for name in wanted.split():
            fields[name].requires_grad_()
        hyper_batch_linear(**fields, backend="triton").sum().backward()
        assert launched == names, wanted


@pytest.mark.parametrize("layout", ["member_major", "batch_major", "shared"])
def test_registered_ops(layout, device):
    M, B = 2, 5
    tensors = inputs(M, B, 4, 3, layout, device)
    batch_major = layout == "batch_major"
    check_registered(forward_op, (*tensors, M, batch_major, True))
    bare = [t if i < 4 else None for i, t in enumerate(tensors)]
    check_registered(forward_op, (*bare, M, batch_major, False))
    dy = torch.randn((B, M, 3) if batch_major else (M, B, 3), device=device)
    needs = [True] * 3 + [False] + [True] * 5 + [False] * 2
    check_registered(backward_op, (dy, *tensors[:9], needs, batch_major))


def test_every_shape_finds_a_configuration():
    for arch in (80, 90, 100):
        for kind in ("half", "tf32", "ieee"):
            for tma in (False, True) if arch > 80 else (False,):
                for M, B, O in ((1, 1, 1), (4, 32, 4096), (4, 512, 1024), (64, 4096, 4096)):
                    tiles.forward_config(kind, tma, arch, 132, M, B, 512, O)
                    for stage in ("x", "x tied"):
                        tiles.input_config(stage, kind, tma, arch, 132, M, B, O)
    few = tiles.forward_config("half", True, 90, 132, 16, 1, 4096, 4096)
    assert few.tiles["FOLDED"]  # the rows of all members share the tiles of the weights


def test_plan_fuses_where_memory_sets_the_time():
    """Few rows, or small layers; a large GEMM goes to the library."""
    assert choose(Problem(4, 32, 4096, 4096)).forward == "fused"
    assert choose(Problem(4, 128, 640, 640)) == ("fused", "fused")
    assert choose(Problem(4, 512, 512, 512)).forward == "fused"
    assert choose(Problem(8, 4096, 8192, 8192)).forward == "composed"
    # rows that allow no 16-byte loads are slow in a kernel, not in the library
    assert choose(Problem(4, 512, 1023, 1023, aligned=False)).forward == "composed"
    # float32 gradients of 16-bit inputs: the library would have to widen its factors
    assert choose(Problem(4, 512, 2048, 2048, exact=True)).backward == "fused"


def test_plan_of_convolutions():
    """Channels that no tensor core fills go to the kernel, which reads images once."""
    narrow = ConvProblem(4, 128, 16, 16, 9, 1024, 1024)
    wide = narrow._replace(I=640, O=640, inputs=64, outputs=64)
    assert conv_plan.choose(narrow).forward == "fused"
    assert conv_plan.choose(wide) == ("composed", "composed")
