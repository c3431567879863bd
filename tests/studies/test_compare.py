import dataclasses
import math

import pytest
import torch

from landscape_fast.data import Dataset
from landscape_fast.methods import TrainConfig, predict, train_deep_ensemble
from landscape_fast.nn import ensemble_layers
from landscape_fast.ops import ensemble_summary
from landscape_fast.studies import presets
from landscape_fast.studies.compare import Problem, compare

CONFIG = TrainConfig(epochs=2, batch_size=32, lr=0.01, seed=1)


def images(size=8, channels=1, classes=4, test=60):
    """Noisy images whose class is the bright quarter: small, but not trivial."""
    generator = torch.Generator().manual_seed(0)

    def part(rows):
        y = torch.arange(rows) % classes
        x = torch.randn(rows, channels, size, size, generator=generator)
        half = size // 2
        for n, label in enumerate(y.tolist()):
            top, left = divmod(label, 2)
            x[n, :, top * half : (top + 1) * half, left * half : (left + 1) * half] += 0.7
        return x, y

    names = tuple("abcd"[:classes])
    return Dataset(*part(96), *part(test), names, "quarters")


@pytest.fixture(scope="module")
def results():
    return compare(Problem(members=3), images(), presets.METHODS, CONFIG, progress=False)


def test_every_method_has_a_row_measured_on_its_logits(results):
    dataset = images()
    assert list(results) == ["single", "deep", "batch"]
    for method, result in results.items():
        row, members = result.row, 1 if method == "single" else 3
        assert (row["method"], row["members"]) == (method, members)
        assert result.logits.shape == (members, 60, 4)
        summary = ensemble_summary(result.logits, dataset.test_y)
        for key in ("accuracy", "nll", "brier", "ece"):
            assert row[key] == float(getattr(summary, key))
        mean = result.logits.softmax(-1).mean(0)
        assert row["accuracy"] == pytest.approx(
            float((mean.argmax(1) == dataset.test_y).double().mean())
        )
        assert row["member_accuracy"] == pytest.approx(
            float((result.logits.argmax(-1) == dataset.test_y).double().mean())
        )
        assert row["seconds"] == pytest.approx(
            sum(epoch["seconds"] for history in result.histories for epoch in history)
        )
        if method == "single":
            assert row["disagreement"] is row["js"] is row["mutual_information"] is None
        else:
            labels = result.logits.argmax(-1)
            pairs = [(labels[i] != labels[j]).double().mean() for i in range(3) for j in range(i)]
            assert row["disagreement"] == pytest.approx(float(sum(pairs)) / 3)
            assert 0 < row["js"] < math.log(2)


def test_the_single_network_is_the_first_member_of_the_deep_ensemble(results):
    assert torch.equal(results["single"].logits[0], results["deep"].logits[0])
    assert results["single"].histories[0] is results["deep"].histories[0]
    alone = compare(Problem(members=3), images(), ["single"], CONFIG, progress=False)
    assert torch.equal(alone["single"].logits, results["single"].logits)
    assert list(alone) == ["single"]


def test_parameters_are_counted(results):
    plain = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 4 + 4
    factors = 3 * (64 + 128 + 128 + 128 + 128 + 4)
    biases = 2 * (128 + 128 + 4)
    assert results["single"].row["parameters"] == plain
    assert results["deep"].row["parameters"] == 3 * plain
    assert results["batch"].row["parameters"] == plain + factors + biases


def test_training_worked(results):
    """Four classes: chance is 0.25."""
    for result in results.values():
        assert result.row["accuracy"] > 0.6


def test_the_study_is_the_library_call():
    """What the study reports for `deep` is what a user gets from train_deep_ensemble."""
    dataset, problem = images(), Problem(members=2)
    result = compare(problem, dataset, ["deep"], CONFIG, progress=False)["deep"]
    trained = train_deep_ensemble(
        lambda: problem.network(dataset, ensemble=False),
        dataset.train_x,
        dataset.train_y,
        CONFIG,
        members=2,
        progress=False,
    )
    assert torch.equal(predict(trained.model, dataset.test_x), result.logits)


@pytest.mark.parametrize("model", presets.MODELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_model_is_built_for_the_data(model, channels):
    dataset = images(size=16, channels=channels)
    problem = Problem(model=model, members=2)
    x = dataset.test_x[:3]
    assert problem.network(dataset, ensemble=False)(x).shape == (3, 4)
    network = problem.network(dataset, ensemble=True)
    assert network(x).shape == (2, 3, 4)
    plain = [m for m in network.modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert not plain and ensemble_layers(network)


def test_members_of_a_resnet_share_norms_or_not():
    for norm, shape in (("shared", (16,)), ("member", (2, 16))):
        problem = Problem(model="resnet20", members=2, norm=norm)
        assert problem.network(images(), ensemble=True).norm.weight.shape == shape
        assert problem.network(images(), ensemble=False).norm.weight.shape == (16,)


def test_some_training_rows():
    pytest.importorskip("sklearn")
    few, all_of_them = Problem(train_rows=50).load(), Problem().load()
    assert few.train_x.shape[0] == 50 and torch.equal(few.train_y, all_of_them.train_y[:50])
    assert len(few.test_y) == len(all_of_them.test_y)


@pytest.mark.parametrize("init", presets.FAST_INITS)
def test_factors_start_as_told(init):
    network = Problem(fast_init=init, members=2).network(images(), ensemble=True)
    for layer in ensemble_layers(network).values():
        for factor in (layer.r, layer.s):
            if init == "ones":
                assert (factor == 1).all()
            elif init == "random_sign":
                assert (factor.abs() == 1).all() and not (factor[0] == factor[1]).all()
            else:
                assert factor.unique().numel() == factor.numel()


def test_digits_are_loaded_in_the_scale_asked_for():
    pytest.importorskip("sklearn")
    standardized = Problem().load()
    assert float(standardized.train_x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(standardized.train_x.std()) == pytest.approx(1, abs=1e-3)
    assert float(Problem(pixels="unit").load().train_x.max()) == 1.0
    assert float(Problem(pixels="raw").load().train_x.max()) == 16.0


BAD = [
    ({"data": "stl10"}, r"Problem: data must be one of \('digits', .*; got 'stl10'"),
    ({"model": "vgg"}, "Problem: model must be one of"),
    ({"fast_init": "zeros"}, "Problem: fast_init must be one of"),
    ({"pixels": "log"}, "Problem: pixels must be one of"),
    ({"norm": "member"}, r"must be one of \('shared',\); got 'member'; mlp has no norms"),
    ({"norm": "layer", "model": "resnet20"}, r"norm must be one of \('shared', 'member'\)"),
    ({"members": True}, "Problem: members must be an integer of at least 1; got True"),
    ({"members": 0}, "Problem: members must be an integer of at least 1; got 0"),
    ({"data": "mnist"}, "Problem: root must be the folder of the mnist files; got None"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_a_problem_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Problem(**settings)


@pytest.mark.parametrize("methods", [[], ["deep", "swag"]])
def test_unknown_methods_are_refused(methods):
    with pytest.raises(ValueError, match="compare: methods must be some of"):
        compare(Problem(), images(), methods, CONFIG)


def test_presets_agree_with_what_they_configure():
    from landscape_fast.methods import config, recipes
    from landscape_fast.nn.init import NAMED

    assert presets.OPTIMIZERS == config.OPTIMIZERS and presets.SCHEDULES == config.SCHEDULES
    assert presets.MEMBER_BIAS == config.MEMBER_BIAS and presets.AUGMENTS == config.AUGMENTS
    assert presets.MEMBER_BATCHES == config.MEMBER_BATCHES
    assert presets.RECIPES == tuple(recipes.RECIPES)
    assert set(presets.FAST_INITS) == set(NAMED)
    assert set(presets.TRAINING) == set(presets.MLP) == set(presets.MODEL_OF) == set(presets.DATA)
    assert set(presets.MODEL_OF.values()) <= set(presets.MODELS)
    for settings in presets.TRAINING.values():
        assert dataclasses.asdict(TrainConfig(**settings)).items() >= settings.items()
