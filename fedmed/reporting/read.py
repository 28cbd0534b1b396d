"""Reads a run folder's files.

`result.json` is required. `events.jsonl`, `evaluation.json` and `run.toml` add detail; one that is missing is silent,
one that cannot be read becomes a note in the report. Keys that this version does not know are ignored.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmed.errors import DataError
from fedmed.reporting.facts import Metrics, Privacy, Round, RunFacts, Site, usual_primary
from fedmed.reporting.read_evaluation import metrics_of, read_evaluation, read_findings
from fedmed.reporting.values import count_of, mapping_of, number_of, sequence_of, text_of

SCHEMA = 1
SETTINGS = {  # what a reader asks of a training; nothing that names a file
    "task": ("labels",),
    "model": ("norm", "width", "in-channels", "freeze", "fusion"),
    "data": ("items", "preset", "image-size", "spacing-mm", "volume-size"),
    "train": (
        "local-epochs", "local-steps", "batch-size", "accumulate", "optimizer", "learning-rate", "momentum",
        "weight-decay", "schedule", "loss", "class-weights", "sampling", "augment", "precision",
    ),
    "strategy": ("weight-by", "min-sites", "secure-sum", "server-learning-rate", "server-momentum"),
    "privacy": ("mode", "unit", "epsilon", "delta", "max-grad-norm", "clipping", "images-per-patient", "noise"),
    "evaluate": ("keep", "selection-share", "site-share", "bootstrap"),
}  # fmt: skip
TROUBLES = ("update_refused", "site_failed")


def read_run(run: Path) -> RunFacts:
    """Reads a run folder.

    Raises:
        DataError: `result.json` is missing, is no JSON, or is not shaped as a result.
    """
    raw = _result(run)
    notes: list[str] = []
    config = read_settings(run / "run.toml", notes)
    privacy = mapping_of(config.get("privacy"))
    log = tuple(sorted((_round(item) for item in _items(raw, "rounds_log")), key=lambda entry: entry.number))
    events = read_events(run / "events.jsonl", notes)
    task = text_of(raw.get("task"))
    server = metrics_of(mapping_of(raw.get("server")).get("metrics"))
    sites = tuple(_site(item) for item in _items(raw, "sites"))
    findings = [read_findings(file) for file in sorted(run.glob("sites/*/findings.json"))]
    asked = text_of(mapping_of(config.get("evaluate")).get("primary"))
    return RunFacts(
        folder=run.resolve().name,
        run_id=text_of(raw.get("run_id")),
        name=text_of(raw.get("name")) or run.resolve().name,
        status=text_of(raw.get("status")) or "unknown",
        reason=text_of(raw.get("reason")),
        model=text_of(raw.get("model")),
        task=task,
        strategy=text_of(raw.get("strategy")),
        rounds=count_of(raw.get("rounds")),
        seed=count_of(raw.get("seed")),
        versions={name: text_of(value) for name, value in mapping_of(raw.get("versions")).items()},
        server=server,
        sites=sites,
        log=log,
        timing={name: number_of(value) for name, value in mapping_of(raw.get("timing")).items()},
        peak_memory_mib=number_of(raw.get("peak_memory_mib")),
        primary=asked or _primary(task, (server, *(entry.metrics for entry in log), *(site.metrics for site in sites))),
        privacy_mode=text_of(privacy.get("mode")),
        void_privacy=privacy.get("mode", "none") != "none" and privacy.get("noise") == "insecure-test",
        started=next((text_of(e.get("time")) for e in events if e.get("kind") == "run_started"), ""),
        finished=next((text_of(e.get("time")) for e in reversed(events) if e.get("kind") == "run_finished"), ""),
        unfinished=_unfinished(events, {entry.number for entry in log}),
        evaluation=read_evaluation(run / "evaluation.json", notes),
        findings={found.site: found for found in findings if found is not None},
        settings=_settings(config),
        notes=tuple(notes),
    )


def _result(run: Path) -> Mapping[str, object]:
    name = run.resolve().name
    try:
        raw = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        page = next((page for page in ("comparison.html", "sweep.html") if (run / page).is_file()), None)
        if page:
            raise DataError(f"'{name}' is no run, but holds several, and has a page of its own: {run / page}") from None
        raise DataError(
            f"'{name}' holds no result.json, so there is nothing to report. Give the folder of a run that has ended; "
            "finish an interrupted one with fedmed simulate --resume RUN."
        ) from None
    except OSError as error:
        raise DataError(f"result.json in '{name}' cannot be read: {error.strerror}. Check its permissions.") from None
    except (ValueError, RecursionError):
        raise DataError(
            f"result.json in '{name}' is not JSON. Restore it from a copy, or write it again "
            "with fedmed simulate --resume RUN."
        ) from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA or isinstance(schema, bool):
        found = f"schema {schema}" if isinstance(schema, int | float | str) else "no schema"
        raise DataError(
            f"result.json in '{name}' should be a fedmed result of schema {SCHEMA}; found {found[:40]}. "
            "Use the fedmed version that wrote the run, or restore the file."
        )
    return mapping_of(raw)


def _items(raw: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    value = raw.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"result.json: '{key}' should be a list of objects. Restore the file, or repeat the run.")
    return value


def _site(raw: Mapping[str, object]) -> Site:
    spent = raw.get("privacy")
    return Site(
        name=text_of(raw.get("site")),
        patients=count_of(raw.get("patients")),
        images=count_of(raw.get("images")),
        rounds_joined=count_of(raw.get("rounds_joined")),
        metrics=metrics_of(raw.get("metrics")),
        privacy=_privacy(spent) if isinstance(spent, dict) else None,
    )


def _privacy(raw: Mapping[str, object]) -> Privacy:
    return Privacy(
        epsilon=number_of(raw.get("epsilon")),
        epsilon_total=number_of(raw.get("epsilon_total")),
        delta=number_of(raw.get("delta")),
        unit=text_of(raw.get("unit")),
        adjacency=text_of(raw.get("adjacency")),
        accountant=text_of(raw.get("accountant")),
        accountant_total=text_of(raw.get("accountant_total")),
    )


def _round(raw: Mapping[str, object]) -> Round:
    number, failed = count_of(raw.get("round")), raw.get("failed")
    if number is None:
        raise DataError(
            "result.json: an entry of 'rounds_log' has no round number. Restore the file, or repeat the run."
        )
    return Round(
        number=number,
        joined=frozenset(text_of(name) for name in sequence_of(raw.get("joined"))),
        failed={
            text_of(item.get("site")): text_of(item.get("reason")) for item in map(mapping_of, sequence_of(failed))
        },
        seconds=number_of(raw.get("seconds")),
        metrics=metrics_of(raw.get("server_metrics")),
    )


def _primary(task: str, sources: Sequence[Metrics]) -> str:
    """The usual one of the task; if nothing holds it, any metric but the loss."""
    usual = usual_primary(task)
    names = [name for metrics in sources for name in metrics if name != "loss"]
    return usual if usual in names or not names else names[0]


def read_settings(file: Path, notes: list[str]) -> Mapping[str, object]:
    """The resolved configuration, unvalidated: a report must open although this version knows other keys."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        notes.append(
            "run.toml cannot be read: the primary metric is guessed from the task, and test noise is not seen."
        )
        return {}


def _settings(config: Mapping[str, object]) -> dict[str, str]:
    """The settings that a report shows, by dotted key; those of privacy only where there is any."""
    found: dict[str, str] = {}
    for section, keys in SETTINGS.items():
        values = mapping_of(config.get(section))
        for key in keys if section != "privacy" or values.get("mode", "none") != "none" else ("mode",):
            value = values.get(key)
            if value not in (None, "", []):
                listed = [text_of(item) for item in sequence_of(value)] or [text_of(value)]
                found[f"{section}.{key}"] = ", ".join(listed)
    return found


def read_events(file: Path, notes: list[str]) -> list[Mapping[str, object]]:
    """The events of a run, none where there is no file; a line that is damaged or half written is left out."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError:
        notes.append("events.jsonl cannot be read: start and end times are left out.")
        return []
    events = [event for line in lines if line.strip() and (event := _event(line))]
    if skipped := sum(bool(line.strip()) for line in lines) - len(events):
        notes.append(f"events.jsonl: {skipped} line(s) are damaged and left out.")
    return events


def _event(line: str) -> Mapping[str, object]:
    try:
        return mapping_of(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def _unfinished(events: Sequence[Mapping[str, object]], logged: set[int]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for event in events:
        site, number = text_of(event.get("site")), count_of(event.get("round"))
        if event.get("kind") in TROUBLES and site and number is not None and number not in logged:
            found[site, number] = text_of(event.get("reason"))
    return found
