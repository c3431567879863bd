"""The tables that scikit-learn ships, split and scaled for a network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from landscape_fast.ops._checks import require

TABLES = ("breast_cancer", "wine", "digits", "diabetes")
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Table:
    """One split of a table.

    Attributes:
        name: of `TABLES`.
        x: part to rows [N, columns], float32.
        y: part to classes [N], int64; or to values [N], float32, with mean 0 and deviation 1 on
            the training rows.
        classes: C, or 0 for a regression.
        scale: of a regression: what one unit of y is in the units of the table; else 1.
    """

    name: str
    x: dict[str, Tensor]
    y: dict[str, Tensor]
    classes: int
    scale: float = 1.0

    @property
    def columns(self) -> int:
        """Inputs of a network."""
        return self.x["train"].shape[1]

    @property
    def outputs(self) -> int:
        """Outputs of a network."""
        return self.classes or 1


def load_table(name: str, seed: int = 0) -> Table:
    """60 % training, 20 % validation and 20 % test rows; classes in the same shares in each.

    The columns are mapped to normal quantiles, fitted on the training rows with a trace of noise,
    as in the paper; those of digits, most of them constant, are standardised.

    Args:
        name: "breast_cancer" (569 rows, 30 columns, 2 classes), "wine" (178, 13, 3), "digits"
            (1797, 64, 10) or "diabetes" (442, 10, regression).
        seed: of the split.

    Raises:
        ValueError: for an unknown name.
        ImportError: without scikit-learn.
    """
    require(name in TABLES, "load_table", "name", f"one of {TABLES}", repr(name))
    import numpy as np

    try:
        from sklearn import datasets, model_selection, preprocessing
    except ImportError as error:
        raise ImportError(
            "load_table: scikit-learn must be installed, its wheel holds the tables; "
            f"got {error}; pip install scikit-learn"
        ) from error

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    regression = name == "diabetes"
    options = {"random_state": seed, "test_size": 0.2}
    classes = None if regression else y
    x_rest, x_test, y_rest, y_test = model_selection.train_test_split(
        x, y, stratify=classes, **options
    )
    options["test_size"] = 0.25
    classes = None if regression else y_rest
    x_train, x_val, y_train, y_val = model_selection.train_test_split(
        x_rest, y_rest, stratify=classes, **options
    )
    if name == "digits":
        scaler, noise = preprocessing.StandardScaler(), 0.0
    else:
        quantiles = max(min(len(x_train) // 30, 1000), 10)
        scaler = preprocessing.QuantileTransformer(
            n_quantiles=quantiles, output_distribution="normal", random_state=seed
        )
        noise = 1e-5
    rng = np.random.default_rng(seed)
    scaler.fit(x_train + noise * x_train.std(0) * rng.standard_normal(x_train.shape))
    xs = (torch.tensor(scaler.transform(part)).float() for part in (x_train, x_val, x_test))
    mean, scale = (float(y_train.mean()), float(y_train.std())) if regression else (0.0, 1.0)
    ys = [torch.tensor(part) for part in (y_train, y_val, y_test)]
    ys = [((part - mean) / scale).float() if regression else part.long() for part in ys]
    count = 0 if regression else int(y.max()) + 1
    parts = dict(zip(PARTS, xs, strict=True)), dict(zip(PARTS, ys, strict=True))
    return Table(name, *parts, count, scale)
