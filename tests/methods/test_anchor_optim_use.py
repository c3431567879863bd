"""Optimisers of subspaces as users meet them: gradients, schedules, state dicts, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from methods.anchor_problem import draws, network, problem, run, subspace
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from landscape_fast.methods.anchor_optim import AnchorAdam, AnchorAdamW, AnchorSGD
from landscape_fast.nn.coefficients import Line, Simplex
from landscape_fast.nn.subspace import Subspace


def test_gradients_in_the_buffer_and_elsewhere_are_the_same():
    results = []
    for zero in (True, False):
        space = subspace()
        results.append(run(space, AnchorSGD(space, 0.1, 0.9), zero=zero))
        assert not space.point_grad.any() or zero
    assert torch.equal(*results)


def test_two_backward_passes_add_up():
    x, y = problem()
    results = []
    for homes in ("buffer", "elsewhere", "mixed"):
        space = subspace()
        optimizer = AnchorSGD(space, 0.1)
        if homes != "buffer":
            optimizer.zero_grad()
        if homes == "mixed":  # one parameter keeps its place in the buffer
            weight = next(space.model.parameters())
            weight.grad = space.layout.views(space.point_grad)[space.layout.names[0]]
        for part in range(2):
            F.cross_entropy(space.model(x[part]), y[part]).backward()
        optimizer.step()
        results.append(space.anchors.detach().clone())
        before = space.anchors.detach().clone()
        optimizer.step()  # nothing is left of the gradient
        assert torch.equal(space.anchors, before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_parameters_without_a_gradient_have_a_gradient_of_zero():
    space, x = subspace(), problem()[0]
    optimizer = AnchorSGD(space, 0.1)
    optimizer.zero_grad()
    space.point_grad.fill_(5.0)  # left by something else
    space.point_grad.mul_(space.layout.mask)
    before = space.anchors.detach().clone()
    space.model[0](x[0]).square().mean().backward()  # the convolution alone
    optimizer.step()
    moved = space.layout.views(space.anchors.detach() - before)
    assert all(bool(m.any()) == name.startswith("0.") for name, m in moved.items())


def test_pads_stay_zero():
    space = subspace("layer-wise simplex")
    run(space, AnchorAdam(space, 0.01, cos2=1.0))
    assert not space.anchors[:, space.layout.mask == 0].any()


def test_zero_grad_forgets_wherever_it_is():
    for set_to_none in (True, False):
        for first in (True, False):
            space, x = subspace(), problem()[0]
            optimizer = AnchorSGD(space, 0.1)
            if first:
                optimizer.zero_grad()
            space.model(x[0]).sum().backward()
            optimizer.zero_grad(set_to_none)
            before = space.anchors.detach().clone()
            optimizer.step()
            assert torch.equal(space.anchors, before)


def test_a_gradient_of_the_anchors_belongs_to_torch_optim():
    space, x = subspace(), problem()[0]
    space(x[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"AnchorSGD: subspace.anchors.grad must be None"):
        AnchorSGD(space, 0.1).step()


def test_a_closure_is_called():
    space, (x, y) = subspace(), problem()
    optimizer = AnchorSGD(space, 0.1)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(space.model(x[0]), y[0])
        loss.backward()
        return loss

    before = space.anchors.detach().clone()
    assert optimizer.step(closure) > 0 and not torch.equal(before, space.anchors)


def test_the_subspace_may_move_to_another_dtype():
    """It then has other buffers, and the optimiser, made anew, finds them."""
    space = subspace()
    optimizer = AnchorSGD(space, 0.1)
    run(space, optimizer)
    space.double()
    assert run(space, AnchorSGD(space, 0.1)).dtype == torch.float64


# -- torch.optim's interface -----------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [False, True])
def test_schedules(tensor):
    """Also with a learning rate on the device, which is changed in place."""
    results = []
    for kind in ("ours", "plain"):
        space = subspace(dtype=torch.float64 if not tensor else torch.float32)
        lr = torch.tensor(0.1) if tensor and kind == "ours" else 0.1
        if kind == "ours":
            optimizer = AnchorSGD(space, lr, momentum=0.9)
        else:
            optimizer = torch.optim.SGD([space.anchors], lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=8)
        data = [t[:6] for t in problem(space.anchors.dtype)]
        for x, y, c in zip(*data, draws("line", 6), strict=True):
            optimizer.zero_grad()
            if kind == "ours":
                space.move_to_(c[0])
                loss = F.cross_entropy(space.model(x), y)
            else:
                loss = F.cross_entropy(space(x, c)[0], y)
            loss.backward()
            optimizer.step()
            schedule.step()
        results.append(space.anchors.detach())
        assert optimizer.param_groups[0]["lr"] != 0.1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cls", [AnchorSGD, AnchorAdam, AnchorAdamW])
def test_state_dict_resumes_to_the_same_bits(cls):
    options = {"momentum": 0.9, "dampening": 0.5} if cls is AnchorSGD else {}
    results, kept = [], None
    for interrupted in (False, True):
        space = subspace("layer-wise simplex")
        generator = torch.Generator().manual_seed(9)
        optimizer = cls(space, 0.01, cos2=1.0, generator=generator, **options)
        run(space, optimizer)
        if interrupted:
            kept = copy.deepcopy((space.state_dict(), optimizer.state_dict()))
            space = subspace("layer-wise simplex")
            optimizer = cls(space, 0.5, cos2=1.0, generator=generator, **options)
            run(space, cls(space, 0.1))  # somewhere else
            space.load_state_dict(kept[0])
            optimizer.load_state_dict(copy.deepcopy(kept[1]))
            assert torch.equal(optimizer.gram, kept[1]["gram"])
        results.append(run(space, optimizer))
    assert torch.equal(*results)
    (state,) = kept[1]["state"].values()
    assert state["step"] == 3
    assert set(state) == {"step", *cls._names}


def test_a_rate_on_another_device_is_moved():
    """As of a checkpoint that was read to the CPU."""
    kept = AnchorSGD(subspace(), torch.tensor(0.1), 0.9).state_dict()
    space = subspace().to("meta")
    optimizer = AnchorSGD(space, torch.tensor(0.1, device="meta"), 0.9)
    optimizer.load_state_dict(kept)
    assert optimizer.param_groups[0]["lr"].is_meta


def test_a_gram_matrix_of_other_anchors_is_not_loaded():
    space = subspace()
    optimizer = AnchorSGD(space, 0.1, cos2=1.0)
    run(space, optimizer)
    kept, truth = optimizer.state_dict(), optimizer.gram
    with torch.no_grad():
        space.anchors.mul_(1.5)
    assert "gram" not in optimizer.state_dict()  # not of these anchors
    optimizer.load_state_dict(kept)
    torch.testing.assert_close(optimizer.gram, 2.25 * truth)


def test_one_group_with_the_anchors():
    space = subspace()
    optimizer = AnchorSGD(space, 0.1)
    assert optimizer.param_groups[0]["params"] == [space.anchors]
    with pytest.raises(ValueError, match="AnchorSGD: parameters must be the anchors; got others"):
        optimizer.add_param_group({"params": [torch.zeros(3)]})


def test_the_same_bits_every_time():
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        space = subspace("layer-wise simplex")
        results.append(run(space, AnchorSGD(space, 0.1, 0.9, cos2=1.0)))
    assert torch.equal(*results)


class Launches(TorchDispatchMode):
    """Counts ops that a GPU would launch kernels for: anchor_step has two, a view has none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        works = not function.is_view and not name.startswith(("profiler::", "aten::empty"))
        self.count += 2 if "anchor_step" in name else int(works)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("coefficients", [Line(), Simplex(3)], ids=repr)
def test_a_step_adds_fewer_than_ten_launches(coefficients):
    """Beside forward and backward: what draws the point, mixes it, gathers and steps."""
    space = Subspace(network(), coefficients.anchors, coefficients)
    optimizer = AnchorSGD(space, 0.1, 0.9, cos2=1.0)
    x, y = (t[0] for t in problem())
    for _ in range(2):  # the first one makes the state
        launches = Launches()
        optimizer.zero_grad()
        with launches:
            space.draw_()
        F.cross_entropy(space.model(x), y).backward()
        with launches:
            optimizer.step()
    assert launches.count < 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "SGDRule: lr must be at least 0"),
        ({"nesterov": True}, "SGDRule: momentum must be positive"),
        ({"cos2": -1.0}, "AnchorSGD: cos2 must be at least 0"),
        ({"curve_l2": -1.0}, "AnchorSGD: curve_l2 must be at least 0"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AnchorSGD(subspace(), **options)


def test_what_is_no_subspace_or_has_nothing_to_train():
    with pytest.raises(TypeError, match="AnchorAdam: subspace must be a landscape_fast.nn.Subspac"):
        AnchorAdam(nn.Linear(2, 2), 0.1)
    frozen = Subspace(network(), 2, Line(), trained=(False, False))
    with pytest.raises(ValueError, match="AnchorSGD: subspace must be one with a trained anchor"):
        AnchorSGD(frozen, 0.1)
