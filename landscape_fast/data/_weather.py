"""Weather and liquids of CIFAR-10-C; images [n, C, H, W] in [0, 1]."""

import torch
from torch import Tensor

from landscape_fast.data._blurs import blurred_along
from landscape_fast.data._draws import Draws
from landscape_fast.data._liquid import emboss_of_drops
from landscape_fast.data._pixels import gaussian, luma, zoomed

_WATER, _MUD = (175, 238, 238), (63, 42, 20)  # red, green, blue
# Mean colours of the authors' five photographs of frost at the scale at which they are used (every
# fifth pixel), and the standard deviation of their brightness within 32 x 32 pixels.
_FROST = (
    ((0.30, 0.58, 0.65), 0.061),
    ((0.78, 0.80, 0.83), 0.071),
    ((0.78, 0.80, 0.83), 0.071),
    ((0.56, 0.62, 0.67), 0.103),
    ((0.41, 0.45, 0.50), 0.134),
)


def snow(x: Tensor, parameters: tuple, draws: Draws) -> Tensor:
    """Bright streaks, falling in two directions, over an image that is whitened.

    `parameters`: mean and deviation of the noise that flakes are made of, its enlargement, the
    least value that is a flake, radius and sigma of their blur, and the share of the image.
    """
    mean, deviation, enlarged, least, radius, sigma, kept = parameters
    flakes = zoomed(draws.normal(1, *x.shape[2:]) * deviation + mean, enlarged)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp_(0, 1)
    flakes = blurred_along(flakes, radius, sigma, (-135, -45), draws)
    whitened = torch.maximum(x, luma(x) * 1.5 + 0.5)
    return x * kept + whitened * (1 - kept) + (flakes + flakes.flip(2, 3))


def fog(x: Tensor, parameters: tuple[float, float], draws: Draws) -> Tensor:
    """A plasma cloud is added, and the sum scaled so that its range stays."""
    thickness, decay = parameters
    cloud = plasma(x.shape[2:], decay, draws)
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + cloud * thickness) * (most / (most + thickness))


def plasma(size: tuple[int, int], decay: float, draws: Draws) -> Tensor:
    """[n, 1, *size] in [0, 1]: midpoint displacement (diamond-square) on a torus.

    Args:
        decay: how much smaller the bound of the displacements is from one level to the next; they
            are uniform between plus and minus its square.
    """
    side = 1 << (max(size) - 1).bit_length()
    step, bound = side, 100.0
    field = torch.zeros(draws.count, 1, 1, device=draws.device)

    def displaced(total: Tensor) -> Tensor:
        return total / 4 + (draws.uniform(*total.shape[1:]) * 2 - 1) * bound**2

    while step > 1:
        # [n, k, k] corners; squares get their middles, then the middles of sides come from both.
        across = field + field.roll(-1, 1)
        middle = displaced(across + across.roll(-1, 2))
        right = middle + middle.roll(1, 1) + field + field.roll(-1, 2)
        down = middle + middle.roll(1, 2) + field + field.roll(-1, 1)
        k = 2 * field.shape[1]
        finer = field.new_empty(len(field), k, k)
        finer[:, ::2, ::2], finer[:, 1::2, 1::2] = field, middle
        finer[:, ::2, 1::2], finer[:, 1::2, ::2] = displaced(right), displaced(down)
        field, step, bound = finer, step // 2, bound / decay
    field = field - field.amin((1, 2), keepdim=True)
    field = field / field.amax((1, 2), keepdim=True)
    return field[:, None, : size[0], : size[1]]


def frost(x: Tensor, parameters: tuple[float, float], draws: Draws) -> Tensor:
    """Ice over a darkened image: `parameters` are the shares of the image and of the ice.

    The authors cut the ice out of five photographs. This is a substitute for them: needles of noise
    blurred along two random lines, and a cloud, with the colours, the contrast and the grain of the
    photographs.
    """
    kept, added = parameters
    return x * kept + ice(x.shape[1], x.shape[2:], draws) * added


def ice(channels: int, size: tuple[int, int], draws: Draws) -> Tensor:
    """[n, channels, *size] in [0, 1], the texture of `frost`."""
    colours = torch.tensor([colour for colour, _ in _FROST]).view(-1, 3, 1, 1)
    if channels == 1:
        colours = luma(colours)
    spread = torch.tensor([deviation for _, deviation in _FROST]).view(-1, 1, 1, 1)
    kind = draws.below(len(_FROST))
    colours, spread = colours.to(kind.device)[kind], spread.to(kind.device)[kind]
    needles = [blurred_along(draws.normal(1, *size), 3, 1, (-180, 180), draws) for _ in range(2)]
    texture = torch.maximum(*needles) / 0.684 + 3 * plasma(size, 1.75, draws)
    # 0.684 is the deviation of one layer of needles; 1,000 textures of 32 x 32 pixels have the mean
    # 2.07 and the deviation 0.97 within each. Pixels 1, 2, 4 and 8 apart correlate by 0.37, 0.26,
    # 0.20 and 0.08 on average, those of the photographs by 0.37, 0.28, 0.21 and 0.13.
    texture = (texture - 2.07) / 0.97
    # The brightness of the parts that are cut out of a photograph varies by half as much as theirs.
    texture = texture + 1.5 * (draws.uniform(1, 1, 1) - 0.5)
    return (colours + texture * spread).clamp_(0, 1)


def spatter(x: Tensor, parameters: tuple, draws: Draws) -> Tensor:
    """Drops of water or mud on the lens.

    `parameters`: mean, deviation and smoothness of the noise, the least value that is liquid,
    strength of the water or smoothness of the mud, and whether it is mud.
    """
    mean, deviation, smooth, least, strength, mud = parameters
    layer = gaussian(draws.normal(1, *x.shape[2:]) * deviation + mean, smooth)
    colour = torch.tensor(_MUD if mud else _WATER, device=x.device).view(1, 3, 1, 1) / 255
    colour = luma(colour) if x.shape[1] == 1 else colour
    if mud:
        cover = gaussian((layer > least).float(), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return x * (1 - cover) + colour * cover
    layer = torch.where(layer < least, 0.0, layer)
    return x + emboss_of_drops(layer) * strength * colour
