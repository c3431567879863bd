"""The recipes against the numbers that were published, at other lengths and batch sizes too."""

import pytest

from landscape_fast.methods import TrainConfig, batch_ensemble_recipe, single_recipe

SHARED = {
    "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": "step",
    "step_factor": 0.2, "warmup_epochs": 1, "label_smoothing": 0.0, "augment": "crop_flip",
    "member_batches": "shared", "fast_weight_decay": 0.0, "seed": 0, "step_epochs": 10,
}  # fmt: skip


def test_the_recipes_are_the_published_ones():
    batch = {"epochs": 250, "milestones": (100, 200, 225), "weight_decay": 6e-4}
    batch |= {"fast_lr_mult": 0.5, "member_bias": "fast"}
    assert batch_ensemble_recipe() == TrainConfig(**SHARED, **batch)
    single = {"epochs": 200, "milestones": (60, 120, 160), "weight_decay": 4e-4}
    assert single_recipe() == TrainConfig(**SHARED, **single)


def test_the_rate_after_each_milestone():
    config = batch_ensemble_recipe()
    rates = [config.lr * config.lr_factor(epoch * 391, 391) for epoch in (1, 99, 100, 200, 225)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.0008])
    assert config.lr_factor(0, 391) == pytest.approx(1 / 392)


@pytest.mark.parametrize("members", [1, 4, 8])
def test_fresh_and_tiled_rows_are_two_names_of_one_batch(members):
    tiled = batch_ensemble_recipe(members=members, tiled_rows=64 * members)
    assert tiled == batch_ensemble_recipe(fresh_rows=64)
    assert (tiled.batch_size, tiled.lr) == (64, 0.05)


def test_milestones_stretch_with_the_run():
    assert batch_ensemble_recipe(epochs=200).milestones == (80, 160, 180)
    assert single_recipe(epochs=10).milestones == (3, 6, 8)
    assert batch_ensemble_recipe(epochs=1).milestones == (1,)


def test_changes_replace_what_the_recipe_says():
    config = batch_ensemble_recipe(l2=1e-4, lr=0.3, seed=7, fast_lr_mult=1.0, schedule="cosine")
    assert (config.weight_decay, config.lr, config.seed) == (2e-4, 0.3, 7)
    assert (config.fast_lr_mult, config.schedule, config.milestones) == (1.0, "cosine", ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fresh_rows": 1, "tiled_rows": 4}, "fresh_rows must be None where tiled_rows is given"),
        ({"tiled_rows": 130}, "tiled_rows must be a positive multiple of members = 4; got 130"),
        ({"members": 0}, "members must be at least 1; got 0"),
        ({"members": True}, "members must be at least 1; got True"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"batch_ensemble_recipe: {message}"):
        batch_ensemble_recipe(**options)
    with pytest.raises(ValueError, match="TrainConfig: batch_size must be"):
        single_recipe(fresh_rows=0)
