"""Which rows a step sees, against the definition row by row."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from methods.problem import CONFIG, MEMBERS, ROWS, batch_ensemble, plain, rows
from torch import nn

from landscape_fast.methods import fit
from landscape_fast.methods.batches import Batches, crop_flip
from landscape_fast.methods.seeds import epoch_order
from landscape_fast.methods.trainer import count_members
from landscape_fast.nn import BatchEnsembleLinear, FoldedEnsemble, convert_

OWN = dataclasses.replace(CONFIG, member_batches="own")
CROPS = dataclasses.replace(CONFIG, augment="crop_flip")


def opened(config, members, epoch=0, stream=0, x=None):
    batches = Batches(torch.arange(ROWS) if x is None else x, torch.arange(ROWS), config, stream,
                      members)  # fmt: skip
    batches.open(epoch)
    return batches


def test_a_shared_epoch_is_a_permutation_in_batches():
    batches = opened(CONFIG, 0, epoch=2, stream=1)
    assert [len(batches[i][1]) for i in range(len(batches))] == [16, 16, 16, 2]
    seen = torch.cat([batches[i][0] for i in range(4)])
    assert torch.equal(seen, epoch_order(ROWS, CONFIG.seed, 1, 2))
    assert torch.equal(seen.sort().values, torch.arange(ROWS))


def test_every_member_draws_its_own_permutation():
    batches = opened(OWN, MEMBERS)
    assert [list(batches[i][0].shape) for i in (0, 3)] == [[MEMBERS, 16], [MEMBERS, 2]]
    seen = torch.cat([batches[i][0] for i in range(4)], 1)
    assert torch.equal(torch.cat([batches[i][1] for i in range(4)], 1), seen)
    assert torch.equal(seen.sort(1).values, torch.arange(ROWS).expand(MEMBERS, -1))
    others = [opened(CONFIG, 0), opened(OWN, MEMBERS, epoch=1), opened(OWN, MEMBERS, stream=1)]
    orders = [*seen, *(torch.cat([o[i][0].view(-1, o[i][1].shape[-1])[0] for i in range(4)])
                       for o in others)]  # fmt: skip
    for i in range(len(orders)):
        for j in range(i):
            assert (orders[i] == orders[j]).sum() < ROWS / 4
    # the first members of a larger ensemble see what those of a smaller one see
    more = opened(OWN, MEMBERS + 1)
    assert torch.equal(more[0][0][:MEMBERS], batches[0][0])


@pytest.mark.parametrize("shape", [(8, 2, 5, 7), (2, 1, 3, 3), (0, 3, 8, 8)])
def test_crops_and_flips_row_by_row(shape):
    x = torch.randn(shape)
    shifts, flips = torch.randint(-4, 5, (shape[0], 2)), torch.arange(shape[0]) % 2 == 0
    got = crop_flip(x, shifts, flips)
    assert got.shape == x.shape
    for n in range(shape[0]):
        down, right = (shifts[n] + 4).tolist()
        padded = F.pad(x[n], (4, 4, 4, 4))
        crop = padded[:, down : down + shape[2], right : right + shape[3]]
        assert torch.equal(got[n], crop.flip(-1) if flips[n] else crop)


@pytest.mark.parametrize("members", [0, MEMBERS])
def test_every_row_of_an_epoch_is_changed_by_its_own_draw(members):
    """The images are told apart by a number in every pixel: it and the zeros give the shift."""
    images = torch.arange(1.0, ROWS + 1).view(ROWS, 1, 1, 1).expand(ROWS, 2, 9, 9)
    marked = images.clone()
    marked[:, 1, :, :4] *= -1  # the second channel shows a flip
    config = dataclasses.replace(CROPS, member_batches="own" if members else "shared")
    batches = opened(config, members, x=marked)
    shifts, flips = [], 0
    for i in range(len(batches)):
        x, y = batches[i]
        assert x.shape == (*y.shape, 2, 9, 9)
        for image, row in zip(x.flatten(0, -4), y.flatten().tolist(), strict=True):
            inside = image[0] != 0
            assert (image[0][inside] == row + 1).all()
            shifts.append((int(inside.any(1).sum()), int(inside.any(0).sum())))
            signs = image[1, inside.any(1).nonzero()[0, 0]][inside.any(0)]
            flips += int(signs[-1] < 0)
    assert len(shifts) == max(1, members) * ROWS
    assert {h for h, _ in shifts} == {w for _, w in shifts} == {5, 6, 7, 8, 9}
    # of n fair draws; 4 deviations
    assert abs(flips - len(shifts) / 2) < 2 * len(shifts) ** 0.5


def test_the_same_crops_every_time_and_others_next_epoch():
    x = torch.randn(1, 1, 8, 8).expand(ROWS, 1, 8, 8)  # the order of the rows makes no difference
    first, again, later = (opened(CROPS, 0, epoch=e, x=x)[0][0] for e in (0, 0, 1))
    assert torch.equal(first, again)
    same = (first == later).flatten(1).all(1)
    assert same.sum() < 3  # of 16 rows, each with 162 crops


def test_crops_need_images():
    with pytest.raises(ValueError, match=r"fit: x must be images \[N, C, H, W\] with augment 'cro"):
        fit(plain(), *rows(), CROPS, progress=False)


def folded():
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    return FoldedEnsemble(convert_(net, MEMBERS, layout="folded", r_init="normal"), MEMBERS)


def member_major():
    return nn.Sequential(
        BatchEnsembleLinear(2, 8, MEMBERS, r_init="normal"),
        nn.ReLU(),
        BatchEnsembleLinear(8, 3, MEMBERS, r_init="normal"),
    )


@pytest.mark.parametrize("build", [folded, member_major])
def test_with_own_batches_each_member_learns_its_own_rows(build):
    """One step of SGD against the loss of each member on its own rows, added by hand."""
    x, y = rows()
    torch.manual_seed(0)
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    config = dataclasses.replace(
        OWN, epochs=1, batch_size=ROWS // 2, optimizer="sgd", momentum=0.0, weight_decay=0.0,
        warmup_epochs=0, schedule="constant", lr=0.1,
    )  # fmt: skip
    order = epoch_order(ROWS, config.seed, 0, 0, MEMBERS)
    history = fit(model, x, y, config, progress=False)
    losses, right = [], []
    for half in order.split(ROWS // 2, 1):
        loss = 0.0
        for m in range(MEMBERS):
            logits = twin(x[half[m]])[m]
            loss = loss + F.cross_entropy(logits, y[half[m]]) / MEMBERS
            right.append((logits.argmax(1) == y[half[m]]).float().mean())
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, gradient in zip(twin.parameters(), gradients, strict=True):
                p -= 0.1 * gradient
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert history[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()))
    assert history[0]["accuracy"] == pytest.approx(float(torch.stack(right).mean()))


def test_a_plain_network_is_its_only_member():
    torch.manual_seed(0)
    models = [plain(), plain()]
    models[1].load_state_dict(models[0].state_dict())
    for model, config in zip(models, (CONFIG, OWN), strict=True):
        fit(model, *rows(), config, progress=False)
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_members_are_counted_without_changing_the_model():
    x, _ = rows()
    models = {batch_ensemble(): MEMBERS, folded(): MEMBERS, plain(): 0}
    state = torch.get_rng_state()
    for model, members in models.items():
        assert count_members(model, x) == members and model.training
    assert torch.equal(torch.get_rng_state(), state)  # no dropout was drawn
