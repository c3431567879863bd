"""The handwritten digits that come with scikit-learn: real data without a download."""

import numpy as np
import torch

from landscape_fast.data.dataset import Dataset, check_scale, scaled

_TEST_EVERY = 5


def digits(*, scale: str = "unit") -> Dataset:
    """1,797 images of digits, 1 x 8 x 8, by 13 writers (UCI optdigits, its test part).

    Every fifth image of each class is for testing, so the split is stratified, the same everywhere
    and always: 1,442 to train, 355 to test. Writers appear in both parts.

    Args:
        scale: "unit" for float32 in [0, 1], "raw" for float32 in [0, 16], "uint8" for the integers
            0 to 16 as stored.

    Returns:
        A `Dataset` with images in the order of scikit-learn.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for another `scale`.

    Example:
        >>> digits().test_x.shape
        torch.Size([355, 1, 8, 8])
    """
    check_scale("digits", scale)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits: scikit-learn must be installed, its wheel holds the images; "
            f"got {error}; pip install scikit-learn"
        ) from error
    found = load_digits()
    pixels = torch.from_numpy(found.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(found.target.astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[(labels == label).nonzero()[_TEST_EVERY - 1 :: _TEST_EVERY, 0]] = True
    x = scaled(pixels, scale, 16)
    classes = tuple(str(name) for name in found.target_names)
    return Dataset(x[~test], labels[~test], x[test], labels[test], classes, "digits")
