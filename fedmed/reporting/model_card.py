"""`RUN/MODEL_CARD.md`: what a network was trained on, what it can do, what it promises, and what it does not.

After Mitchell et al. 2019 (arXiv:1810.03993), with what left each site taken from its egress manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmed.reporting import words
from fedmed.reporting.facts import Estimate, RunFacts, Site
from fedmed.reporting.pages import write_page
from fedmed.reporting.read import read_run

LIMITS = """\
* Research software. Not a medical device, not for diagnosis or treatment.
* Metrics are those of the patients counted here; other scanners, hospitals and mixtures of patients give others.
* Intervals say how much a metric depends on which patients were drawn, not how much hospitals differ.
* A patient who is at two hospitals has the sum of their ε; no ε of the federation as a whole is stated.
* ε counts add-or-remove of one patient; Gaussian noise in floating point is not exactly what the theorem asks for.
"""


def write_model_card(run: Path) -> Path:
    """Write `MODEL_CARD.md` into a run folder, whole or not at all.

    Args:
        run: a run folder with `result.json`; egress manifests of virtual hospitals are used where present.

    Raises:
        DataError: `result.json` is missing or damaged, or the card cannot be written.
    """
    card = "\n".join(_lines(read_run(run), _departures(run)))
    return write_page(card, run / "MODEL_CARD.md")


def _lines(run: RunFacts, departures: Mapping[str, list[Mapping[str, Any]]]) -> Iterator[str]:
    yield f"# Model card: {plain(run.name)}"
    yield ""
    yield words.summary(run)
    yield ""
    yield f"* Network: {plain(run.model)}; task: {plain(run.task)}; strategy: {plain(run.strategy)}"
    length = f"Rounds: {words.count(run.rounds)}; seed: {words.count(run.seed)}"
    yield f"* {length}; finished: {plain(run.finished) or 'unknown'}"
    yield f"* Versions: {', '.join(f'{plain(name)} {plain(version)}' for name, version in run.versions.items())}"
    if run.settings.get("strategy.secure-sum") == str(True):
        yield "* The server learned sums of the sites' changes, and no single one (secure sums)."
    yield ""
    yield "## Data and privacy, by site"
    yield ""
    yield "| site | patients | images | rounds | privacy |"
    yield "|---|---|---|---|---|"
    for site in run.sites:
        counts = (words.site_count(site.patients), words.site_count(site.images), words.count(site.rounds_joined))
        yield f"| {plain(site.name)} | {' | '.join(counts)} | {_privacy(site, run)} |"
    yield ""
    yield "## Performance, with 95 % intervals by resampling patients"
    yield ""
    yield from _metrics("the server's held-out patients", run.server)
    for site in run.sites:
        yield from _metrics(f"held-out patients of {plain(site.name)}", site.metrics, of_site=True)
    yield ""
    yield "## What left the sites"
    yield ""
    yield from _left(departures)
    yield ""
    yield "## Who was missing"
    yield ""
    missing = [f"* {plain(site)}, {plain(when)}: {plain(reason)}" for site, when, reason in words.troubles(run)]
    yield from missing or ["Nobody: every site took part in every round."]
    yield ""
    yield "## Limits"
    yield ""
    yield LIMITS


def _privacy(site: Site, run: RunFacts) -> str:
    if site.privacy is None:
        if run.privacy_mode == "central":
            return "differential privacy at the server, with the hospital as unit"
        return "no differential privacy: nothing is promised about single patients"
    spent = site.privacy
    if run.void_privacy:
        return "noise for tests: no ε can be claimed"
    total = f", {plain(words.total(spent))} with earlier runs" if spent.epsilon_total is not None else ""
    where = ", noise at the server" if run.privacy_mode == "central" else ""
    said = f"ε = {words.epsilon(spent.epsilon)}{total}, δ = {spent.delta}, unit: {plain(spent.unit)}"
    return f"{said}, add or remove one{where}"


def _metrics(whose: str, metrics: Mapping[str, Estimate], *, of_site: bool = False) -> Iterator[str]:
    patients = words.site_count if of_site else words.count
    if metrics:
        yield f"| {whose} | value | patients |"
        yield "|---|---|---|"
        for name, each in sorted(metrics.items()):
            spread = f"noise ± {words.number(each.noise)}" if each.noise is not None else words.interval(each)
            value = f"{words.number(each.value)} ({spread})"
            yield f"| {plain(words.title(name))} | {value} | {patients(each.patients)} |"
        yield ""


def _left(departures: Mapping[str, list[Mapping[str, Any]]]) -> Iterator[str]:
    """One line for each site, from its own signed manifest."""
    if not departures:
        yield "No egress manifest is in this run folder: the sites kept none, or keep it with them."
        return
    for site, bodies in departures.items():
        rows = [row for body in bodies for row in body.get("left", ())]
        size = sum(int(row["bytes"]) for row in rows) / 2**20
        names = sorted({str(row["name"]) for row in rows if row.get("kind") == "vector" and row.get("values")})
        controls = sorted({str(control) for body in bodies for control in body.get("controls", ())})
        yield (
            f"* {plain(site)}: {len(bodies)} replies, {size:.1f} MiB ({plain(', '.join(names))}); "
            f"controls: {plain('; '.join(controls))}"
        )


def _departures(run: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The bodies of the virtual hospitals' egress manifests; lines that cannot be read are `fedmed ledger`'s affair."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted((run / "sites").glob("*/egress.jsonl")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            lines = path.read_text(encoding="utf-8").splitlines()
            found[path.parent.name] = [json.loads(line)["body"] for line in lines]
    return found


def plain(text: str) -> str:
    """Text that no Markdown reader takes for anything else."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(text.split()))
