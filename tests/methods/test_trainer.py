import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from methods.problem import CONFIG, ROWS, STEPS, batch_ensemble, plain, rows
from torch import nn

from landscape_fast.methods import TrainConfig, fit, gibbs_cross_entropy, predict
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.seeds import epoch_order


def test_the_loss_is_the_mean_over_members_of_the_plain_loss():
    logits, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    expected = torch.stack([F.cross_entropy(member, y) for member in logits]).mean()
    torch.testing.assert_close(gibbs_cross_entropy(logits, y), expected)
    torch.testing.assert_close(gibbs_cross_entropy(logits[0], y), F.cross_entropy(logits[0], y))
    smooth = torch.stack([F.cross_entropy(m, y, label_smoothing=0.2) for m in logits]).mean()
    torch.testing.assert_close(gibbs_cross_entropy(logits, y, 0.2), smooth)
    # Jensen: the mean prediction always has the smaller loss
    mean = F.nll_loss(logits.softmax(-1).mean(0).log(), y)
    assert mean < gibbs_cross_entropy(logits, y)


def test_training_is_the_textbook_loop():
    """SGD by hand on the rows in the order of the seed, with the schedule's learning rates."""
    x, y = rows()
    config = TrainConfig(
        epochs=2, batch_size=16, optimizer="sgd", momentum=0.0, lr=0.1, schedule="cosine", seed=3
    )
    model, twin = nn.Linear(2, 3), nn.Linear(2, 3)
    twin.load_state_dict(model.state_dict())
    history = fit(model, x, y, config, stream=2, progress=False)
    step = 0
    for epoch in range(2):
        losses, right = [], 0
        for batch in epoch_order(ROWS, 3, 2, epoch).split(16):
            lr = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 8))
            logits = twin(x[batch])
            loss = F.cross_entropy(logits, y[batch])
            losses += [float(loss.detach())] * len(batch)
            right += int((logits.argmax(1) == y[batch]).sum())
            for p, gradient in zip(
                twin.parameters(), torch.autograd.grad(loss, twin.parameters()), strict=True
            ):
                p.data -= lr * gradient
            step += 1
        assert history[epoch]["accuracy"] == right / ROWS
        assert history[epoch]["loss"] == pytest.approx(sum(losses) / ROWS)
        assert history[epoch]["lr"] == pytest.approx(lr)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("build", [plain, batch_ensemble])
def test_training_learns(build):
    x, y = rows()
    model = build_member(build, CONFIG, 0, "cpu")
    history = fit(model, x, y, dataclasses.replace(CONFIG, epochs=20), progress=False)
    assert [record["epoch"] for record in history] == list(range(1, 21))
    assert history[-1]["loss"] < history[0]["loss"]
    logits = predict(model, x)
    assert not model.training
    # the classes lie three standard deviations apart
    assert (logits.softmax(-1).mean(0).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("build", [plain, batch_ensemble])
def test_same_seed_same_bits_and_the_callers_generator_untouched(build):
    x, y = rows()
    states, histories = [], []
    for disturbance in (11, 12):
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        model = build_member(build, CONFIG, 0, "cpu")
        history = fit(model, x, y, CONFIG, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
        histories.append([(record["loss"], record["accuracy"]) for record in history])
    assert histories[0] == histories[1]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_another_seed_or_stream_is_another_run():
    x, y = rows()

    def train(seed, stream):
        config = dataclasses.replace(CONFIG, seed=seed)
        model = build_member(plain, config, stream, "cpu")
        fit(model, x, y, config, stream=stream, progress=False)
        return model[0].weight

    weights = [train(0, 0), train(1, 0), train(0, 1)]
    for i in range(3):
        for j in range(i):
            assert not torch.allclose(weights[i], weights[j], atol=0.1)


def test_on_step_counts_every_step():
    x, y = rows()
    seen = []
    fit(plain(), x, y, CONFIG, progress=False, on_step=seen.append)
    assert seen == list(range(1, STEPS + 1))


def test_a_diverging_run_ends_with_a_reason():
    x, y = rows()
    config = TrainConfig(epochs=2, batch_size=16, optimizer="sgd", lr=1e30)
    with pytest.raises(
        RuntimeError,
        match=r"loss must be finite; got .* in epoch \d of big: .*; "
        r"lower the learning rate \(now 1e\+30\)",
    ):
        fit(
            nn.Sequential(nn.Linear(2, 9), nn.Linear(9, 3)),
            x,
            y,
            config,
            label="big: a",
            progress=False,
        )


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"fit: x must be \[N, ...\]"),
        (
            torch.zeros(0, 2),
            torch.zeros(0).long(),
            r"fit: x must be .* at least one row; got \[0, 2\]",
        ),
        (torch.zeros(4, 2), torch.zeros(3).long(), r"fit: y must be \[N\] with N = 4; got \[3\]"),
        (torch.zeros(4, 2), torch.zeros(4), r"fit: y must be int64; got torch.float32"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit(plain(), x, y, CONFIG, progress=False)


def test_predict_joins_batches_and_leaves_the_mode():
    x, _ = rows()
    model = batch_ensemble().train()
    parts = predict(model, x, batch_size=7)
    assert model.training and not parts.requires_grad
    torch.testing.assert_close(parts, model.eval()(x))
    single = plain().eval()
    torch.testing.assert_close(predict(single, x, batch_size=7), single(x)[None])
    with pytest.raises(ValueError, match="predict: x must be .* at least one row"):
        predict(single, x[:0])
