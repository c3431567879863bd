"""Images that a network was not trained on: made from those it knows, or fitted from others.

Nothing here needs a file. Where no other data set is at hand, `inverted`, `patch_shuffled` and
`noise_like` stand in for one; how well they are told from the real images is not comparable with
published numbers for SVHN.
"""

import torch
from torch import Tensor

from landscape_fast.data._checks import check_images, need, positions
from landscape_fast.data._draws import Draws
from landscape_fast.data._pixels import chunks, luma
from landscape_fast.data.dataset import Dataset


def inverted(images: Tensor) -> Tensor:
    """Negatives, 1 - x, of images [N, C, H, W] float32 in [0, 1].

    Example:
        >>> float(inverted(torch.full((1, 1, 8, 8), 0.25)).mean())
        0.75
    """
    check_images("inverted", images)
    return 1 - images


def patch_shuffled(
    images: Tensor, patches: int = 4, *, seed: int = 0, index: Tensor | None = None
) -> Tensor:
    """Each image cut into squares that are put back in a random order: textures without shapes.

    Args:
        images: [N, C, H, W] float32 in [0, 1].
        patches: along each side; H and W must be multiples of it.
        seed: of the orders.
        index: [N] int64, the positions of the images in their data set, as for `corrupt`.

    Returns:
        [N, C, H, W]; the values of each channel of an image are those it had.

    Raises:
        ValueError: if an argument is not as said.

    Example:
        >>> x = torch.arange(256.0).view(1, 1, 16, 16) / 255
        >>> torch.equal(patch_shuffled(x).flatten().sort().values, x.flatten())
        True
    """
    op = "patch_shuffled"
    check_images(op, images)
    n, c, h, w = images.shape
    fits = isinstance(patches, int) and patches > 0 and h % patches == 0 == w % patches
    need(fits, op, "patches", f"a divisor of both sides, {h} and {w}", repr(patches))
    draws = Draws(seed, op, positions(op, images, index))
    # The position breaks ties, so that the order never depends on how equal numbers are sorted.
    squares = torch.arange(patches**2, device=images.device)
    order = ((draws.bits(patches**2) << 24) + squares).argsort(1)
    cut = images.reshape(n, c, patches, h // patches, patches, w // patches)
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    moved = cut.gather(1, order[:, :, None].expand_as(cut))
    moved = moved.view(n, patches, patches, c, h // patches, w // patches)
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def noise_like(images: Tensor, *, seed: int = 0, index: Tensor | None = None) -> Tensor:
    """Uniform noise in [0, 1) of the shape of `images` [N, C, H, W], whose values do not matter.

    Args:
        images: [N, C, H, W] float32 in [0, 1].
        seed: of the noise.
        index: [N] int64, the positions of the images in their data set, as for `corrupt`.

    Returns:
        [N, C, H, W] float32 on the device of `images`.

    Raises:
        ValueError: if an argument is not as said.

    Example:
        >>> noise_like(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    check_images("noise_like", images)
    index, out = positions("noise_like", images, index), torch.empty_like(images)
    for place, at in chunks(out, index):
        place.copy_(Draws(seed, "noise_like", at).uniform(*images.shape[1:]))
    return out


def as_ood(images: Tensor, like: Dataset | Tensor) -> Tensor:
    """Images of one data set in the shape of another, so that its network can be shown them.

    Grey images get three equal channels, colour images turn to grey (luma of Rec. 601), and sizes
    are fitted by linear interpolation, averaged over what a new pixel covers when shrinking. To
    standardise them, use the mean and deviation of the training data of the network.

    Args:
        images: [N, C, H, W] float32 in [0, 1].
        like: a data set, or images [*, C', H', W'].

    Returns:
        [N, C', H', W'] float32 in [0, 1].

    Raises:
        ValueError: if an argument is not as said.

    Example:
        >>> as_ood(torch.rand(2, 1, 28, 28), torch.zeros(1, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    check_images("as_ood", images, 1)
    known = isinstance(like, Dataset) or isinstance(like, Tensor) and like.ndim == 4
    need(known, "as_ood", "like", "a Dataset or images [*, C, H, W]", type(like).__name__)
    channels, *size = like.image if isinstance(like, Dataset) else like.shape[1:]
    need(channels in (1, 3), "as_ood", "like", "images of 1 or 3 channels", f"{channels}")
    if channels == 1:
        images = luma(images)
    if list(images.shape[2:]) != list(size):
        images = torch.nn.functional.interpolate(
            images, size, mode="bilinear", align_corners=False, antialias=True
        ).clamp_(0, 1)
    return images.expand(-1, channels, -1, -1).contiguous()
