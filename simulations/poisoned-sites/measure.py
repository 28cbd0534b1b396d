"""Run every attack against every rule, and write the tables of README.md."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from poisoned import TAMPERS, app_with  # noqa: E402
from readme import put  # noqa: E402  # lies beside the simulations

from fedmed import config as run_file  # noqa: E402
from fedmed.federated.run_folder import RunFolder  # noqa: E402
from fedmed.federated.simulation import local_grid, run_on  # noqa: E402

DISHONEST, UNUSUAL, LONGER = 2, 2, 24  # hospitals, hospitals, rounds of the second table
RULES: dict[str, tuple[str, ...]] = {
    "mean": (),
    "mean, clipped": ("strategy.clip-norm=0.5",),
    "median": ("strategy.combine=median",),
    "trimmed mean": ("strategy.combine=trimmed-mean",),
    "Krum": ("strategy.combine=krum",),
    "Multi-Krum": ("strategy.combine=multi-krum",),
    "Bulyan": ("strategy.combine=bulyan",),
    "geometric median": ("strategy.combine=geometric-median",),
}
ATTACKS = ("none", "label flip", *TAMPERS)


def run(attack: str, rule: str, *, unusual: bool = False, rounds: int | None = None) -> dict[str, Any]:
    """`result.json` of one federation over forked workers."""
    config = run_file.load(HERE / "run.toml", [*RULES[rule], *([f"train.rounds={rounds}"] if rounds else [])])
    sites = [Path(site).name for site in config.data.sites]
    if attack == "label flip":
        sites[:DISHONEST] = [site.replace("hospital", "flipped") for site in sites[:DISHONEST]]
    if unusual:
        sites[-UNUSUAL:] = [site.replace("hospital", "unusual") for site in sites[-UNUSUAL:]]
    config = config.model_copy(update={"data": config.data.model_copy(update={"sites": tuple(sites)})})
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder.create(Path(temporary) / "run", config)
        with local_grid(config, folder, app_with(TAMPERS.get(attack), DISHONEST)) as grid:
            return run_on(grid, config, folder, lambda event: None)


def cell(result: Mapping[str, Any]) -> str:
    """AUROC on the server's patients; in brackets what became of the dishonest sites' updates."""
    if result["status"] == "paused":
        return "paused"
    refused = ", refused" if any(entry["failed"] for entry in result["rounds_log"]) else ""
    return f"{result['server']['metrics']['auroc']['value']:.2f}{refused}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def attacks() -> str:
    """Every attack against every rule."""
    rows = [[attack, *(cell(run(attack, rule)) for rule in RULES)] for attack in ATTACKS]
    return table(["attack by 2 of 13 sites", *RULES], rows)


def unusual_hospitals() -> str:
    """No attack; two honest hospitals see their findings elsewhere."""
    rows = []
    for rule in RULES:
        values = {
            site["site"]: site["metrics"]["auroc"]["value"]
            for site in run("none", rule, unusual=True, rounds=LONGER)["sites"]
        }
        own = [value for site, value in values.items() if site.startswith("unusual")]
        others = [value for site, value in values.items() if not site.startswith("unusual")]
        rows.append([rule, f"{sum(others) / len(others):.2f}", f"{sum(own) / len(own):.2f}"])
    return table(["no attack", f"{len(others)} usual hospitals", f"{len(own)} unusual ones"], rows)


def main() -> None:
    """Replace both tables in README.md."""
    text = f"{attacks()}\n\n{unusual_hospitals()}"
    put(HERE / "README.md", "tables", text)
    print(text)


if __name__ == "__main__":
    main()
