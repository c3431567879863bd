"""What functions of images demand of their arguments."""

import torch
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
LEAST = 8  # pixels of a side, those of a JPEG block
_SCALE = 'load them with scale="unit"'


def need(ok: bool, op: str, argument: str, rule: str, got, remedy: str = "") -> None:
    """Raises ValueError in the house style unless `ok`."""
    if not ok:
        remedy = f"; {remedy}" if remedy else ""
        raise ValueError(f"{op}: {argument} must be {rule}; got {got}{remedy}")


def check_severity(op: str, severity: int) -> None:
    """Raises unless it is one of `SEVERITIES`, as an integer."""
    whole = isinstance(severity, int) and not isinstance(severity, bool)
    need(whole and severity in SEVERITIES, op, "severity", "1, 2, 3, 4 or 5", repr(severity))


def check_images(op: str, images: Tensor, least: int = LEAST) -> None:
    """Raises unless they are [N, C, H, W] float32 in [0, 1] of 1 or 3 channels."""
    need(isinstance(images, Tensor), op, "images", "a tensor", type(images).__name__)
    shape = list(images.shape)
    fits = len(shape) == 4 and shape[1] in (1, 3) and min(shape[2:]) >= least
    rule = f"[N, C, H, W] with C 1 or 3 and H, W of at least {least}"
    need(fits, op, "images", rule, shape)
    need(images.dtype == torch.float32, op, "images", "float32 in [0, 1]", images.dtype, _SCALE)
    if images.numel():
        low, high = (float(v) for v in images.aminmax())
        need(0 <= low and high <= 1, op, "images", "in [0, 1]", f"{low:g} to {high:g}", _SCALE)


def positions(op: str, images: Tensor, index: Tensor | None) -> Tensor:
    """[N] int64 on the device of the images: `index`, or 0, 1, ..."""
    count = len(images)
    if index is None:
        return torch.arange(count, device=images.device)
    known = isinstance(index, Tensor)
    fits = known and index.dtype == torch.int64 and index.shape == (count,)
    got = f"{index.dtype} {list(index.shape)}" if known else repr(index)
    need(fits, op, "index", f"[N] int64 for N = {count} images", got)
    return index.to(images.device)
