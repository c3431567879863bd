"""Parameter shapes of whole networks, for benches over all tensors of a network."""


def _conv(into, out, size):
    return [(out, into, size, size)]


def _norm(width):
    return [(width,), (width,)]


def resnet20() -> list[tuple[int, ...]]:
    """ResNet-20 for CIFAR-10, 0.27 M parameters (He et al. 2015, projection-free shortcuts)."""
    shapes = _conv(3, 16, 3) + _norm(16)
    into = 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += _conv(into, width, 3) + _norm(width) + _conv(width, width, 3) + _norm(width)
            into = width
    return shapes + [(10, 64), (10,)]


def resnet50() -> list[tuple[int, ...]]:
    """ResNet-50 for ImageNet, 25.6 M parameters, 161 tensors."""
    shapes = _conv(3, 64, 7) + _norm(64)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv(into, width, 1) + _norm(width) + _conv(width, width, 3) + _norm(width)
            shapes += _conv(width, 4 * width, 1) + _norm(4 * width)
            if block == 0:
                shapes += _conv(into, 4 * width, 1) + _norm(4 * width)
            into = 4 * width
    return shapes + [(1000, 2048), (1000,)]


def wrn_28_10() -> list[tuple[int, ...]]:
    """Wide ResNet 28-10 for CIFAR-10, 36.5 M parameters."""
    shapes = _conv(3, 16, 3)
    into = 16
    for width in (160, 320, 640):
        for block in range(4):
            shapes += _norm(into) + _conv(into, width, 3) + _norm(width) + _conv(width, width, 3)
            if block == 0:
                shapes += _conv(into, width, 1)
            into = width
    return shapes + _norm(640) + [(10, 640), (10,)]


def tiny() -> list[tuple[int, ...]]:
    """Three odd tensors."""
    return [(3, 5), (7,), (2, 3, 2)]


NETWORKS = {
    "resnet20": resnet20,
    "resnet50": resnet50,
    "wrn_28_10": wrn_28_10,
    "tiny": tiny,
}
