"""Evaluation: logits of a network over a data set, and the sums or the intervals that they amount to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmed.config import TaskConfig
from fedmed.imaging.dataset import Dataset
from fedmed.metrics import (
    Cases,
    Form,
    add_sums,
    auroc_intervals,
    check_exact,
    check_noised,
    check_variances,
    classification_bounds,
    classification_metrics,
    classification_sums,
    exact_metrics,
    is_exact,
    is_noised,
    join_cases,
    noised_metrics,
    parted_variances,
    patient_histograms,
    patient_overlaps,
    score_cases,
    segmentation_metrics,
    segmentation_sums,
    sums_to_send,
)
from fedmed.training.losses import Loss
from fedmed.training.network import FlatNetwork
from fedmed.training.tiles import parts, volume_predictions, within
from fedmed.types import Sums

PERSONAL = "personal/"  # before the name of a sum, or of a metric, of a site's own network


def predictions(
    network: FlatNetwork, data: Dataset, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]:
    """Yield (rows, logits, targets) batch by batch, in order, the network in evaluation mode.

    Tiles of segmented volumes are put together: a case is then a volume, and its row that of its first tile. Where
    masks are class numbers, so that a place has one label at most, one of its logits at most is above 0
    (`likeliest_alone`).
    """
    network.module.eval()
    settled = likeliest_alone if data.labels else lambda logits: logits
    with torch.inference_mode():
        if data.tiles is not None and data.labels:
            for chosen, maps, masks in volume_predictions(network, data, rows):
                yield chosen, settled(torch.from_numpy(maps)).numpy(), masks
            return
        for chosen in parts(network, data, rows):
            images, targets = data.batch(chosen, margin=network.margin_voxels)
            logits = settled(network(images.to(network.device)).float())
            yield chosen, logits.cpu().numpy(), within(targets, network.margin_voxels).numpy()


def likeliest_alone(logits: Tensor) -> Tensor:
    """Logits of labels that exclude each other: log-odds of the softmax over them and the background's 0.

    One is above 0 where its label is likelier than every other and than none: at most one in a place. Where that label
    has less than one half, its logit is the smallest number above 0, so a loss takes it as one half.

    Args:
        logits: (n, labels, …); of a single label they are returned as they are.
    """
    if logits.shape[1] == 1:
        return logits
    everything = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)
    (best, second), (place, _) = (part.unbind(1) for part in everything.topk(2, dim=1))
    rest = everything.scatter_(1, place[:, None], -torch.inf).logsumexp(1)
    gap = torch.logaddexp(best, rest)[:, None] - logits  # -log p, at least log 2 of all but the likeliest
    others = -(gap + torch.log1p(-torch.exp(-gap))).clamp(min=0)
    odds = best - rest
    likeliest = torch.where(best > second, odds.clamp(min=torch.finfo(odds.dtype).tiny), odds.clamp(max=0))
    labels = torch.arange(1, everything.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    return torch.where(place[:, None] == labels, likeliest[:, None], others)


def mean_loss(network: FlatNetwork, data: Dataset, rows: NDArray[np.int64], loss: Loss) -> float:
    """The loss on some rows, in evaluation mode, each batch weighing as many images as its known labels make up.

    It is the mean over all known labels, whatever the batches; 0 where no label is known.
    """
    network.module.eval()
    total = weight = 0.0
    with torch.inference_mode():
        for chosen in parts(network, data, rows):
            images, targets = data.batch(chosen, margin=network.margin_voxels)
            targets = within(targets, network.margin_voxels)
            value = loss(network(images.to(network.device)), targets.to(network.device))
            known = int((~torch.isnan(targets)).sum()) * len(images) / targets.numel()
            total, weight = total + float(value) * known, weight + known
    return total / weight if weight else 0.0


def evaluation_sums(
    network: FlatNetwork,
    data: Dataset,
    rows: NDArray[np.int64],
    task: TaskConfig,
    *,
    form: Form = "histogram",
    centres: Sequence[float] = (),
    spacing_mm: tuple[float, ...] = (),
    fewest: int = 0,
) -> Sums:
    """What a site sends of its evaluation: counts, histograms, summed losses and variances; cases where it says so.

    Made once from all cases and not added up over batches: a patient with images in two batches counts once.

    Args:
        network: the network to be judged.
        data: the site's images.
        rows: of the held-out patients; without any there is nothing to send.
        task: classification or segmentation.
        form: in which the site lets scores leave; "exact" = those of single images, "none" = nothing at all.
        centres: logits around which histograms are finest, one for each label; empty = 0.
        spacing_mm: of voxels; distances of surfaces are only measured where it is known.
        fewest: patients with a label below which nothing of that label is sent; in a classification also without it.
    """
    if form == "none" or len(rows) == 0:
        return {}
    if task.kind == "segmentation":
        scored, patients = [], []
        for chosen, logits, targets in predictions(network, data, rows):
            scored.append(scored_cases(logits, targets, spacing_mm))
            patients += [data.patients[row] for row in chosen]
        return segmentation_sums(join_cases(scored), patients, fewest=fewest)
    batches = list(predictions(network, data, rows))
    logits = np.concatenate([logits for _, logits, _ in batches])
    targets = np.concatenate([targets for _, _, targets in batches])
    patients = [data.patients[row] for row in rows]
    return sums_to_send(form, logits, targets, patients, centres=centres or None, fewest=fewest)


def patient_vectors(
    network: FlatNetwork, data: Dataset, rows: NDArray[np.int64], task: TaskConfig, *, centres: Sequence[float] = ()
) -> NDArray[np.float64]:
    """(patients, values) what each held-out patient adds to sums that bear noise. None of it may leave as it is.

    Patients go through the network one by one: in a common batch the last bits of one would depend on the others. A
    logit that is not finite counts as 0 or as an extreme one: an error would tell that some patient has it.

    Args:
        network: the network to be judged.
        data: the site's images.
        rows: of the held-out patients; there may be none.
        task: classification or segmentation.
        centres: logits around which histograms are finest, one for each label; empty = 0.
    """

    def vectors_of(logits: NDArray[np.float32], targets: NDArray[np.float32], names: list[str]) -> NDArray[np.float64]:
        if task.kind == "segmentation":
            return patient_overlaps(scored_cases(logits, targets), names)
        return patient_histograms(logits, targets, names, centres or None)

    of_patient: dict[str, list[int]] = {}
    for row in rows.tolist():
        of_patient.setdefault(data.patients[row], []).append(row)
    nobody = np.zeros((0, len(task.labels), *([1, 1] if task.kind == "segmentation" else [])), np.float32)
    vectors = [vectors_of(nobody, nobody, [])]
    for patient, own in of_patient.items():
        batches = list(predictions(network, data, np.array(own)))
        logits = np.nan_to_num(np.concatenate([batch[1] for batch in batches]))
        targets = np.concatenate([batch[2] for batch in batches])
        vectors.append(vectors_of(logits, targets, [patient] * len(logits)))
    return np.concatenate(vectors)


def checked_sums(sums: Sums, task: TaskConfig) -> Sums:
    """A site's sums, if they have the names and shapes that they must have and could be true.

    Raises:
        UpdateRefused: they do not or could not.
    """
    none, labels = np.zeros((0, len(task.labels))), len(task.labels)
    if is_noised(sums):
        check_noised(sums, task.kind, labels)
        return sums
    if task.kind == "classification" and is_exact(sums):
        check_exact(sums, labels)
        return sums
    if task.kind == "segmentation":
        empty = segmentation_sums(score_cases(np.zeros((0, labels, 1, 1)), np.zeros((0, labels, 1, 1))), [])
    else:
        empty = classification_sums(none, none, [])
    counts, variances = parted_variances(sums) if task.kind == "classification" else (sums, {})
    checked = add_sums([empty, counts])
    check_variances(variances, checked)
    return {**checked, **variances}


def personal_sums(sums: Sums) -> Sums:
    """Sums of a site's own network, under names that tell them from those of the shared one."""
    return {f"{PERSONAL}{name}": values for name, values in sums.items()}


def parted_sums(sums: Sums) -> tuple[Sums, Sums]:
    """Sums of the shared network, and of the site's own one; the inverse of joining them with `personal_sums`."""
    shared = {name: values for name, values in sums.items() if not name.startswith(PERSONAL)}
    own = {name.removeprefix(PERSONAL): values for name, values in sums.items() if name.startswith(PERSONAL)}
    return shared, own


def scored_cases(
    logits: NDArray[np.float32], targets: NDArray[np.float32], spacing_mm: tuple[float, ...] = ()
) -> Cases:
    """The scores of segmented cases, with distances in mm where the spacing of voxels is known."""
    return score_cases(logits, targets, spacing_mm or 1.0, distances=bool(spacing_mm))


def metrics_from(sums: Sums, task: TaskConfig) -> Mapping[str, float | None]:
    """The ratios that sums amount to, named as in `result.json`; undefined ones are None."""
    if is_noised(sums):
        return {name: each.value for name, each in noised_metrics(sums, task.kind, task.labels).items()}
    if is_exact(sums):
        return {name: each.value for name, each in exact_metrics(sums, task.labels).items()}
    ratios = classification_metrics if task.kind == "classification" else segmentation_metrics
    return ratios(sums, task.labels)


def intervals_from(sums: Sums, task: TaskConfig, *, replicates: int) -> Mapping[str, tuple[float, float]]:
    """The 95 % intervals of one site: of its AUROCs from the variances that it sent, of all metrics from its scores.

    Args:
        sums: of one site.
        task: what they are about.
        replicates: of the bootstrap by patient, where the site sent scores.
    """
    if task.kind != "classification" or is_noised(sums):
        return {}
    if is_exact(sums):
        found = exact_metrics(sums, task.labels, replicates)
        return {name: (i.low, i.high) for name, i in found.items() if i.low is not None and i.high is not None}
    return auroc_intervals(sums, task.labels)


def bounds_from(sums: Sums, task: TaskConfig) -> Mapping[str, float | None]:
    """How far metrics that were made of histograms can be from those of the scores; the other metrics are exact."""
    counted = task.kind == "classification" and not is_noised(sums) and not is_exact(sums)
    return classification_bounds(sums, task.labels) if counted else {}


def noise_from(sums: Sums, task: TaskConfig) -> Mapping[str, float | None]:
    """How far noise moves the metrics of one site, 95 % of the time; nothing where the sums bear none."""
    found = noised_metrics(sums, task.kind, task.labels) if is_noised(sums) else {}
    return {name: each.noise for name, each in found.items()}
