"""What the sites say of the kept network, from the sums over the patients that they hold out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import RecordDict

from fedmed.config import TaskConfig
from fedmed.errors import UpdateRefused
from fedmed.federated.admission import decoded_update, privacy_in
from fedmed.federated.exchange import Failure
from fedmed.federated.result import metric
from fedmed.training.evaluate import PERSONAL, bounds_from, intervals_from, metrics_from, noise_from, parted_sums
from fedmed.types import Sums


def metrics_of_sites(
    answers: Iterable[tuple[str, RecordDict | str]],
    task: TaskConfig,
    spent: Callable[[str, dict[str, Any] | None], None],
    *,
    replicates: int,
) -> tuple[dict[str, dict[str, Any]], list[Failure]]:
    """Every site's metrics as `result.json` holds them, and the sites that gave none.

    Args:
        answers: (site, the content of its reply or why there is none).
        task: what the sums have to be about.
        spent: told what each site says of its patients' budget.
        replicates: of the bootstrap by patient, for sites that send the scores of their images.
    """
    metrics: dict[str, dict[str, Any]] = {}
    failures: list[Failure] = []
    for site, answer in answers:
        try:
            update = decoded_update(answer, task)
        except UpdateRefused as error:
            failures.append(Failure(site=site, reason=f"final evaluation: {error}"))
            continue
        spent(site, privacy_in(update.facts))
        shared, own = parted_sums(update.metrics)
        metrics[site] = {
            f"{prefix}{name}": found
            for prefix, part in (("", shared), (PERSONAL, own))
            if part
            for name, found in _metrics(part, task, replicates).items()
        }
    return metrics, failures


def _metrics(sums: Sums, task: TaskConfig, replicates: int) -> dict[str, Any]:
    """The metrics of one network at one site, with bounds of histograms, and intervals or noise where it gave any."""
    n, bounds, noise = int(sums["patients"][0]), bounds_from(sums, task), noise_from(sums, task)
    intervals = intervals_from(sums, task, replicates=replicates)
    found = {}
    for name, value in metrics_from(sums, task).items():
        low, high = intervals.get(name, (None, None))
        found[name] = metric(value, low, high, n, bound=bounds.get(name))
        found[name] |= {"noise": noise[name]} if name in noise else {}
    return found
