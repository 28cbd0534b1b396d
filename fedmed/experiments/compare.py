"""`fedmed compare`: the same patients judge local, federated and pooled training on the same budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.durable import write_json
from fedmed.errors import ConfigError
from fedmed.experiments.arms import Trial, arms_of, budget_of, comparisons, kind_of, plain, seeds_of, trials_of
from fedmed.experiments.dealing import dealt
from fedmed.experiments.judging import (
    UNTOLD,
    Bench,
    Drawn,
    check_paired,
    check_same_split,
    intervals_of,
    mean_of,
    site_places,
)
from fedmed.experiments.predictions import SERVER, Place, check_endpoint, places_of, read_predictions
from fedmed.experiments.reuse import result_of
from fedmed.experiments.running import Said, run_trials
from fedmed.experiments.subgroups import groups_of, untold
from fedmed.federated.phantoms import with_phantoms
from fedmed.metrics import ENOUGH_SEEDS, holm
from fedmed.training.local_algorithms.fine_tune import has_personal_network
from fedmed.types import SMALL

RESULT = "comparison.json"


def compare(
    config: RunConfig, folder: str | Path, *, jobs: int = 0, watch: Said = lambda standing: None
) -> dict[str, Any]:
    """Train all arms of `[evaluate]`, judge every network everywhere, and write `comparison.json`.

    Args:
        config: the run, with every path absolute; phantom hospitals if it names no sites.
        folder: of the experiment; finished runs in it are reused.
        jobs: runs at once; 0 = as many as cores and memory allow.
        watch: called whenever the grid of runs has come further.

    Returns:
        The content of `comparison.json` (docs/compare.md). `sites/<site>/comparison.json` holds each site's own part.

    Raises:
        FedmedError: the configuration or the data cannot be used, or a run failed.
    """
    config = with_phantoms(config, explicit=run_file.explicit_keys(config))
    folder, pairs = Path(folder), comparisons(config)
    config = dealt(config, folder)
    check_endpoint(config)
    trials = trials_of(config, folder)
    paths = run_trials(trials, folder, jobs=jobs, watch=watch)
    judged = {(t.network, t.seed): read_predictions(paths[t.network, t.seed], t.judges) for t in trials}
    check_paired(judged)
    if not config.evaluate.resplit:
        check_same_split(judged)
    base = plain(config)
    bench = Bench(config=base, judged=judged, seeds=seeds_of(config))
    table = _Table(bench, trials)
    if not table.places:
        raise ConfigError("nobody is held out, at no site and at the server; set evaluate.site-share or data.server")
    if config.evaluate.endpoint == "sites" and not table.sites:
        raise ConfigError('evaluate.endpoint = "sites", but no site holds anybody out; set evaluate.site-share')
    arms = {arm: table.endpoint(arm, config.evaluate.endpoint) for arm in arms_of(config)}
    tests = [bench.difference(arms[a], arms[b], test=len(bench.seeds) >= ENOUGH_SEEDS) for a, b in pairs]
    adjusted = holm([test.p for test in tests])
    report = {
        "schema": 1,
        "name": config.name,
        "task": config.task.kind,
        "model": config.model.name,
        "primary": config.primary,
        "endpoint": config.evaluate.endpoint,
        "seeds": list(bench.seeds),
        "replicates": config.evaluate.bootstrap,
        "intervals": intervals_of(len(bench.seeds)),
        "split": "another one for every seed" if config.evaluate.resplit else "the same for every seed",
        "budget": budget_of(config),
        "arms": [table.arm(arm, arms[arm], paths) for arm in arms],
        "places": [table.place(place) for place in places_of(base) if place.name in table.places],
        "matrix": table.matrix(),
        "comparisons": [
            {"first": a, "second": b, "difference": test.value, "low": test.low, "high": test.high, "p": test.p}
            | {"p_holm": p}
            for (a, b), test, p in zip(pairs, tests, adjusted, strict=True)
        ],
        "subgroups": [] if config.evaluate.resplit else table.subgroups(places_of(base)),
        "notes": _notes(bench, trials, paths.values(), bool(pairs)),
    }
    _write(folder / RESULT, report)
    for site in table.sites:
        _write(folder / "sites" / site / RESULT, table.of_site(site, config), mode=0o600)  # it has exact counts
    return report


class _Table:
    """Everything that is computed once for each network and place."""

    def __init__(self, bench: Bench, trials: Sequence[Trial]) -> None:
        self.bench, self.primary = bench, bench.config.primary
        self.networks = {trial.network: trial.arm for trial in trials}
        first = next(iter(bench.judged.values()))
        self.places, self.sites = list(first), site_places(first)
        self.images = {
            name: len({int(row) for places in bench.judged.values() for row in places[name].row}) for name in first
        }
        self.cases = first
        self.drawn = {(n, p): bench.drawn(n, p) for n in self.networks for p in self.places}

    def at(self, arm: str, place: str) -> Drawn:
        """The primary metric of an arm at a place; of local training, a site's own network, or the mean of all."""
        own = f"local:{place}" if arm == "local" else arm
        if (own, place) in self.drawn:
            return self.drawn[own, place][self.primary]
        return mean_of([self.drawn[network, place][self.primary] for network in self.of_arm(arm)], together=False)

    def of_arm(self, arm: str) -> list[str]:
        """The networks of an arm; of local training one for every site."""
        return [network for network, of in self.networks.items() if of == arm]

    def endpoint(self, arm: str, where: str) -> Drawn:
        """The primary metric of an arm where the run file declares it."""
        if where == "server":
            return self.at(arm, SERVER)
        parts = [self.at(arm, site) for site in self.sites]
        return mean_of(parts, together=True)

    def arm(self, arm: str, endpoint: Drawn, paths: Any) -> dict[str, Any]:
        """One row of the summary."""
        known = [(self.at(arm, site), site) for site in self.sites]
        worst = min(((d.value, site) for d, site in known if d.value == d.value), default=None)
        networks = self.of_arm(arm)
        runs = [paths[network, seed] for network in networks for seed in self.bench.seeds]
        steps = [steps_of(paths[network, self.bench.seeds[0]]) for network in networks]
        return {
            "arm": arm,
            "kind": kind_of(arm),
            "endpoint": self.bench.estimate(endpoint),
            "by_seed": endpoint.by_seed,
            "places": {place: self.bench.estimate(self.at(arm, place)) for place in self.places},
            "worst": None if worst is None else {"site": worst[1], "value": worst[0]},
            "steps": None if None in steps else sum(filter(None, steps)),
            "runs": [path.name for path in runs],
        }

    def place(self, place: Place) -> dict[str, Any]:
        patients = next(iter(self.drawn[next(iter(self.networks)), place.name].values())).patients
        return {"place": place.name, "kind": place.kind, **_counts(patients, self.images[place.name])}

    def matrix(self) -> list[dict[str, Any]]:
        """Every network at every place, with every metric that is not of one label alone, and the primary one."""
        return [
            {
                "network": network,
                "arm": self.networks[network],
                "place": place,
                "metrics": {
                    name: self.bench.estimate(one)
                    for name, one in drawn.items()
                    if "/" not in name or name == self.primary
                },
            }
            for (network, place), drawn in self.drawn.items()
        ]

    def subgroups(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        """The primary metric of every arm in every subgroup of a place; of few patients nothing is said.

        Rows of a data set of the user's own are no lines of a manifest, so it has no subgroups.
        """
        found: list[dict[str, Any]] = []
        for place in () if self.bench.config.data.dataset else places:
            if place.name not in self.places:
                continue
            for column, groups in groups_of(Path(place.path), self.cases[place.name].row).items():
                patients = self.cases[place.name].patient
                hidden = untold({group: len(set(patients[keep])) for group, keep in groups.items()})
                for group, keep in groups.items():
                    for arm in dict.fromkeys(self.networks.values()):
                        found.append({"place": place.name, "column": column, "group": group, "arm": arm})
                        found[-1] |= UNTOLD if group in hidden else self._subgroup(arm, place.name, keep)
        return found

    def _subgroup(self, arm: str, place: str, keep: Any) -> dict[str, Any]:
        networks = self.of_arm(arm)
        networks = [f"local:{place}"] if f"local:{place}" in networks else networks
        parts = [self.bench.drawn(network, place, keep)[self.primary] for network in networks]
        return self.bench.estimate(mean_of(parts, together=False))

    def of_site(self, site: str, config: RunConfig) -> dict[str, Any]:
        """What one site learns of its own patients: every arm, and what they gained over its own local network."""
        arms = {arm: self.at(arm, site) for arm in dict.fromkeys(self.networks.values())}
        local = arms.get("local")
        rows = []
        for arm, drawn in arms.items():
            gain = None if local is None or arm == "local" else self.bench.difference(drawn, local, test=False)
            estimate = self.bench.estimate(drawn, suppress=False)
            gained = None if gain is None else {"value": gain.value, "low": gain.low, "high": gain.high}
            rows.append({"arm": arm, "kind": kind_of(arm), **estimate, "gain_over_local": gained})
        return {
            "schema": 1,
            "name": config.name,
            "site": site,
            "primary": self.primary,
            "seeds": list(self.bench.seeds),
            "images": self.images[site],
            "arms": rows,
        }


def _counts(patients: int, images: int) -> dict[str, int | None]:
    few = patients < SMALL
    return {"patients": None if few else patients, "images": None if few else images}


def steps_of(run: Path) -> int | None:
    """Optimizer steps that all sites of a run took in rounds that counted; None if the sites do not tell."""
    log = (result_of(run) or {}).get("rounds_log", [])
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if '"update_received"' in line]
    last = {(event["round"], event["site"]): event for event in events}  # a round that was repeated is told again
    told = [last[entry["round"], site].get("steps") for entry in log for site in entry["joined"]]
    return None if None in told else sum(map(int, told))


def _notes(bench: Bench, trials: Sequence[Trial], paths: Any, compared: bool) -> list[str]:
    """What a reader has to know before believing the table."""
    notes = []
    if compared and len(bench.seeds) < ENOUGH_SEEDS:
        notes.append(
            f"{len(bench.seeds)} seed{'s' if len(bench.seeds) > 1 else ''}: differences leave out most of the spread "
            f"between trainings, so no p-value is given; comparing takes evaluate.seeds = {ENOUGH_SEEDS} or more"
        )
    notes += _notes_on_algorithms(trials)
    degraded = sorted(path.name for path in paths if (result_of(path) or {}).get("status") == "degraded")
    if degraded:
        notes.append(f"sites dropped out of {len(degraded)} runs: {', '.join(degraded[:5])}; see their result.json")
    return notes


def _notes_on_algorithms(trials: Sequence[Trial]) -> list[str]:
    notes, strategies = [], [(trial.arm, trial.config.strategy) for trial in trials]
    own = dict.fromkeys(arm for arm, each in strategies if has_personal_network(each))
    if own:
        notes.append(f"at a site, {', '.join(own)} is the site's own network; at the server, the shared one")
    costly = dict.fromkeys(arm for arm, each in strategies if each.name == "ditto" or each.personal_steps)
    if costly:
        notes.append(
            f"sites take further steps for their own networks under {', '.join(costly)}, which the budget leaves out"
        )
    weighed = dict.fromkeys(arm for arm, each in strategies if each.name == "feddg-ga")
    if weighed:
        notes.append(f"{', '.join(weighed)} weights sites by losses on their held-out patients, who judge it as well")
    return notes


def _write(path: Path, value: dict[str, Any], *, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value, mode=mode)
