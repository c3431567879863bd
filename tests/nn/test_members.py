"""Layers whose members share nothing, against plain layers and with gradients of every order."""

import pytest
import torch
from torch import nn

from landscape_fast.nn import MemberLinear, MemberScale, ReLUDropout, member_linear, relu_dropout
from landscape_fast.nn.members import FEW_OUTPUTS
from landscape_fast.testing import check_hessian, check_layer, check_op, check_transforms

M, B, I = 3, 5, 4
OUTPUTS = [1, 2, FEW_OUTPUTS, FEW_OUTPUTS + 1]


def definition(x, weight, bias=None, *, layout="member_major"):
    rows = x.transpose(0, 1) if layout == "batch_major" and x.ndim == 3 else x
    y = torch.stack([(rows if x.ndim == 2 else rows[m]) @ weight[m] for m in range(len(weight))])
    y = y if bias is None else y + bias.unsqueeze(1)
    return y.transpose(0, 1) if layout == "batch_major" else y


def op(*tensors, backend="auto", **options):
    return member_linear(*tensors, **options)


def tensors(O, layout="member_major", shared=False, bias=True):
    shape = (B, I) if shared else (M, B, I) if layout == "member_major" else (B, M, I)
    return torch.randn(shape), torch.randn(M, I, O), torch.randn(M, O) if bias else None


@pytest.mark.parametrize("O", OUTPUTS)
@pytest.mark.parametrize("layout", ["member_major", "batch_major"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients(O, layout, shared, dtype):
    for bias in (True, False):
        check_op(op, definition, tensors(O, layout, shared, bias), dtype=dtype, layout=layout)


@pytest.mark.parametrize("O", [2, FEW_OUTPUTS + 1])
class TestHigherOrders:
    def test_gradgradcheck(self, O):
        inputs = [t.double().requires_grad_() for t in tensors(O, "batch_major")]

        def function(*tensors):
            return member_linear(*tensors, layout="batch_major")

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_hessian_and_transforms(self, O):
        check_hessian(op, definition, tensors(O))
        check_transforms(op, definition, tensors(O))


def test_the_gradient_has_the_order_of_the_input():
    """What comes before reads it in that order."""
    x = torch.randn(B, M, I, requires_grad=True)
    (dx,) = torch.autograd.grad(member_linear(x, *tensors(2)[1:], layout="batch_major").sum(), x)
    assert dx.is_contiguous()


@pytest.mark.parametrize("O", [2, FEW_OUTPUTS + 1])
@pytest.mark.parametrize("layout", ["member_major", "batch_major"])
def test_layer(O, layout):
    layer = MemberLinear(I, O, M, layout=layout)
    x = tensors(O, layout)[0]
    check_layer(layer, x)
    y = layer(x)
    for m in range(M):
        member = layer.member(m)
        rows = x[m] if layout == "member_major" else x[:, m]
        torch.testing.assert_close(member(rows), y[m] if layout == "member_major" else y[:, m])
        assert type(member) is nn.Linear and member.weight.is_contiguous()


def test_members_start_by_themselves():
    """Every entry its own draw within 1 / sqrt(I); one seed decides all."""
    one, two = (MemberLinear(9, 8, 50, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    for parameter in (one.weight, one.bias):
        assert (
            parameter.abs().max() <= 1 / 3 and parameter.unique().numel() > 0.9 * parameter.numel()
        )
        assert parameter.abs().max() > 0.32


def test_scale():
    scale = MemberScale((M, I), bias=True)
    nn.init.normal_(scale.weight)
    nn.init.normal_(scale.bias)
    x = torch.randn(B, M, I)
    torch.testing.assert_close(scale(x), x * scale.weight + scale.bias)
    torch.testing.assert_close(scale(x[:, :1])[:, 2], scale.member(2)(x[:, 0]))
    assert scale.members == M and scale.fast_parameters() == [scale.weight]


def test_errors():
    for arguments, match in (
        (tensors(2)[:1] + (torch.zeros(M, I + 1, 2),), r"weight must be \[M, I, O\] with I = 4"),
        ((torch.zeros(M + 1, B, I), *tensors(2)[1:]), r"x must be \[M, B, I\] with M = 3"),
        ((*tensors(2)[:2], torch.zeros(M, 3)), r"bias must be \[M, O\] with M = 3, O = 2"),
        ((torch.zeros(M, B, I, dtype=torch.long), *tensors(2)[1:]), "x must be one of float32"),
        ((tensors(2)[0].double(), *tensors(2)[1:]), "weight must be of the dtype of x, float64"),
    ):
        with pytest.raises(ValueError, match=match):
            member_linear(*arguments)
    with pytest.raises(TypeError, match="weight must be a Tensor; got NoneType"):
        member_linear(torch.zeros(B, I), None)
    with pytest.raises(ValueError, match="layout must be one of"):
        member_linear(*tensors(2), layout="folded")
    with pytest.raises(ValueError, match="layout must be one of"):
        MemberLinear(I, 2, M, layout="folded")
    with pytest.raises(ValueError, match="members must be an integer of at least 1"):
        MemberLinear(I, 2, 0)
    with pytest.raises(ValueError, match="i must be an integer from 0 to 2"):
        MemberLinear(I, 2, M).member(3)


class TestReLUDropout:
    @pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
    def test_the_numbers_of_the_two_modules(self, p):
        """Same mask from the same random state; the gradient to rounding."""
        x = torch.randn(64, 33, dtype=torch.float64)
        for training in (True, False):
            found = []
            two = nn.Sequential(nn.ReLU(), nn.Dropout(p)).train(training)
            for module in (ReLUDropout(p).train(training), two):
                own = x.clone().requires_grad_()
                torch.manual_seed(3)
                y = module(own)
                found.append((y, *torch.autograd.grad(y.sin().sum(), own)))
            assert torch.equal(found[0][0], found[1][0])
            torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-15, atol=0)

    def test_only_the_result_is_kept(self):
        kept = []
        x = torch.randn(50, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = relu_dropout(x * 1, 0.3)
        assert [t.data_ptr() for t in kept if t.numel() == 50] == [y.data_ptr()]

    def test_gradients_of_gradients_and_transforms(self):
        x = torch.randn(20, dtype=torch.float64, requires_grad=True)

        def function(x):
            torch.manual_seed(3)
            return relu_dropout(x, 0.3).pow(3)

        assert torch.autograd.gradgradcheck(function, (x,))
        (expected,) = torch.autograd.grad(function(x).sum(), x)
        found = torch.func.grad(lambda x: function(x).sum())(x.detach())
        torch.testing.assert_close(found, expected)

    def test_compiled(self):
        x = torch.randn(64, requires_grad=True)
        function = torch.compile(
            lambda x: relu_dropout(x, 0.3), backend="aot_eager", fullgraph=True
        )
        torch.manual_seed(3)
        y = function(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, (y > 0) / 0.7)

    def test_errors(self):
        for make in (lambda p: ReLUDropout(p), lambda p: relu_dropout(torch.zeros(2), p)):
            with pytest.raises(ValueError, match=r"p must be a probability in \[0, 1\); got 1.0"):
                make(1.0)
