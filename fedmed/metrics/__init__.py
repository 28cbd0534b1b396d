"""How networks are judged: sums that sites send and the server adds, metrics computed once, intervals over patients.

Numpy in, numbers out. A metric that is undefined is None, never NaN.
"""

from fedmed.metrics.bands import GRID, Curve, LabelCurves, label_curves, youden_threshold
from fedmed.metrics.bootstrap import intervals_classification, intervals_segmentation
from fedmed.metrics.cases import Cases, dice_per_case, join_cases, score_cases
from fedmed.metrics.classification import classification_bounds, classification_metrics, classification_sums
from fedmed.metrics.form import Form, metrics_of_released, released
from fedmed.metrics.histograms import bin_centres
from fedmed.metrics.ranking import auprc, auroc, roc_curve, sensitivity_at_specificity
from fedmed.metrics.resampling import Interval, bootstrap_patients
from fedmed.metrics.segmentation import case_sums, segmentation_metrics, segmentation_sums
from fedmed.metrics.sums import add_sums

__all__ = [
    "GRID",
    "Cases",
    "Curve",
    "Form",
    "Interval",
    "LabelCurves",
    "add_sums",
    "auprc",
    "auroc",
    "bin_centres",
    "bootstrap_patients",
    "case_sums",
    "classification_bounds",
    "classification_metrics",
    "classification_sums",
    "dice_per_case",
    "intervals_classification",
    "intervals_segmentation",
    "join_cases",
    "label_curves",
    "metrics_of_released",
    "released",
    "roc_curve",
    "score_cases",
    "segmentation_metrics",
    "segmentation_sums",
    "sensitivity_at_specificity",
    "youden_threshold",
]
