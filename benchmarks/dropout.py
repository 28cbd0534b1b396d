"""What dropping out costs: every site misses each round with some chance, from none to one half.

    .venv/bin/python benchmarks/dropout.py                          # minutes; phantoms
    .venv/bin/python benchmarks/dropout.py --run RUN.toml --seeds 3 # any hospitals

Only the chance differs between rows. A site drops out by a failed answer, in the same rounds whenever the command is
repeated; one site always answers. The table goes to benchmarks/dropout.md, under the name of the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedmed.config import RunConfig, load, nested, validate
from fedmed.federated.local_grid import LocalGrid
from fedmed.federated.phantoms import with_phantoms
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, run_on

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent / "simulations"))

from readme import put  # noqa: E402  # lies beside the simulations

CHANCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def phantoms() -> RunConfig:
    return with_phantoms(
        validate(
            {
                "name": "phantoms",
                "model": {"name": "small-cnn", "norm": "batch"},
                "task": {"labels": ["nodule", "cavity", "reticulation", "consolidation"]},
                "train": {"rounds": 5},
            }
        )
    )


def dropping(config: RunConfig) -> RunConfig:
    """The run as it is measured: no site is given up for good, and the last network counts."""
    values = nested(config)
    values["strategy"].update({"min-sites": 1, "lost-after": 0})
    values["evaluate"].update({"keep": "last"})
    values["simulation"]["device"] = "cpu"
    return validate(values)


def drops(chance: float, round: str, node: int) -> bool:
    digest = hashlib.sha256(f"{round}/{node}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < chance


def with_dropouts(grid: LocalGrid, chance: float) -> None:
    """Send some training messages to an app that is not there."""
    push = grid.push_messages

    def losing(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        trains = [message.metadata for message in messages if message.metadata.message_type == "train"]
        lost = [each for each in trains if drops(chance, each.group_id, each.dst_node_id)]
        for metadata in lost[: len(trains) - 1]:  # a round that nobody answers would pause the run
            metadata.__dict__["_message_type"] = "train.nobody"
        return push(messages)

    grid.push_messages = losing  # type: ignore[method-assign]


def facts_of(config: RunConfig, chance: float, folder: Path) -> dict[str, Any]:
    """Of one run, in a process of its own: workers are forked from one without threads."""
    kept = RunFolder.create(folder, config)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with local_grid(config, kept) as grid:
                with_dropouts(grid, chance)
                run_on(grid, config, kept, lambda event: None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a run failed; why stands above")
    facts: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return facts


def row(chance: float, results: list[dict[str, Any]], primary: str) -> str:
    found = [result["server"]["metrics"][primary] for result in results]
    rounds = [entry for result in results for entry in result["rounds_log"]]
    joined = sum(len(entry["joined"]) for entry in rounds)
    asked = joined + sum(len(entry["failed"]) for entry in rounds)
    values = [metric["value"] for metric in found]
    low, high = (found[0]["low"], found[0]["high"]) if len(found) == 1 else (min(values), max(values))
    status = ", ".join(sorted({result["status"] for result in results}))
    mean = statistics.fmean(values)
    return f"| {100 * chance:.0f} % | {joined} of {asked} | {status} | {mean:.3f} ({low:.3f}–{high:.3f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="of which hospitals; default: phantoms")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    config, rows = dropping(load(given.run) if given.run else phantoms()), []
    with tempfile.TemporaryDirectory(prefix="fedmed-dropout-") as temporary:
        for chance in CHANCES:
            results = []
            for seed in range(config.seed, config.seed + given.seeds):
                seeded = validate(nested(config) | {"seed": seed})
                results.append(facts_of(seeded, chance, Path(temporary) / f"{chance}-{seed}"))
            rows.append(row(chance, results, config.primary))
            print(rows[-1], file=sys.stderr, flush=True)
    spread = f"mean of {given.seeds} seeds, lowest and highest" if given.seeds > 1 else "95 %, by patient"
    words = [given.run.name if word == str(given.run) else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/dropout.py", *words])
    text = (
        f"`{command}` on {time.strftime('%Y-%m-%d')}: {len(config.data.sites)} hospitals, {config.model.name}, "
        f"{config.train.rounds} rounds, `lost-after = 0`, the last network on the server's patients.\n\n"
        f"| chance to miss a round | updates used | status | {config.primary} ({spread}) |\n"
        "|---|---|---|---|\n" + "\n".join(rows)
    )
    print(text)
    put(HERE / "dropout.md", config.name, text)


if __name__ == "__main__":
    main()
