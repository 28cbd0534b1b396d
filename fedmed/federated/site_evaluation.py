"""What the sites say of the kept network, from the sums over the patients that they hold out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import RecordDict

from fedmed.config import TaskConfig
from fedmed.errors import UpdateRefused
from fedmed.federated.admission import decoded_update
from fedmed.federated.exchange import Failure
from fedmed.federated.result import metric
from fedmed.training.evaluate import metrics_from


def metrics_of_sites(
    answers: Iterable[tuple[str, RecordDict | str]], task: TaskConfig
) -> tuple[dict[str, dict[str, Any]], list[Failure]]:
    """Every site's metrics as `result.json` holds them, and the sites that gave none.

    Args:
        answers: (site, the content of its reply or why there is none).
        task: what the sums have to be about.
    """
    metrics: dict[str, dict[str, Any]] = {}
    failures: list[Failure] = []
    for site, answer in answers:
        try:
            sums = decoded_update(answer, task).metrics
        except UpdateRefused as error:
            failures.append(Failure(site=site, reason=f"final evaluation: {error}"))
            continue
        patients = int(sums["patients"][0]) if "patients" in sums else 0
        values = metrics_from(sums, task) if sums else {}
        metrics[site] = {name: metric(value, n=patients) for name, value in values.items()}
    return metrics, failures
