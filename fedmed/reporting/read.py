"""Reads a run folder's files.

`result.json` is required. `events.jsonl`, `evaluation.json` and `run.toml` add detail; one that is missing is silent,
one that cannot be read becomes a note in the report. Keys that this version does not know are ignored.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmed.errors import DataError
from fedmed.reporting.facts import Estimate, Evaluation, Metrics, Privacy, Round, RunFacts, Site

SCHEMA = 1
TROUBLES = ("update_refused", "site_failed")


def read_run(run: Path) -> RunFacts:
    """Reads a run folder.

    Raises:
        DataError: `result.json` is missing, is no JSON, or is not shaped as a result.
    """
    raw = _result(run)
    notes: list[str] = []
    config = _config(run / "run.toml", notes)
    privacy = _mapping(config.get("privacy"))
    log = tuple(sorted((_round(item) for item in _items(raw, "rounds_log")), key=lambda entry: entry.number))
    events = _events(run / "events.jsonl", notes)
    task = _text(raw.get("task"))
    server = _metrics(_mapping(raw.get("server")).get("metrics"))
    sites = tuple(_site(item) for item in _items(raw, "sites"))
    asked = _text(_mapping(config.get("evaluate")).get("primary"))
    return RunFacts(
        folder=run.resolve().name,
        run_id=_text(raw.get("run_id")),
        name=_text(raw.get("name")) or run.resolve().name,
        status=_text(raw.get("status")) or "unknown",
        reason=_text(raw.get("reason")),
        model=_text(raw.get("model")),
        task=task,
        strategy=_text(raw.get("strategy")),
        rounds=_count(raw.get("rounds")),
        seed=_count(raw.get("seed")),
        versions={name: _text(value) for name, value in _mapping(raw.get("versions")).items()},
        server=server,
        sites=sites,
        log=log,
        timing={name: _number(value) for name, value in _mapping(raw.get("timing")).items()},
        peak_memory_mib=_number(raw.get("peak_memory_mib")),
        primary=asked or _primary(task, (server, *(entry.metrics for entry in log), *(site.metrics for site in sites))),
        privacy_mode=_text(privacy.get("mode")),
        void_privacy=privacy.get("mode", "none") != "none" and privacy.get("noise") == "insecure-test",
        started=next((_text(e.get("time")) for e in events if e.get("kind") == "run_started"), ""),
        finished=next((_text(e.get("time")) for e in reversed(events) if e.get("kind") == "run_finished"), ""),
        unfinished=_unfinished(events, {entry.number for entry in log}),
        evaluation=_evaluation(run / "evaluation.json", notes),
        notes=tuple(notes),
    )


def _result(run: Path) -> Mapping[str, object]:
    name = run.resolve().name
    try:
        raw = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
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
    return _mapping(raw)


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
        name=_text(raw.get("site")),
        patients=_count(raw.get("patients")),
        images=_count(raw.get("images")),
        rounds_joined=_count(raw.get("rounds_joined")),
        metrics=_metrics(raw.get("metrics")),
        privacy=_privacy(spent) if isinstance(spent, dict) else None,
    )


def _privacy(raw: Mapping[str, object]) -> Privacy:
    return Privacy(
        epsilon=_number(raw.get("epsilon")),
        epsilon_total=_number(raw.get("epsilon_total")),
        delta=_number(raw.get("delta")),
        unit=_text(raw.get("unit")),
    )


def _round(raw: Mapping[str, object]) -> Round:
    number, failed = _count(raw.get("round")), raw.get("failed")
    if number is None:
        raise DataError(
            "result.json: an entry of 'rounds_log' has no round number. Restore the file, or repeat the run."
        )
    return Round(
        number=number,
        joined=frozenset(_text(name) for name in _sequence(raw.get("joined"))),
        failed={_text(item.get("site")): _text(item.get("reason")) for item in map(_mapping, _sequence(failed))},
        seconds=_number(raw.get("seconds")),
        metrics=_metrics(raw.get("server_metrics")),
    )


def _metrics(raw: object) -> Metrics:
    return {name: _estimate(_mapping(item)) for name, item in _mapping(raw).items()}


def _estimate(raw: Mapping[str, object]) -> Estimate:
    return Estimate(
        value=_number(raw.get("value")),
        low=_number(raw.get("low")),
        high=_number(raw.get("high")),
        patients=_count(raw.get("n")),
    )


def _primary(task: str, sources: Sequence[Metrics]) -> str:
    """`auroc` or `dice` by task, as the run configuration's default; if nothing holds it, any metric but the loss."""
    usual = "dice" if task == "segmentation" else "auroc"
    names = [name for metrics in sources for name in metrics if name != "loss"]
    return usual if usual in names or not names else names[0]


def _config(file: Path, notes: list[str]) -> Mapping[str, object]:
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


def _events(file: Path, notes: list[str]) -> list[Mapping[str, object]]:
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
        return _mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def _unfinished(events: Sequence[Mapping[str, object]], logged: set[int]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for event in events:
        site, number = _text(event.get("site")), _count(event.get("round"))
        if event.get("kind") in TROUBLES and site and number is not None and number not in logged:
            found[site, number] = _text(event.get("reason"))
    return found


def _evaluation(file: Path, notes: list[str]) -> Evaluation | None:
    try:
        raw = _mapping(json.loads(file.read_text(encoding="utf-8")))
        kind = _text(raw.get("kind"))
        if kind not in ("classification", "segmentation"):
            raise ValueError("unknown kind")
        return Evaluation(
            kind=kind,
            curves={label: _curve(item) for label, item in _mapping(raw.get("curves")).items()},
            cases={label: _numbers(item) for label, item in _mapping(raw.get("cases")).items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        notes.append("evaluation.json cannot be read: curves and distributions are left out.")
        return None


def _curve(raw: object) -> tuple[list[float], list[float]] | None:
    rates = _mapping(raw)
    false, true = (_numbers(rates.get(name)) for name in ("false_positive_rate", "true_positive_rate"))
    return (false, true) if len(false) == len(true) > 1 else None


def _numbers(raw: object) -> list[float]:
    return [number for item in _sequence(raw) if (number := _number(item)) is not None]


def _number(raw: object) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return None
    try:
        number = float(raw)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _count(raw: object) -> int | None:
    number = _number(raw)
    return None if number is None else int(number)


def _text(raw: object) -> str:
    return "" if raw is None else str(raw)


def _mapping(raw: object) -> Mapping[str, object]:
    return raw if isinstance(raw, dict) else {}


def _sequence(raw: object) -> Sequence[object]:
    return raw if isinstance(raw, list) else ()
