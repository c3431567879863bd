"""anchor_step: what is wrong is said before anything is written."""

import pytest
import torch

from landscape_fast.ops.anchor_step import AdamRule, AnchorState, Cos2, SGDRule, anchor_step

GOOD = {
    "grad": torch.zeros(1, 8),
    "coeffs": torch.zeros(1, 3),
    "anchors": torch.zeros(2, 8),
    "rule": SGDRule(0.1, 0.9),
    "fixed": torch.zeros(1, 8),
    "sizes": (5, 3),
}
SQUARE = torch.zeros(3, 3, dtype=torch.float64)
STATE = AnchorState(torch.zeros(()), torch.zeros(2, 8))
BAD = [
    ({"anchors": torch.zeros(8)}, r"anchors must be \[T, P\]; got \[8\]"),
    ({"anchors": torch.zeros(0, 8)}, r"anchors must be \[T, P\] with T of at least 1"),
    ({"anchors": torch.zeros(2, 8).int()}, "anchors must be one of float32"),
    ({"grad": torch.zeros(1, 7)}, r"grad must be \[M, P\] with P = 8"),
    ({"grad": torch.zeros(0, 8)}, r"grad must be \[M, P\] with M of at least 1"),
    ({"grad": torch.zeros(1, 8).double()}, "grad must be of the dtype of anchors"),
    ({"fixed": torch.zeros(1, 9)}, r"fixed must be \[F, P\] with P = 8"),
    ({"anchors": torch.zeros(8, 2).t()}, "anchors must be of unit stride along P"),
    ({"coeffs": torch.zeros(1, 2)}, r"coeffs must be \[M, S\] with M = 1, S = 3"),
    ({"coeffs": torch.zeros(1, 3, 3)}, r"coeffs must be \[M, L, S\] with M = 1, L = 2, S = 3"),
    ({"coeffs": torch.zeros(1, 2, 3), "sizes": None}, "sizes must be given with coeffs"),
    ({"coeffs": torch.zeros(1, 3).half()}, "coeffs must be one of float32"),
    ({"coeffs": torch.zeros(1, 3, device="meta")}, "coeffs must be on the device of anchors"),
    ({"sizes": (5, 4)}, "sizes must be sizes of parts with sum P = 8"),
    ({"state": AnchorState(torch.zeros(()))}, "state must be of the rule, 1; got 0 vectors"),
    ({"state": STATE._replace(step=torch.zeros(1))}, "state.step must be a 0-dim float32 tensor"),
    ({"state": STATE._replace(first=torch.zeros(2, 7))}, "state.first must be"),
    ({"state": STATE._replace(first=torch.zeros(8, 2).t())}, "state.first must be contiguous"),
    ({"rule": SGDRule(torch.tensor(0.1).double(), 0.9)}, "rule.lr must be a number or a float32"),
    ({"selected": torch.ones(3, dtype=torch.bool)}, r"selected must be \[L\] with L = 2"),
    ({"selected": torch.ones(2, dtype=torch.bool), "sizes": None}, "sizes must be given with sel"),
    ({"penalty": SQUARE.float()}, "penalty must be one of float64"),
    ({"penalty": SQUARE[:2]}, r"penalty must be \[S, S\] with S = 3"),
    ({"penalty": SQUARE.expand(3, 3, 3)}, r"penalty must be \[L, S, S\] with L = 2"),
    ({"penalty": Cos2(SQUARE[:2], torch.tensor(0))}, r"penalty.gram must be \[S, S\]"),
    ({"penalty": Cos2(SQUARE, torch.tensor(0.0))}, "penalty.pair must be a 0-dim int64 tensor"),
    ({"gram": "part"}, "gram must be one of"),
    ({"gram": "parts", "sizes": None}, "sizes must be given with gram='parts'"),
    ({"backend": "cuda"}, "backend must be one of"),
]


@pytest.mark.parametrize("wrong, message", BAD, ids=[message[:40] for _, message in BAD])
def test_errors(wrong, message):
    arguments = {**GOOD, "state": STATE, **wrong}
    before = arguments["anchors"].clone()
    with pytest.raises(ValueError, match="^anchor_step: " + message):
        anchor_step(**arguments)
    assert torch.equal(arguments["anchors"], before)


@pytest.mark.parametrize("name", ["grad", "coeffs", "anchors", "rule", "state", "fixed"])
def test_wrong_types(name):
    with pytest.raises(TypeError, match=f"^anchor_step: {name} must be a"):
        anchor_step(**{**GOOD, "state": STATE, name: "no"})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SGDRule(-0.1), "SGDRule: lr must be at least 0; got -0.1"),
        (lambda: SGDRule(torch.zeros(1)), "SGDRule: lr must be a number or a 0-dim tensor"),
        (lambda: SGDRule(0.1, -1.0), "SGDRule: momentum must be at least 0"),
        (lambda: SGDRule(0.1, weight_decay=-1), "SGDRule: weight_decay must be at least 0"),
        (lambda: SGDRule(0.1, nesterov=True), "SGDRule: momentum must be positive, with damp"),
        (lambda: AdamRule(0.1, (0.9, 1.0)), "AdamRule: betas must be two numbers in"),
        (lambda: AdamRule(0.1, eps=-1), "AdamRule: eps must be at least 0"),
    ],
)
def test_rules_refuse_what_torch_optim_refuses(make, message):
    with pytest.raises(ValueError, match="^" + message):
        make()


def test_a_pair_needs_two_anchors():
    penalty = Cos2(SQUARE[:1, :1], torch.tensor(0))
    state = AnchorState(torch.zeros(()))
    with pytest.raises(ValueError, match="penalty must be None where S = 1"):
        anchor_step(
            torch.zeros(1, 8), torch.zeros(1, 1), torch.zeros(1, 8), SGDRule(0.1), state,
            penalty=penalty,
        )  # fmt: skip
