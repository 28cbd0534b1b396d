"""How networks are judged: sums that sites send and the server adds, metrics computed once, intervals over patients.

Numpy in, numbers out. A metric that is undefined is None, never NaN.

* What a site sends: in which `form`; `sums` of `classification` and `segmentation`, `histograms` of scores and their
  `site_variance`, `exact` scores, `noised` sums under privacy.
* Of a classifier: `ranking` and `calibration`. Of masks: `cases`, with `surfaces` and `lesions`.
* Over patients: `resampling`, `bootstrap` of every metric, `bands` of curves, `obuchowski` without resampling;
  `comparison` of two networks.
"""

from fedmed.metrics.bands import GRID, Curve, LabelCurves, label_curves, youden_threshold
from fedmed.metrics.bootstrap import (
    Measures,
    classification_intervals,
    classification_measures,
    segmentation_intervals,
    segmentation_measures,
)
from fedmed.metrics.calibration import probabilities
from fedmed.metrics.cases import Cases, join_cases, score_cases
from fedmed.metrics.classification import classification_bounds, classification_metrics, classification_sums
from fedmed.metrics.comparison import (
    ENOUGH_SEEDS,
    Difference,
    holm,
    over_seeds,
    p_value,
    paired_difference,
    seed_moves,
)
from fedmed.metrics.exact import check_exact, exact_metrics, is_exact
from fedmed.metrics.form import Form, sums_to_send
from fedmed.metrics.histograms import bin_centres
from fedmed.metrics.noised import (
    NOISE,
    PATIENTS,
    SUMS,
    Noised,
    check_noised,
    is_noised,
    longest,
    noised_metrics,
    patient_histograms,
    patient_overlaps,
)
from fedmed.metrics.obuchowski import MINIMUM, ClusteredAuroc, clustered_auroc, interval_of_variance
from fedmed.metrics.ranking import roc_curve
from fedmed.metrics.resampling import Interval, finite, interval_ends, percentiles, replicate
from fedmed.metrics.segmentation import segmentation_metrics, segmentation_sums
from fedmed.metrics.site_variance import auroc_intervals, auroc_variances, check_variances, parted_variances
from fedmed.metrics.sums import add_sums, label_counts

__all__ = [
    "ENOUGH_SEEDS",
    "GRID",
    "MINIMUM",
    "NOISE",
    "PATIENTS",
    "SUMS",
    "Cases",
    "ClusteredAuroc",
    "Curve",
    "Difference",
    "Form",
    "Interval",
    "LabelCurves",
    "Measures",
    "Noised",
    "add_sums",
    "auroc_intervals",
    "auroc_variances",
    "bin_centres",
    "check_exact",
    "check_noised",
    "check_variances",
    "classification_bounds",
    "classification_intervals",
    "classification_measures",
    "classification_metrics",
    "classification_sums",
    "clustered_auroc",
    "exact_metrics",
    "finite",
    "holm",
    "interval_ends",
    "interval_of_variance",
    "is_exact",
    "is_noised",
    "join_cases",
    "label_counts",
    "label_curves",
    "longest",
    "noised_metrics",
    "over_seeds",
    "p_value",
    "paired_difference",
    "parted_variances",
    "patient_histograms",
    "patient_overlaps",
    "percentiles",
    "probabilities",
    "replicate",
    "roc_curve",
    "score_cases",
    "seed_moves",
    "segmentation_intervals",
    "segmentation_measures",
    "segmentation_metrics",
    "segmentation_sums",
    "sums_to_send",
    "youden_threshold",
]
