"""What a subspace takes along: views of the point, state dicts, copies, statistics of norms."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from nn.mixture import Mixture, in_order, make, token_rows
from torch import nn

from landscape_fast.nn import Bezier, Line, Simplex, Subspace
from landscape_fast.testing import assert_as_exact


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Mixture().double()


@pytest.fixture
def rows():
    return token_rows()


def assert_bound(subspace):
    """The parameters of the model are views of `point`, at C A, and their gradients of its."""
    wanted = subspace.mix(in_order(subspace, subspace.coeffs, -1))[0].detach()
    assert_as_exact("point", subspace.point, wanted, wanted)
    for vector, get in ((subspace.point, lambda p: p), (subspace.point_grad, lambda p: p.grad)):
        found = {name: get(p) for name, p in subspace.model.named_parameters()}
        for name, view in subspace.layout.views(vector).items():
            assert found[name].data_ptr() == view.data_ptr(), name
            assert found[name].shape == view.shape and found[name].dtype == vector.dtype
    assert subspace.model.out.weight is subspace.model.embed.weight
    before = subspace.point.clone()
    subspace.draw_()
    assert not torch.equal(before, subspace.point)


def through_a_file(subspace):
    file = io.BytesIO()
    torch.save(subspace, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MOVES = {
    "float": lambda s: s.float(),
    "bfloat16": lambda s: s.bfloat16(),
    "to": lambda s: s.to("cpu", torch.float32),
    "deepcopy": copy.deepcopy,
    "file": through_a_file,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("trained", [None, [False, True, False]])
def test_the_model_stays_a_view_of_the_point(net, rows, move, trained):
    subspace = make(net, Bezier(3), trained=trained).draw_()
    anchors, point = subspace.anchors, subspace.point.clone()
    moved = move(subspace)
    assert (moved is not subspace) == (moved.anchors is not anchors)  # optimisers keep hold of it
    assert_as_exact("point", moved.point, point.to(moved.point.dtype), point)
    assert_bound(moved)
    assert_bound(copy.deepcopy(moved))
    if moved is not subspace:
        assert_bound(subspace)
        assert moved.point.data_ptr() != subspace.point.data_ptr()
    x, y = rows
    F.cross_entropy(moved.model(x), y).backward()
    assert moved.point_grad.any()


def test_state_dict(net, rows):
    x, _ = rows
    subspace = make(net, Simplex(3), trained=[True, False, True]).draw_()
    subspace(x)  # running statistics move
    subspace.recalibrate_(x).eval()
    state = subspace.state_dict()
    assert {"anchors", "fixed", "coeffs", "model.norm.running_mean"} <= set(state)
    assert not any(name.startswith("model.conv") for name in state)
    other = make(net, Simplex(3), trained=[True, False, True], generator=None).eval()
    assert not torch.equal(other.anchors, subspace.anchors)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other(x), subspace(x))  # statistics came along, and are of this point
    assert_bound(other)
    with pytest.raises(RuntimeError, match="Missing key.*model.norm.running_mean"):
        other.load_state_dict({k: v for k, v in state.items() if k != "model.norm.running_mean"})
    with pytest.raises(RuntimeError, match="Unexpected key.*model.norm.lost"):
        other.load_state_dict({**state, "model.norm.lost": torch.zeros(1)})
    inside = nn.ModuleDict({"a": other})
    inside.load_state_dict({f"a.{name}": value for name, value in state.items()})
    subspace.draw_()
    other.load_state_dict(subspace.state_dict())
    with pytest.raises(RuntimeError, match="running statistics"):
        other(x)


@pytest.mark.parametrize("trained", [None, [True, False, True]])
def test_a_state_dict_may_be_assigned(net, rows, trained):
    x, _ = rows
    subspace = make(net, Simplex(3), trained=trained).draw_()
    state = subspace.recalibrate_(x).eval().state_dict()
    other = make(net, Simplex(3), trained=trained, generator=None).eval()
    other.load_state_dict(copy.deepcopy(state), assign=True)
    assert torch.equal(other(x), subspace(x)) and torch.equal(other.point, subspace.point)
    assert_bound(other)


def test_coefficients_keep_their_digits_in_low_precision(net):
    subspace = make(net, Simplex(3)).bfloat16()
    assert torch.equal(subspace.coeffs, torch.full((1, 3), 1 / 3))


def test_only_the_anchors_are_parameters(net):
    subspace = make(net, Line())
    assert [name for name, _ in subspace.named_parameters()] == ["anchors"]
    assert [name for name, _ in nn.Sequential(subspace).named_parameters()] == ["0.anchors"]
    original = net.conv.weight.clone()
    with torch.no_grad():
        subspace.anchors.zero_()
    subspace.move_to_(torch.tensor([0.0, 1.0]))
    assert torch.equal(net.conv.weight, original) and not subspace.model.conv.weight.any()


def test_statistics_of_another_point_are_refused(net, rows):
    x, _ = rows
    subspace = make(net, Line()).eval()
    calls = {"current": lambda: subspace(x), "model": lambda: subspace.model(x),
             "given": lambda: subspace(x, subspace.coeffs[0])}  # fmt: skip
    words = "running statistics must be of the weights .*'recalibrate'.*'shared'.*'batch'"
    for call in calls.values():
        with pytest.raises(RuntimeError, match=words):
            call()
    subspace.recalibrate_(x)
    assert calls["current"]().shape == calls["model"]().shape
    with pytest.raises(RuntimeError, match=words):
        calls["given"]()
    subspace.move_to_(torch.tensor([0.25, 0.75]))
    with pytest.raises(RuntimeError, match=words):
        calls["model"]()
    subspace.recalibrate_(x)
    with torch.no_grad():
        subspace.anchors.add_(0.1)  # a step of an optimiser: the point is no longer on the line
    with pytest.raises(RuntimeError, match=words):
        calls["current"]()
    subspace.train().eval()
    with pytest.raises(RuntimeError, match=words):
        calls["model"]()
    assert_bound(subspace)
    for mode in ("shared", "batch"):
        subspace.statistics = mode
        assert all(call().isfinite().all() for call in calls.values())
    with pytest.raises(ValueError, match="mode must be one of"):
        subspace.statistics = "none"
    subspace.statistics = "recalibrate"
    for move in MOVES.values():
        subspace.double().recalibrate_(x)
        assert move(subspace)(x).isfinite().all()  # and then not:
        with torch.no_grad():
            subspace.anchors.add_(0.1)
        with pytest.raises(RuntimeError, match=words):
            move(subspace)(x)
    plain = Subspace(Mixture(batch_norm=False).eval(), 2, Line())
    assert plain.eval().draw_()(x).isfinite().all()  # nothing to recalibrate


def test_recalibrated_statistics_are_those_of_the_point(net, rows):
    x, _ = rows
    subspace = make(net, Line()).draw_()
    with torch.no_grad():
        subspace.anchors.mul_(1.1)
    subspace.recalibrate_(x, batch_size=4)
    weights = subspace.layout.views(subspace.mix(subspace.coeffs)[0].detach())
    embedded = F.embedding(x, weights["embed.weight"]).transpose(1, 2)
    seen = F.conv1d(embedded, weights["conv.weight"], weights["conv.bias"], padding=1)
    norm = subspace.model.norm
    assert_as_exact("mean", norm.running_mean, seen.mean((0, 2)), seen.mean((0, 2)))
    assert_as_exact("var", norm.running_var, seen.var((0, 2)), seen.var((0, 2)))


def test_a_network_is_a_copy_at_a_point(net, rows):
    x, _ = rows
    subspace = make(net, Line(), layerwise=True)
    subspace.eval().recalibrate_(x)
    here = subspace.network()
    assert type(here) is Mixture and here.out.weight is here.embed.weight
    assert torch.equal(here(x), subspace.model(x))
    end = subspace.network(torch.tensor([0.0, 1.0]))
    for name, view in subspace.layout.views(subspace.anchors[1].detach()).items():
        assert torch.equal(end.get_parameter(name), view)
    with pytest.raises(RuntimeError, match="running statistics"):
        end(x)
    per_layer = torch.rand(len(subspace.layout), 2, dtype=torch.float64)
    mixed = subspace.layout.views(subspace.mix(per_layer[None])[0].detach())
    for name, parameter in subspace.network(per_layer).named_parameters():
        assert torch.equal(parameter, mixed[name])
    before = subspace.model(x)
    with torch.no_grad():
        for p in [*end.parameters(), *here.parameters()]:
            p.zero_()
    assert torch.equal(subspace.model(x), before)  # a recalibrated one is not marked by its copies


def test_moving_between_forward_and_backward_is_an_error(net, rows):
    x, y = rows
    subspace = make(net, Line()).draw_()
    loss = F.cross_entropy(subspace.model(x), y)
    subspace.draw_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
