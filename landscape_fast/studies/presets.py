"""Settings of the comparison study, readable without importing torch."""

METHODS = ("single", "deep", "batch")
DATA = ("digits", "cifar10", "mnist")
NORMED = (  # models with norms, which members can share or not
    "resnet20",
    "cresnet20",
    "preresnet20",
    "preresnet110",
    "preresnet164",
    "wrn_28_10",
    "resnet50_v2",
)
MODELS = ("mlp", "lenet", "small_cnn", "medium_cnn", "vgg16", *NORMED)
NORMS = ("shared", "member")
PIXELS = ("standardized", "unit", "raw")
FAST_INITS = ("random_sign", "normal", "ones")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "step", "hold_linear")
MEMBER_BIAS = ("slow", "fast")
MEMBER_BATCHES = ("shared", "own")
AUGMENTS = ("none", "crop_flip")
RECIPES = ("batch_ensemble", "single")
SUBSPACES = ("line", "simplex", "bezier", "polychain")
CURVES = ("bezier", "polychain")
CYCLES = ("fge", "snapshot")
MODEL_OF = {"digits": "mlp", "cifar10": "medium_cnn", "mnist": "small_cnn"}

# Recipe of the convolutional networks of Fort et al. 2019 (arXiv:1912.02757), as in the authors'
# notebook, which also feeds raw pixels.
_FORT = {
    "epochs": 40,
    "batch_size": 128,
    "optimizer": "adam",
    "lr": 1.6e-3,
    "schedule": "step",
    "step_epochs": 10,
    "step_factor": 0.5,
}

# For digits: no dropout or weight decay, so that ensembling is the only thing compared (a wider
# network with dropout was seen to leave an ensemble nothing to gain on the test images). The
# learning rate is the best of 1e-3, 2e-3 and 5e-3 by the loss on every fifth training image of each
# class, held out, over three seeds; the test images had no part in that.
TRAINING = {
    "digits": {
        "epochs": 40,
        "batch_size": 64,
        "optimizer": "adam",
        "lr": 5e-3,
        "schedule": "cosine",
    },
    "cifar10": _FORT,
    "mnist": {**_FORT, "epochs": 12, "step_epochs": 3},
}
# Test rows per forward pass: one activation of a BatchEnsemble of 4 then takes at most 270 MB.
EVALUATION_ROWS = {
    "resnet20": 500,
    "cresnet20": 500,
    "preresnet20": 500,
    "preresnet110": 250,
    "preresnet164": 250,
    "wrn_28_10": 100,
    "resnet50_v2": 50,
    "vgg16": 250,
}
MLP = {
    "digits": {"hidden": (128, 128), "dropout": 0.0},
    "cifar10": {"hidden": (512, 512), "dropout": 0.2},
    "mnist": {"hidden": (512, 512), "dropout": 0.2},
}
