"""How large a landscape report is, readable without importing torch."""

from dataclasses import dataclass

SIZES = ("smoke", "small", "paper")
FOREIGN = ("svhn", "mnist", "cifar10", "cifar100")  # loaders of images from elsewhere


@dataclass(frozen=True)
class ReportSettings:
    """Sizes of a landscape report.

    Attributes:
        rows: the most test rows that figures are measured on; None for all but the validation rows.
        validation_rows: the most test rows by which samples are accepted and scales chosen; None
            for a third of the test rows, which is also the most.
        function_rows: test rows of similarities and t-SNE.
        map_rows: test rows of planes.
        train_rows: training rows of losses along paths.
        shift_rows: test rows that are corrupted, and images of every foreign set.
        calibration_rows: training rows for the statistics of batch norms.
        samples: accepted samples around each solution, of every way.
        tries: draws of a sample until it is accepted.
        drop: how much less accurate an accepted sample may be, a fraction.
        scales: of every way in the diversity plane.
        per_scale: samples at each.
        rank: of the low-rank Gaussians, at most.
        late_share: of training, whose checkpoints make up Gaussians and averages.
        plane_points: of the radial plane along each axis.
        path_points: of the line from the first weights to the last.
        severities: of the corruptions.
        corruptions: their names, those that the images allow; () for all.
        shift_runs: around how many solutions subspaces are measured under shift; None for all.
        curvature_points: along the lines on which the curvature is measured; 0 for none.
        seed: of samples, corruptions and t-SNE.
    """

    rows: int | None = 2000
    validation_rows: int | None = 1000
    function_rows: int = 500
    map_rows: int = 1000
    train_rows: int = 1000
    shift_rows: int = 1000
    calibration_rows: int = 2000
    samples: int = 10
    tries: int = 5
    drop: float = 0.01
    scales: int = 12
    per_scale: int = 5
    rank: int = 5
    late_share: float = 0.25
    plane_points: int = 21
    path_points: int = 21
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    corruptions: tuple[str, ...] = ()
    shift_runs: int | None = 1
    curvature_points: int = 0
    seed: int = 0


# The corruptions of the small size: one of every kind, and those that tell severities apart best.
_SIX = (
    "gaussian_noise",
    "gaussian_blur",
    "contrast",
    "brightness",
    "pixelate",
    "jpeg_compression",
)
_BY_SIZE = {
    "smoke": {
        "function_rows": 200,
        "map_rows": 250,
        "train_rows": 400,
        "shift_rows": 250,
        "samples": 5,
        "scales": 6,
        "per_scale": 2,
        "plane_points": 15,
        "severities": (1, 3, 5),
        "corruptions": ("gaussian_noise", "gaussian_blur", "contrast", "pixelate"),
    },
    "small": {"rows": None, "validation_rows": None, "map_rows": 2000, "plane_points": 41,
              "shift_rows": 2000, "corruptions": _SIX},
    "paper": {"rows": None, "validation_rows": None, "map_rows": 10000, "plane_points": 41,
              "shift_rows": 10000, "samples": 30, "train_rows": 10000, "shift_runs": None,
              "calibration_rows": 10000, "curvature_points": 11},
}  # fmt: skip


def settings_of(size: str, **changes) -> ReportSettings:
    """The settings of a size, with some of them changed; None changes nothing."""
    if size not in SIZES:
        raise ValueError(f"settings_of: size must be one of {SIZES}; got {size!r}")
    given = {name: value for name, value in changes.items() if value is not None}
    return ReportSettings(**{**_BY_SIZE[size], **given})
