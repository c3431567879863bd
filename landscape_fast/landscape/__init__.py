"""What ensembles look like: diversity, calibration, planes, paths and curvature; the figures."""

from landscape_fast.landscape.curvature import (
    CurvaturePath,
    Eigenvalues,
    Trace,
    curvature_along,
    hessian_top_eigenvalues,
    hessian_trace,
)
from landscape_fast.landscape.diversity import (
    DiversityPoints,
    FamilyCurve,
    FamilyFit,
    correlated_family,
    diversity_points,
    fit_correlated_family,
    lower_limit,
    upper_limit,
)
from landscape_fast.landscape.ensemble_plots import (
    cycle_comparison,
    init_shuffle_bars,
    ood_bars,
    shift_panels,
    size_curve_panels,
)
from landscape_fast.landscape.function_plots import diversity_plane, function_map, similarity_maps
from landscape_fast.landscape.mc_dropout import mc_dropout
from landscape_fast.landscape.ood import OodReport, OodScores, out_of_distribution
from landscape_fast.landscape.origins import (
    CycleDiversity,
    Origins,
    cycle_diversity,
    init_or_shuffle,
)
from landscape_fast.landscape.path_plots import cycle_panels, path_panels, simplex_heat_map
from landscape_fast.landscape.paths import (
    PathScores,
    WedgeMap,
    along_path,
    wedge_map,
)
from landscape_fast.landscape.plane_plots import plane_panels, wedge_panels
from landscape_fast.landscape.planes import (
    PlaneMap,
    filter_normalised_map,
    map_plane,
    radial_map,
    trajectory_map,
    triangle_map,
)
from landscape_fast.landscape.plots import accuracy_diversity, heat_maps, reliability_diagram
from landscape_fast.landscape.projection import (
    Projection,
    grid_around,
    project,
)
from landscape_fast.landscape.samplers import (
    DiagonalGaussian,
    LowRankGaussian,
    RandomDirections,
    SubspaceSampler,
    WeightDropout,
)
from landscape_fast.landscape.sampling import (
    Accepted,
    ScaleFound,
    sample_accepted,
    scale_for_accuracy,
)
from landscape_fast.landscape.shift import ShiftCurves, ShiftScores, under_shift
from landscape_fast.landscape.similarity import (
    ClusterDistances,
    Similarity,
    cluster_distances,
    cluster_ratio,
    function_distances,
    similarity,
    tsne,
)
from landscape_fast.landscape.size_curves import SizeCurve, size_curves
from landscape_fast.landscape.tunnel_plots import curvature_panel, tunnel_panels
from landscape_fast.metrics import (
    Diagnosis,
    PairDiversity,
    ReliabilityBins,
    diagnose,
    pair_diversity,
    reliability_bins,
)

__all__ = [
    "Accepted",
    "ClusterDistances",
    "CurvaturePath",
    "CycleDiversity",
    "Diagnosis",
    "DiagonalGaussian",
    "DiversityPoints",
    "Eigenvalues",
    "FamilyCurve",
    "FamilyFit",
    "LowRankGaussian",
    "OodReport",
    "OodScores",
    "Origins",
    "PairDiversity",
    "PathScores",
    "PlaneMap",
    "Projection",
    "RandomDirections",
    "ReliabilityBins",
    "ScaleFound",
    "ShiftCurves",
    "ShiftScores",
    "Similarity",
    "SizeCurve",
    "SubspaceSampler",
    "Trace",
    "WedgeMap",
    "WeightDropout",
    "accuracy_diversity",
    "along_path",
    "cluster_distances",
    "cluster_ratio",
    "correlated_family",
    "curvature_along",
    "curvature_panel",
    "cycle_comparison",
    "cycle_diversity",
    "cycle_panels",
    "diagnose",
    "diversity_plane",
    "diversity_points",
    "filter_normalised_map",
    "fit_correlated_family",
    "function_distances",
    "function_map",
    "grid_around",
    "heat_maps",
    "hessian_top_eigenvalues",
    "hessian_trace",
    "init_or_shuffle",
    "init_shuffle_bars",
    "lower_limit",
    "map_plane",
    "mc_dropout",
    "ood_bars",
    "out_of_distribution",
    "pair_diversity",
    "path_panels",
    "plane_panels",
    "project",
    "radial_map",
    "reliability_bins",
    "reliability_diagram",
    "sample_accepted",
    "scale_for_accuracy",
    "shift_panels",
    "similarity",
    "similarity_maps",
    "simplex_heat_map",
    "size_curve_panels",
    "size_curves",
    "trajectory_map",
    "triangle_map",
    "tsne",
    "tunnel_panels",
    "under_shift",
    "upper_limit",
    "wedge_map",
    "wedge_panels",
]
