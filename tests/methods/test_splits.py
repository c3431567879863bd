import pytest
import torch

from landscape_fast.methods.splits import hold_out, stratified_split

ORDER = torch.randperm(53, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0] * 40 + [2] * 10 + [3] * 2 + [4])[ORDER]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.99])
def test_every_class_gives_its_share_and_keeps_some(fraction):
    kept, held = stratified_split(Y, fraction, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(53))
    assert kept.tolist() == sorted(kept.tolist()) and held.tolist() == sorted(held.tolist())
    for label, rows in ((0, 40), (2, 10), (3, 2), (4, 1)):
        count = int((Y[held] == label).sum())
        assert count < rows
        if rows > 2:
            assert count in (max(1, round(fraction * rows)), rows - 1)
    assert not (Y[held] == 4).any()


def test_the_seed_decides_and_nothing_else():
    first = stratified_split(Y, 0.3, 0)[1]
    torch.manual_seed(5)
    assert torch.equal(stratified_split(Y, 0.3, 0)[1], first)
    assert not torch.equal(stratified_split(Y, 0.3, 1)[1], first)


def test_rows_given_apart_are_taken_as_they_are():
    x = torch.randn(53, 2)
    own = (torch.randn(7, 2), torch.zeros(7).long())
    parts = hold_out("f", x, Y, own, 0)
    assert all(a is b for a, b in zip(parts, (x, Y, *own), strict=True))
    train_x, train_y, held_x, held_y = hold_out("f", x, Y, 0.2, 0)
    assert len(train_x) + len(held_x) == 53
    both = torch.cat([train_x, held_x])
    assert torch.equal(both[both[:, 0].argsort()], x[x[:, 0].argsort()])
    pairs = {(float(a), int(b)) for a, b in zip(x[:, 0], Y, strict=True)}
    assert {(float(a), int(b)) for a, b in zip(held_x[:, 0], held_y, strict=True)} <= pairs


WRONG = [
    (1.0, r"f: validation must be a fraction in \(0, 1\), or rows and classes; got 1.0"),
    (5, r"f: validation must be a fraction"),
    ((torch.zeros(3, 4), torch.zeros(3)), r"rows \[N, 2\] and classes \[N\]; got \[3, 4\] and"),
    ((torch.zeros(3, 2), torch.zeros(2)), r"got \[3, 2\] and \[2\]"),
    ((torch.zeros(0, 2), torch.zeros(0)), r"got \[0, 2\] and \[0\]"),
    ((torch.zeros(3, 2), torch.zeros(3)), r"f: validation must be with int64 classes; got"),
]


@pytest.mark.parametrize(("validation", "message"), WRONG)
def test_what_is_refused(validation, message):
    with pytest.raises(ValueError, match=message):
        hold_out("f", torch.zeros(53, 2), Y, validation, 0)
    with pytest.raises(ValueError, match="stratified_split: fraction must be"):
        stratified_split(Y, 1.0, 0)


@pytest.mark.parametrize("validation", [0.2, (torch.zeros(3, 2), torch.zeros(3).long())])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(53, 2), Y.int(), "f: y must be int64; got torch.int32; call .long()"),
        (torch.zeros(53, 2), Y.double(), "f: y must be int64; got torch.float64"),
        (torch.zeros(50, 2), Y, r"f: y must be \[N\] with N = 50; got \[53\]"),
        (torch.zeros(53), Y, r"f: x must be \[N, ...\] with at least one row; got \[53\]"),
    ],
)
def test_rows_that_are_no_rows_are_refused(x, y, message, validation):
    with pytest.raises(ValueError, match=message):
        hold_out("f", x, y, validation, 0)
