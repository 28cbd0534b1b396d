"""How networks are judged: sums that sites send and the server adds, metrics computed once, intervals over patients.

Numpy in, numbers out. A metric that is undefined is None, never NaN.
"""

from fedmed.metrics.bootstrap import Interval, bootstrap_patients, intervals_classification, intervals_segmentation
from fedmed.metrics.classification import classification_metrics, classification_sums
from fedmed.metrics.ranking import auprc, auroc, roc_curve
from fedmed.metrics.segmentation import (
    Cases,
    case_sums,
    dice_per_case,
    join_cases,
    score_cases,
    segmentation_metrics,
    segmentation_sums,
)
from fedmed.metrics.sums import add_sums

__all__ = [
    "Cases",
    "Interval",
    "add_sums",
    "auprc",
    "auroc",
    "bootstrap_patients",
    "case_sums",
    "classification_metrics",
    "classification_sums",
    "dice_per_case",
    "intervals_classification",
    "intervals_segmentation",
    "join_cases",
    "roc_curve",
    "score_cases",
    "segmentation_metrics",
    "segmentation_sums",
]
